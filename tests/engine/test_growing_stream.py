"""Gemma 3's stream grows 300-fold from its first layer to its last: scores, norms and limits are right all the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentwatch.aggregate.histogram import NORM_EDGES
from latentwatch.names import Reason, TokenState
from latentwatch.watchlist.file import LARGEST_HALF, HookRows, Watchlist, read, write

from tests.engine.conftest import SMALL, monitored
from tests.support import gemma, tiny
from tests.support.oracle import expected_scores, residual_streams

pytestmark = pytest.mark.engine


class Served:
    """A model, a watchlist over its depth in units of each layer's stream, and what an engine scored."""

    def __init__(self, model: Path, folder: Path, tokens: list[list[int]], layers: tuple[int, ...]) -> None:
        import json

        sizes = json.loads((model / "config.json").read_text())
        made = tiny.watchlist(
            folder / "unit.safetensors",
            layers=layers,
            d_model=sizes["hidden_size"],
            num_layers=sizes["num_hidden_layers"],
            architecture="Gemma3ForCausalLM",
        )
        card = made.model.__class__(**{**vars(made.model), "vocab_size": sizes["vocab_size"], "dtypes": ("float32",)})
        self.layers = layers
        # Thresholds and biases as large as the layer's own scores, or every gate at depth would be open or shut.
        streams = residual_streams(model, tokens[0], list(layers), "float32")
        hooks = tuple(
            scaled(rows, float(np.linalg.norm(x, axis=1)[-1])) for rows, x in zip(made.hooks, streams, strict=True)
        )
        self.watchlist: Watchlist = write(Watchlist("grown", card, hooks), folder / "grown.safetensors")
        self.model = model
        waves = [[{"prompt": ids, "max_tokens": 8} for ids in tokens]]
        with monitored(folder) as engine:
            engine_args = {"model": str(model), **SMALL, "dtype": "float32"}
            self.outputs = engine.run(folder / "grown.safetensors", engine=engine_args, waves=waves).outputs
            found = engine.sink.requests(read(folder / "grown.safetensors"))
        ordered = [found[key] for key in sorted(found, key=lambda request_id: int(request_id.partition("-")[0]))]
        self.requests = [
            ((ids + out)[:-1], scores) for ids, out, scores in zip(tokens, self.outputs, ordered, strict=True)
        ]


def scaled(rows: HookRows, norm: float) -> HookRows:
    """The rows with gates and biases for a stream of this norm: tiny.watchlist's are for scores of about one."""
    scale = rows.scale_6K.copy()
    factor = norm / np.sqrt(rows.w_hi_KD.shape[1])
    scale[[0, 2]] = scale[[0, 2]] * factor
    return HookRows(rows.hook_point, rows.features, rows.w_hi_KD, rows.w_lo_KD, scale)


@pytest.fixture(scope="module", params=["tiny", "270m"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("grown")
    if request.param == "tiny":
        rng = np.random.default_rng(1)
        tokens = [[gemma.BOS, *rng.integers(3, gemma.VOCABULARY, size=n).tolist()] for n in (40, 70, 12)]
        return Served(gemma.growing(folder / "model"), folder, tokens, (0, 2, gemma.LAYERS - 1))
    model = gemma.gemma3_270m()
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    texts = ("The capital of France is", "Water boils at a hundred degrees, and it freezes at", "def add(a, b):\n")
    return Served(model, folder, [tokenizer(text)["input_ids"] for text in texts], (0, 8, 17))


def test_the_stream_grows_three_hundred_fold_and_begins_beyond_half_precision(served: Served) -> None:
    """What makes the tests below worth anything."""
    norms = np.array([scores.norm_at[3] for _, scores in served.requests])
    assert (norms[:, -1] / norms[:, 0] > 200).all() and (norms[:, 0] > 60).all() and (norms[:, -1] > 20_000).all()
    first = np.array([scores.norm_at[0] for _, scores in served.requests])
    assert (first.max(axis=1) > LARGEST_HALF).all()


def test_every_token_is_scored_and_none_is_called_not_finite(served: Served) -> None:
    for fed, scores in served.requests:
        assert {(state, reason) for state, reason, _ in scores.tokens} == {(TokenState.SCORED, Reason.NONE)}
        assert sum(scores.tokens.values()) == len(fed) == len(scores.at)


def test_scores_and_norms_at_every_depth_are_those_of_transformers(served: Served) -> None:
    """Sparse scores to 1e-4 of the layer's norm, dense ones to half precision and clipped at its end, norms to 1e-4."""
    sparse = served.watchlist.sparse_F
    layer_F = np.repeat(np.arange(len(served.layers)), [len(rows.features) for rows in served.watchlist.hooks])
    fired = 0
    for fed, scores in served.requests:
        streams = residual_streams(served.model, fed, list(served.layers), "float32")
        act_TF, margin_TF = expected_scores(served.watchlist, streams)
        norm_TH = np.stack([np.linalg.norm(x_TD, axis=1) for x_TD in streams], axis=1)
        for position, found_F in scores.at.items():
            slack_F = 1e-4 * norm_TH[position][layer_F]
            sure = sparse & (np.abs(margin_TF[position]) > slack_F)
            assert ((found_F > 0) == (act_TF[position] > 0))[sure].all()
            assert (np.abs(found_F - act_TF[position]) <= slack_F)[sure].all()
            dense = np.clip(act_TF[position][~sparse], -LARGEST_HALF, LARGEST_HALF)
            assert (np.abs(found_F[~sparse] - dense) <= slack_F[~sparse] + np.abs(dense) * 2.0**-10).all()
            np.testing.assert_allclose(scores.norm_at[position], norm_TH[position], rtol=1e-4)
            fired += int((found_F[sparse] > 0).sum())
    assert fired > 100


def test_norms_fall_into_buckets_and_not_behind_the_last(served: Served) -> None:
    for _, scores in served.requests:
        norms = np.array(list(scores.norm_at.values()))
        assert norms.max() < NORM_EDGES[-1]
        assert len(np.unique(np.searchsorted(NORM_EDGES, norms))) >= 5
