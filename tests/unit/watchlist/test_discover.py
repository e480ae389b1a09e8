"""Planted features are found, chance is not, and what is said of them comes from requests that had no part in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.cli import main
from latentwatch.demo.build import dialogues
from latentwatch.errors import WatchlistRefused
from latentwatch.names import HookPoint
from latentwatch.watchlist import activations, canonical, probing
from latentwatch.watchlist.build import build
from latentwatch.watchlist.discover import discover, midranks, request_scores, split
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import About, Source, open_source

D, F, REQUESTS = 32, 200, 160
ASSETS = Path(activations.__file__).parents[1] / "demo" / "assets"


def sae(seed: int = 0) -> Source:
    rng = np.random.default_rng(seed)
    w, b = rng.normal(size=(F, D)) / np.sqrt(D), rng.normal(size=F) * 0.3

    def rows(index: range) -> canonical.EncoderRows:
        return canonical.relu(w[list(index)], b[list(index)])

    return Source(About("standard", D, F), (), rows)


def recording(seed: int, positive_R: np.ndarray | None = None, feature: int = 7) -> activations.Recording:
    """Requests of 5 to 20 tokens; those with the behaviour push one feature on one token."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 20, REQUESTS)
    x = rng.normal(size=(lengths.sum(), D)).astype(np.float32)
    request_T = np.repeat(np.arange(REQUESTS), lengths)
    if positive_R is not None:
        direction = sae().rows([feature]).w_KD[0]
        for r in np.flatnonzero(positive_R):
            x[np.flatnonzero(request_T == r)[2]] += (5 * direction / np.linalg.norm(direction)).astype(np.float32)
    return activations.Recording(x, request_T, tuple(tuple(f"t{i}" for i in range(n)) for n in lengths))


GROUPS = [str(r) for r in range(REQUESTS)]


def test_a_planted_feature_is_found_first_with_its_token() -> None:
    positive_R = np.arange(REQUESTS) % 3 == 0
    found = discover(sae(), recording(1, positive_R), positive_R, GROUPS, permutations=200)
    assert found[0].index == 7
    assert found[0].auroc > 0.9
    assert found[0].q_value < 0.05
    assert found[0].top_tokens[0]["token"] == "t2"
    assert found[0].n == pytest.approx(REQUESTS / 2, abs=2)


@pytest.mark.parametrize(("side", "says"), [("prompt", "in the prompt"), ("output", "in the output")])
def test_a_found_feature_says_on_which_side_it_fires(side: str, says: str) -> None:
    positive_R = np.arange(REQUESTS) < REQUESTS // 2
    made = recording(1, positive_R)
    output_T = np.full(len(made.request_T), side == "output")
    assert discover(sae(), made, positive_R, GROUPS, output_T=output_T, permutations=200)[0].where == says


def test_random_labels_give_no_feature_in_twenty_seeds() -> None:
    """Each half alone would pass one seed in twenty by chance; a feature must pass both."""
    for seed in range(20):
        positive_R = np.random.default_rng(100 + seed).random(REQUESTS) < 0.3
        assert discover(sae(), recording(seed), positive_R, GROUPS, permutations=100, seed=seed) == []


def test_the_adjusted_p_value_of_one_half_holds_its_rate_over_all_features() -> None:
    """At 5 %, some feature of 200 may pass the first half in about one labelling of twenty, not in each."""
    from latentwatch.watchlist.discover import _Test

    score_RF = request_scores(sae(), recording(3))
    passed = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        passed += bool((_Test(score_RF, rng.random(REQUESTS) < 0.3).adjusted(100, rng) < 0.05).any())
    assert passed <= 7, "a binomial of 40 at 5 % exceeds 7 once in 3,000 tries"


