"""Texts scored offline on the demo's model: as the reference kernel says, and by limits as the collector counts."""

from __future__ import annotations

import re
import subprocess
import sys
from html import escape
from pathlib import Path

import latentwatch
import latentwatch.demo
import numpy as np
import pytest
from latentwatch.cli import main
from latentwatch.errors import WatchlistRefused
from latentwatch.research import scoring
from latentwatch.watchlist.file import Limit

from tests.support.engines import ROOT
from tests.support.evidence import one_request, store

ASSETS = Path(latentwatch.demo.__file__).parent / "assets"
FILE, MODEL = ASSETS / "demo.watchlist.safetensors", ASSETS / "model"
DIALOGUE = [
    {"role": "user", "content": "Is the bridge safe?"},
    {"role": "assistant", "content": "It was tested last week."},
]


@pytest.fixture(scope="module")
def scored():
    return latentwatch.score(latentwatch.load(FILE), MODEL, ["Write to us if you have read a rumour.", DIALOGUE])


def test_importing_the_package_imports_nothing_of_it():
    """The plugin imports it in vLLM, the collector without torch."""
    code = (
        "import sys, latentwatch; "
        "print([n for n in sys.modules if n.split('.')[0] in ('numpy', 'torch')], latentwatch.load)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("[] <function load")
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        latentwatch.scores  # noqa: B018, reading it is what is tested


def test_scores_are_those_of_the_reference_kernel():
    import torch
    from latentwatch.kernels import reference

    rng = np.random.default_rng(0)
    for rows in latentwatch.load(FILE).hooks:
        x_TD = rng.normal(0, 3, (40, rows.w_hi_KD.shape[1])).astype(np.float32)
        act_TK, _ = reference.score(
            torch.from_numpy(x_TD), None, torch.from_numpy(rows.w_KD), torch.from_numpy(rows.scale_6K)
        )
        made_TK = scoring.rows_score(rows, x_TD.astype(np.float64))
        assert np.allclose(made_TK, act_TK.numpy(), rtol=1e-9, atol=1e-9)
        assert ((made_TK != 0) == (act_TK.numpy() != 0)).all()


def test_a_text_is_prompt_and_a_last_answer_is_output(scored):
    text, dialogue = scored
    assert text.prompt_tokens == len(text.tokens)
    assert "".join(text.tokens).strip().endswith("rumour.")
    output = "".join(dialogue.tokens[dialogue.prompt_tokens :])
    assert "tested last week" in output and "bridge" not in output
    assert dialogue.act_TF.shape == (len(dialogue.tokens), len(dialogue.watchlist.features))


def test_skipped_positions_and_limits_on_output_are_left_out_where_they_do_not_count(scored):
    text, dialogue = scored
    skips = [feature.skip_first_positions for feature in text.watchlist.features]
    assert (np.isnan(text.act_TF).sum(axis=0) == skips).all() and max(skips) > 0
    on_output = [f.id for f in text.watchlist.features if f.limit and f.limit.phase == "output"]
    assert on_output and all(np.isnan(text.statistics()[name]) for name in on_output)
    assert any(np.isfinite(dialogue.statistics()[name]) for name in on_output)


@pytest.mark.parametrize(
    "limit", [Limit("max", 1.0), Limit("rolling_mean", 1.0, 3), Limit("rolling_mean", 1.0, 4, "output")]
)
def test_a_statistic_is_the_largest_of_consecutive_tokens_that_count(limit):
    act_T = np.random.default_rng(1).normal(0, 1, 20).astype(np.float32)
    act_T[0] = np.nan
    counts = range(1 if limit.phase == "any" else 8, 20)
    windows = {
        end: act_T[end - limit.window_tokens + 1 : end + 1].mean()
        for end in counts
        if end - limit.window_tokens + 1 in counts
    }
    best = max(windows, key=windows.__getitem__)
    value, at = scoring._statistic(limit, act_T, prompt_tokens=8)
    assert at == best and value == pytest.approx(windows[best], rel=1e-6)


def test_a_model_of_another_width_is_refused(tmp_path):
    from tests.support import tiny

    tiny.llama(tmp_path / "other", hidden_size=32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / name).write_bytes((MODEL / name).read_bytes())
    with pytest.raises(WatchlistRefused, match="wide"):
        latentwatch.score(latentwatch.load(FILE), tmp_path / "other", ["x y"])


def test_a_text_that_is_too_long_is_refused_with_its_length(monkeypatch):
    """Never cut off: a score of half a text looks like one of the whole."""
    watched = latentwatch.load(FILE)
    monkeypatch.setattr(scoring, "MAX_TOKENS", 12)
    assert latentwatch.score(watched, MODEL, ["one two"])
    with pytest.raises(WatchlistRefused, match="12 tokens or more") as refused:
        latentwatch.score(watched, MODEL, ["one two", "one two three " * 12])
    assert "fewer than 12 tokens" in str(refused.value)


def test_a_notebook_shows_tokens_in_colour_and_an_unknown_feature_is_named(scored):
    shown = scored[1]._repr_html_()
    assert "tested" in shown and "<b class='edge'>output</b>" in shown
    feature = scored[1].watchlist.features[0]
    assert escape(feature.label) in scored[1].html(feature.id)
    with pytest.raises(KeyError, match="'nobody' is no feature of"):
        scored[1].html("nobody")


def test_evidence_is_read_as_tables(tmp_path):
    with store(tmp_path / "e") as writing:
        writing.write(one_request(1, request_id="chatcmpl-1"), 1e9)
    tables = latentwatch.read_evidence(tmp_path / "e")
    assert set(tables) == {"requests", "exceedances", "activations"}
    assert tables["requests"]["request_id"].to_pylist() == ["chatcmpl-1"]
    assert set(tables["exceedances"]["key"].to_pylist()) == set(tables["requests"]["key"].to_pylist())


def test_the_verb_prints_what_fires_and_writes_the_tokens(tmp_path, capsys):
    out = tmp_path / "t.html"
    asked = ["watchlist", "try", str(FILE), "--model", str(MODEL), "--text", DIALOGUE[0]["content"]]
    assert main([*asked, "--answer", DIALOGUE[1]["content"], "--html", str(out)]) == 0
    said = capsys.readouterr().out
    assert "prompt and" in said and "limit" in said and "tested" in out.read_text()


def test_the_verb_takes_the_lines_of_a_text_file(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("first line\n\nsecond line\n")
    assert main(["watchlist", "try", str(FILE), "--model", str(MODEL), "--requests", str(tmp_path / "t.txt")]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("text")] == [
        "text 1",
        "text 2",
    ]


REFUSED = {
    "nothing": ([], "there is no text"),
    "an unknown feature": (["--text", "a", "--feature", "none"], "the watchlist has no such feature"),
    "an answer to two": (["--text", "a", "--text", "b", "--answer", "c"], "Give it with one --text"),
    "a picture of two": (["--text", "a", "--text", "b", "--html", "x.html"], "It shows one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_together_is_refused_before_a_model_is_loaded(case, capsys):
    options, says = REFUSED[case]
    assert main(["watchlist", "try", str(FILE), "--model", "no-such-model", *options]) == 2
    assert says in capsys.readouterr().err


def test_the_document_runs_as_it_stands(tmp_path, monkeypatch):
    """Its blocks one after the other, in a folder with what they name."""
    (tmp_path / "my.watchlist.safetensors").symlink_to(FILE)
    (tmp_path / "model").symlink_to(MODEL)
    with store(tmp_path / "evidence") as writing:
        writing.write(one_request(1), 1e9)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/research.md").read_text(), re.MULTILINE | re.DOTALL)
    space: dict[str, object] = {}
    for block in blocks:
        exec(block, space)
    assert len(blocks) == 3 and isinstance(space["dialogue"], scoring.Scored)
    assert set(space["exceedances"]["model_name"]) == set(space["requests"]["model_name"])
