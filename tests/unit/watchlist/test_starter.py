"""The parts of `watchlist start` that need no engine: windows, fits, the split by families, figures and files."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import yaml
from latentwatch.errors import WatchlistRefused
from latentwatch.prompts.prompt import Kind, Part, Prompt
from latentwatch.watchlist import captured
from latentwatch.watchlist.captured import CapturedLayer, CapturedRequest, CaptureJob
from latentwatch.watchlist.starter import chosen, detectors, files, measure, plan, tokens, training
from latentwatch.watchlist.starter.concern import split
from latentwatch.watchlist.starter.measure import Interval
from latentwatch.watchlist.starter.tokens import Encoded

D = 12


def prompts(positive=24, harmless=24):
    """Two concerns' worth of texts that the stream tells apart and the words do not."""
    made = []
    for part in Part:
        for number in range(positive):
            made.append(
                Prompt(f"text {number % 7}", "toxicity", f"bad-{part}", Kind.POSITIVE, part, form=f"f{number % 4}")
            )
        for kind, concern in ((Kind.HARD, "toxicity"), (Kind.ORDINARY, "ordinary")):
            for number in range(harmless):
                family = f"{kind}-{part}"
                made.append(Prompt(f"text {number % 7}", concern, family, kind, part, form=f"g{number % 4}"))
    return made


def job_of(texts, layers=(1, 2)):
    ids = tuple((1, 2, *range(3, 12 + at % 4)) for at, _ in enumerate(texts))
    return CaptureJob("model", "float32", layers, ids, (1,) * len(ids), 2, 64)


def capture(folder, texts, job, rng):
    """A stream in which positive texts differ at the second layer, at their last token only."""
    job.write(folder)
    for number, part in enumerate(job.parts):
        requests = []
        for at in part:
            x_LTD = rng.normal(size=(2, len(job.prompts[at]) - 2, D))
            if texts[at].kind is Kind.POSITIVE:
                x_LTD[1, -1, 0] += 8.0
            largest_LT = np.abs(x_LTD).max(axis=2)
            half = (x_LTD / largest_LT[:, :, None]).astype(np.float16)
            requests.append(CapturedRequest(half, largest_LT.astype(np.float32), (5,)))
        captured.write_part(folder, number, requests)


def encoded_of(texts, job):
    return Encoded(texts, job.prompts, 2, 2, "<assistant>", 0)


# What was captured.


def test_a_stream_comes_back_as_it_was_to_a_two_thousandth_of_its_largest_element(tmp_path):
    x_LTD = np.random.default_rng(0).normal(size=(2, 9, D)) * 1e5  # float16 alone would end at 65,504
    largest_LT = np.abs(x_LTD).max(axis=2)
    one = CapturedRequest((x_LTD / largest_LT[:, :, None]).astype(np.float16), largest_LT.astype(np.float32), (7, 8))
    job = dataclasses.replace(job_of([None]), prompts=((1, 2, 3),), decode_tokens=(2,))
    job.write(tmp_path)
    captured.write_part(tmp_path, 0, [one])
    for index in range(2):
        layer = captured.layer(tmp_path, job, index)
        np.testing.assert_allclose(layer.x_TD, x_LTD[index], atol=5e-4 * largest_LT.max())
        assert layer.length_R.tolist() == [9]
    assert list(captured.said(tmp_path, job)) == [(7, 8)]


def test_another_job_uses_nothing_of_what_lies_there(tmp_path):
    job = job_of([None] * 3)
    job.write(tmp_path)
    captured.part_path(tmp_path, 0).write_bytes(b"x")
    assert job.write(tmp_path)
    assert not dataclasses.replace(job, dtype="bfloat16").write(tmp_path)
    assert captured.missing_parts(tmp_path, job) == [0]


def test_a_missing_part_is_refused_by_name(tmp_path):
    job = job_of([None])
    job.write(tmp_path)
    with pytest.raises(WatchlistRefused, match=r"part 0 .* Run the same command again"):
        captured.layer(tmp_path, job, 0)


# Windows and scores.


def windows(length_R, width, x_TD=None):
    total = sum(length_R)
    x_TD = np.arange(total, dtype=np.float32)[:, None] if x_TD is None else x_TD
    return training.Windows(CapturedLayer(x_TD, np.array(length_R)), np.array(length_R) - 1, width)


def test_a_rolling_mean_is_that_of_serving_full_windows_of_one_request():
    found = windows([3, 2, 5], 3).scores(np.arange(10.0))
    assert found.tolist() == [-np.inf, -np.inf, 1, -np.inf, -np.inf, -np.inf, -np.inf, 6, 7, 8]


def test_the_highest_window_of_each_request_is_found_with_its_last_token():
    score_R, at_R = windows([3, 2], 1).highest(np.array([1.0, 5, 2, 7, 7]))
    assert score_R.tolist() == [5, 7]
    assert at_R.tolist() == [1, 3]