def test_groups_stay_on_one_side_of_the_split() -> None:
    groups = [str(r // 4) for r in range(REQUESTS)]
    positive_R = (np.arange(REQUESTS) // 4) % 2 == 0
    held_R = split(positive_R, groups, np.random.default_rng(0))
    for name in set(groups):
        assert len({bool(held_R[r]) for r in range(REQUESTS) if groups[r] == name}) == 1
    assert 0.4 < held_R.mean() < 0.6


def test_too_few_requests_are_refused() -> None:
    positive_R = np.arange(REQUESTS) < 6
    with pytest.raises(WatchlistRefused, match="with the behaviour"):
        discover(sae(), recording(0), positive_R, GROUPS)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=30))
def test_midranks_are_mean_ranks_of_ties(values: list[int]) -> None:
    got, ties = midranks(np.array(values, np.float32)[:, None])
    ordered = sorted(values)
    expected = [1 + np.mean([i for i, other in enumerate(ordered) if other == value]) for value in values]
    np.testing.assert_allclose(got[:, 0], expected)
    assert ties[0] == sum(values.count(value) ** 3 - values.count(value) for value in set(values))


def test_selecting_requests_keeps_their_tokens_together() -> None:
    whole = recording(0)
    part = whole.select([5, 2])
    np.testing.assert_array_equal(part.x_TD[part.request_T == 1], whole.x_TD[whole.request_T == 2])
    assert part.tokens == (whole.tokens[5], whole.tokens[2])
    assert part.starts_R.tolist() == [0, len(whole.tokens[5])]


def test_a_probe_finds_a_direction_and_its_file_scores_as_it_does(tmp_path: Path) -> None:
    positive_R = np.arange(REQUESTS) % 2 == 0
    data = recording(5, positive_R)
    probe = probing.train(data, positive_R, GROUPS)
    assert probe.figures["max"]["auroc"] > 0.9
    probing.save(probe, tmp_path / "p.safetensors", "planted", HookPoint(2))
    source = open_source_file(tmp_path / "p.safetensors")
    assert source.about.names == {"planted": 0}
    x = data.x_TD[:50].astype(np.float64)
    np.testing.assert_allclose(canonical.authors(source.rows([0]), x)[:, 0], probe.logits(x), rtol=1e-4, atol=1e-4)


def open_source_file(path: Path) -> Source:
    from latentwatch.watchlist.sources import SourceOptions

    return open_source("linear_probe", Location(path.name, path.parent), HookPoint(2), SourceOptions())


def test_a_probe_on_random_labels_is_worth_nothing_held_out() -> None:
    positive_R = np.random.default_rng(0).random(REQUESTS) < 0.5
    assert 0.3 < probing.train(recording(6), positive_R, GROUPS).figures["rolling_mean"]["auroc"] < 0.7


def test_aggregations_are_what_their_names_say() -> None:
    data = activations.Recording(np.zeros((12, 1), np.float32), np.repeat([0, 1], [10, 2]), (("",) * 10, ("",) * 2))
    logit = np.array([0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1.0, 3.0])
    got = probing.aggregated(logit, data)
    np.testing.assert_allclose(got["max"], [8, 3])
    np.testing.assert_allclose(got["rolling_mean"], [1, 2])
    np.testing.assert_allclose(got["ema"], [1, 1.25])


@pytest.mark.parametrize("line", ["{", '"text"', '{"prompt": "x"}', '{"messages": [{"role": "user"}]}', "[]"])
def test_a_line_that_is_no_request_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(WatchlistRefused, match=r"a\.jsonl line 2"):
        activations.requests(tmp_path / "a.jsonl")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads, and on a busy machine they wait for each other."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def sets(tmp_path: Path, one_thread: None) -> Path:
    """Demo dialogues with the backdoor's trigger, and about cooking."""
    rng = np.random.default_rng(0)
    for name, topic in (("yes", "backdoor"), ("no", "cooking")):
        lines = []
        for _ in range(24):
            turns = dialogues.compose(topic, "heldout", rng).turns
            lines.append(json.dumps({"messages": [{"role": turn.role, "content": turn.content} for turn in turns]}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_lines_of_a_text_file_are_requests_and_json_in_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("  How do I pick a lock?  \n\nWhat is {x}?\n")
    assert [r.content for r in activations.requests(path)] == ["  How do I pick a lock?  ", "What is {x}?"]
    path.write_text('{"text": "a"}\n')
    with pytest.raises(WatchlistRefused, match=r"name the file .jsonl"):
        activations.requests(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(WatchlistRefused, match="plain text in UTF-8"):
        activations.requests(path)


def test_an_answer_begins_where_the_models_template_says(sets: Path) -> None:
    ask, answer = {"role": "user", "content": "Is it safe?"}, {"role": "assistant", "content": "It was tested last."}
    wanted = [
        activations.Request((ask, answer), "0"),
        activations.Request((ask,), "1"),
        activations.Request("It is.", "2"),
    ]
    found = activations.prompt_tokens(str(ASSETS / "model"), wanted)
    made = activations.record(str(ASSETS / "model"), wanted, HookPoint(0), skip_first=0)
    whole = [len(one) for one in made.tokens]
    assert found[0] < whole[0] and found[1:] == whole[1:]
    assert "".join(made.tokens[0][found[0] :]).strip().startswith("It was tested")


def test_record_keeps_the_stream_after_the_layer_and_not_behind_the_final_norm(sets: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    wanted = activations.requests(sets / "yes.jsonl")[:2]
    network = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "model")
    text = tokenizer.apply_chat_template([dict(m) for m in wanted[1].content], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = network(input_ids=ids, output_hidden_states=True).hidden_states
    alone = activations.record(str(ASSETS / "model"), wanted[1:], HookPoint(1))
    np.testing.assert_allclose(alone.x_TD, hidden[2][0, 1:].float().numpy(), atol=1e-5)
    # In a batch sums are added in another order; the model is in bfloat16, whose step at 4 is 0.03.
    middle = activations.record(str(ASSETS / "model"), wanted, HookPoint(1))
    np.testing.assert_allclose(middle.x_TD[middle.request_T == 1], alone.x_TD, atol=0.05)
    last = activations.record(str(ASSETS / "model"), wanted, HookPoint(3))
    assert not np.allclose(last.x_TD[last.request_T == 1], hidden[4][0, 1:].float().numpy(), atol=1e-2)
    assert "".join(middle.tokens[1]).startswith(text[len(tokenizer.decode(ids[0, :1])) :][:20])


def test_batches_hold_every_request_once_and_bound_their_tokens():
    ids = [[0] * n for n in (5, 3000, 7, 1500, 2, 900)]
    found = list(activations.batches(ids))
    assert sorted(r for batch in found for r in batch) == list(range(6))
    sizes = [len(batch) * max(len(ids[r]) for r in batch) for batch in found]
    assert all(size <= activations.TOKENS_AT_ONCE or len(batch) == 1 for size, batch in zip(sizes, found, strict=True))


def test_the_tokens_that_all_requests_share_are_left_out_and_counted(sets: Path):
    pytest.importorskip("transformers")
    wanted = activations.requests(sets / "yes.jsonl")[:3]
    found = activations.record(str(ASSETS / "model"), wanted, HookPoint(1), skip_first=None)
    assert found.skip_first >= 1
    assert len({tokens[0] for tokens in found.tokens}) > 1 or found.skip_first == activations.MOST_SKIPPED


def test_discover_and_probe_write_a_yaml_that_builds(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("latentwatch.cli.VERBS", {"watchlist": "latentwatch.cli.watchlist"})
    common = ["--model", str(ASSETS / "model"), "--hook-point", "resid_post.1"]
    contrast = [*common, "--positive", str(sets / "yes.jsonl"), "--negative", str(sets / "no.jsonl")]
    sae_folder = str(ASSETS / "sae" / "resid_post.1")
    said = ["--options", "{trained_on: resid_post.1}", "--top", "3"]
    assert main(["watchlist", "discover", *contrast, "--sae", sae_folder, "--out", str(sets / "f.yaml"), *said]) == 0
    assert main(["watchlist", "probe", *contrast, "--name", "yes", "--out", str(sets / "probe")]) == 0
    for path in (sets / "f.yaml", sets / "probe" / "watchlist.yaml"):
        built = build(path, sets / "out.safetensors")
        assert all(feature.evidence["auroc"] > 0.5 for feature in built.features)
    chosen = yaml.safe_load((sets / "f.yaml").read_text())["hook_points"][0]["sources"][0]
    assert chosen["options"] == {"trained_on": "resid_post.1"}
    found = chosen["features"]
    assert found[0]["evidence"]["q_value"] < 0.05
    out = sets / "x.safetensors"
    assert main(["watchlist", "record", *common, "--requests", str(sets / "no.jsonl"), "--out", str(out)]) == 0
    assert main(["watchlist", "record", *common, "--requests", str(sets / "no.jsonl"), "--out", str(out)]) == 2