def test_an_attention_sink_is_left_out_of_a_window_that_is_fitted_on():
    x_TD = np.ones((6, 2), np.float32)
    x_TD[4] = 1e4
    of = windows([6], 3, x_TD)
    assert of.sink_T.tolist() == [False] * 4 + [True, False]
    assert of.mean(np.array([5])).tolist() == [[1, 1]]


# Figures.


def test_auroc_and_rates_of_known_scores():
    positive, negative = np.array([3.0, 1.0]), np.array([0.0, 1.0, 2.0, 2.5])
    assert measure.auroc(positive, negative) == pytest.approx((4 + 1.5) / 8)
    assert measure.limit_at(negative, 0.01) == 2.5
    assert measure.limit_at(negative, 0.25) == 2.0
    assert measure.tpr(positive, negative) == 0.5


def test_an_interval_over_forms_is_wider_than_one_over_texts():
    """Forty texts of two templates, of which one is found and one is not, say little."""
    rng = np.random.default_rng(0)
    positive = np.repeat([1.0, -1.0], 20)
    forms = ["a"] * 20 + ["b"] * 20
    (of_forms,) = measure.tpr_interval([(positive, np.zeros(50))], forms, [""] * 50, rng)
    (of_texts,) = measure.tpr_interval([(positive, np.zeros(50))], [""] * 40, [""] * 50, rng)
    assert of_forms.value == of_texts.value == 0.5
    assert (of_forms.low, of_forms.high) == (0.0, 1.0)
    assert of_texts.high - of_texts.low < 0.4


# All of it.


@pytest.fixture
def run(tmp_path):
    texts = prompts()
    job = job_of(texts)
    capture(tmp_path, texts, job, np.random.default_rng(3))
    found = detectors.train(
        tmp_path,
        job,
        encoded_of(texts, job),
        ["toxicity"],
        exceedance_rate=0.05,
        traffic=(),
        seed=0,
        progress=lambda _: None,
    )
    return texts, job, found[0]


def test_the_layer_that_knows_is_chosen_and_beats_the_text(run):
    _, _, detector = run
    assert (detector.settings.layer, detector.settings.statistic) == (2, "max")
    assert detector.beats_text
    for row in detector.rows:
        assert row.family == "bad-test"
        assert (row.n, row.n_negative) == (24, 24)
        assert row.tpr.value > 0.9
        assert row.text.value < 0.3
        assert 0.3 < row.auroc_text < 0.7


def test_the_limit_is_exceeded_by_the_stated_share_of_ordinary_requests(run):
    texts, _, detector = run
    ordinary = [at for at, p in enumerate(texts) if p.kind is Kind.ORDINARY and p.part is not Part.TEST]
    assert detector.n_ordinary == len(ordinary)
    assert (detector.scores_R[ordinary] > detector.limit).mean() == pytest.approx(0.05, abs=1 / len(ordinary))


def test_no_text_of_a_test_family_has_a_part_in_the_probe_or_the_choice(tmp_path):
    """The streams of all test families are replaced: the same probe comes out."""
    texts = prompts()
    job = job_of(texts)
    capture(tmp_path / "a", texts, job, np.random.default_rng(3))
    capture(tmp_path / "b", texts, job, np.random.default_rng(3))
    part = captured.part_path(tmp_path / "b", 0)
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(part)
    bounds = np.concatenate([[0], np.cumsum(tensors["tokens"])])
    for at in job.parts[0]:
        if texts[at].part is Part.TEST:
            # The largest elements stay: the median of norms decides which tokens are sinks.
            tensors["x"][:, bounds[at] : bounds[at + 1]] *= -1
    part.write_bytes(safetensors.numpy.save(tensors))
    probes = []
    for name in "ab":
        found = detectors.train(
            tmp_path / name,
            job,
            encoded_of(texts, job),
            ["toxicity"],
            exceedance_rate=0.05,
            traffic=(),
            seed=0,
            progress=lambda _: None,
        )
        probes.append((found[0].settings, found[0].probe.weight_D.tolist(), found[0].limit))
    assert probes[0] == probes[1]


def about(**changes):
    base = files.About("org/model", "model", "float32", 2, 2, "<assistant>", 0.05, "ordinary texts", ["set: gone"], 3)
    return dataclasses.replace(base, **changes)


def test_the_files_say_what_was_measured_and_what_is_missing(run, tmp_path):
    _, _, detector = run
    path = files.write(tmp_path, [detector], about())
    content = yaml.safe_load(path.read_text())
    feature = content["hook_points"][0]["sources"][0]["features"][0]
    assert content["model"] == {"name": "model", "config": "hf:org/model", "dtypes": ["float32"]}
    assert feature["severity"] == "info"  # toxicity's own
    assert feature["skip_first_positions"] == 2
    assert feature["limit"] == {"statistic": "max", "value": round(detector.limit, 4)}
    assert "Better than the best text classifier" in feature["evidence"]["remarks"]
    assert "set: gone" in (tmp_path / "cards.md").read_text()
    rows = json.loads((tmp_path / "detectors.json").read_text())["rows"]
    assert {(row["family"], row["negatives"]) for row in rows} == {("bad-test", "hard"), ("bad-test", "ordinary")}
    assert {"model", "concern", "tpr_at_1pct", "tpr_text", "tpr_length", "auroc", "auroc_text", "n"} <= set(rows[0])


@pytest.mark.parametrize("better_by", [Interval(0.05, 0.02, 0.08), Interval(0.4, -0.1, 0.9)])
def test_a_detector_that_is_not_surely_better_than_the_text_is_marked_and_only_shown(run, tmp_path, better_by):
    _, _, detector = run
    rows = [dataclasses.replace(row, better_by=better_by) for row in detector.rows]
    poor = dataclasses.replace(detector, concern="harmful_request", rows=rows)
    content = yaml.safe_load(files.write(tmp_path, [poor], about()).read_text())
    feature = content["hook_points"][0]["sources"][0]["features"][0]
    assert feature["severity"] == "info"  # harmful_request is a warning
    assert feature["label"].endswith("(no better than the text alone)")
    assert "does not beat" in (tmp_path / "cards.md").read_text()


# Tokens and plans.


class Tokenizer:
    """Characters are tokens; a template with a system prompt, as chat models have it."""

    chat_template: str | None = "yes"

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
        assert not tokenize
        text = "[sys]You help.[/sys]" + "".join(f"[{m['role'][0]}]{m['content']}[/]" for m in messages)
        return text + "[a]" * add_generation_prompt

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))


def encode(texts, tokenizer=None, **options):
    return tokens.encode(tokenizer or Tokenizer(), texts, **{"plain": False, "max_tokens": 99, "model": "m"} | options)


def test_the_templates_shared_prefix_is_found_and_the_generation_prompt_is_recorded():
    texts = [
        Prompt("Hello you", "ordinary", "a", Kind.ORDINARY),
        Prompt("What now", "ordinary", "a", Kind.ORDINARY),
        Prompt("Why", "refusal", "b", Kind.POSITIVE, answer="No."),
    ]
    found = encode(texts)
    assert found.shared_prefix == found.skip_first == len("[sys]You help.[/sys][u]")
    assert found.generation_prompt == "[/][a]"
    assert Tokenizer().decode(found.ids[2]).endswith("[a]No.")  # the mark behind an answer is never run
    assert found.last(2) == len(found.ids[2]) - found.skip_first - 1


def test_what_is_too_long_is_left_out_and_counted():
    texts = [Prompt("x" * n, "ordinary", "a", Kind.ORDINARY) for n in (20, 300)]
    found = encode(texts)
    assert (len(found.prompts), found.too_long) == (1, 1)


def test_a_model_without_a_chat_template_is_refused_with_what_to_do():
    base = Tokenizer()
    base.chat_template = None
    texts = [Prompt("Hello", "ordinary", "a", Kind.ORDINARY), Prompt("Why", "ordinary", "a", Kind.ORDINARY)]
    with pytest.raises(WatchlistRefused, match=r"no chat template, so it is a base model.*--plain-text"):
        encode(texts, base)
    assert encode(texts, base, plain=True).ids[0] == tuple(map(ord, "Hello"))


def test_a_model_that_is_too_large_is_refused_before_it_is_loaded(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"0" * 4000)
    meminfo = "MemTotal: 100 kB\nMemAvailable: 5 kB\n"
    plan.check_memory(str(tmp_path), "bfloat16", "bfloat16", meminfo, has_gpu=False)
    with pytest.raises(WatchlistRefused, match=r"0\.0 GB in float32"):
        plan.check_memory(str(tmp_path), "float32", "bfloat16", meminfo, has_gpu=False)
    plan.check_memory(str(tmp_path), "float32", "bfloat16", meminfo, has_gpu=True)


def test_a_name_that_is_nowhere_is_refused_with_a_word_on_the_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WatchlistRefused, match="Without a network only what is in its cache"):
        plan.sizes("nobody/no-such-model")


@pytest.mark.parametrize(("count", "layers"), [(30, (8, 13, 17, 21, 26)), (4, (0, 1, 2, 3)), (1, (0,))])
def test_the_default_layers_spread_over_the_depth(count, layers):
    assert plan.default_layers(count) == layers


def test_a_run_without_public_sets_has_every_part_of_every_concern():
    texts, _ = chosen.prompts(["refusal"])
    assert {(p.part, p.kind) for p in texts if p.concern == "refusal"} >= {
        (part, kind) for part in Part for kind in (Kind.POSITIVE, Kind.HARD)
    }


def test_a_part_with_too_few_texts_is_refused_by_name():
    texts = [p for p in prompts() if not (p.kind is Kind.HARD and p.part is Part.SELECTION)]
    with pytest.raises(WatchlistRefused, match="0 hard texts of selection families fit"):
        split(texts, "toxicity")
