"""The table of metrics against /metrics itself, as Prometheus' own parsers read it, and against naming conventions."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from latentwatch.collector.core import Core
from latentwatch.collector.drift import DriftSettings
from latentwatch.collector.metrics_families import Families
from latentwatch.collector.process_facts import ProcessFacts
from latentwatch.export.metrics import METRICS, Metric, sample_names
from latentwatch.export.prometheus import render
from latentwatch.names import Severity
from latentwatch.watchlist.file import Limit
from prometheus_client.openmetrics import parser as open_metrics_parser
from prometheus_client.parser import text_string_to_metric_families

from tests.support.drift import random_baseline
from tests.support.streams import Schedule, hello, probe, received, sparse, tokens, watchlist

FEATURES = (
    sparse("jailbreak", limit=Limit("max", 1.0), severity=Severity.CRITICAL, label='says "yes" \\ to\nall 100 % of %s'),
    sparse("weather"),
    probe("deceive", limit=Limit("rolling_mean", 0.2, 4)),
    probe("mood"),
)


@pytest.fixture(scope="module")
def made() -> Core:
    """A collector with two models, two engines, every kind of feature, and something in every counter it can have."""
    drift = DriftSettings(dataclasses.replace(random_baseline(FEATURES, share=0.9), created_seconds=1e9))
    core = Core(watchlist(FEATURES, hooks=2), drift=drift)
    rng = np.random.default_rng(0)
    for i, model in enumerate(("toy", 'model "%d"')):
        who = hello(replica=f"pod-{i}/0", model_name=model)
        core.ingest.hello(who, 1000.0)
        requests = [tokens(rng, FEATURES, handle=h, total=30, prompt_tokens=10, hooks=2) for h in range(1, 6)]
        requests[0].request_id = 'chatcmpl-"evil\n\\id"-0123abcd'
        for sequence, batch in enumerate(Schedule.random(rng, requests, 9).batches(FEATURES, hooks=2), start=1):
            core.ingest.observe(who, received(sequence, batch), 1000.0 + sequence)
    core.ingest.hello(hello(replica="blind", armed=False, not_armed_reason="watchlist_width"), 1000.0)
    core.ingest.hello(hello(replica="sidecar", engine="", model_name="", forwards=True), 1000.0)
    core.ingest.refused("watchlist_mismatch")
    core.ingest.tick(1200.0)
    return core


def page(made: Core, *, open_metrics: bool) -> str:
    families = Families(made.watchlist).of(made.lookup.snapshot(2000.0), ProcessFacts(900.0, 1 << 20, 1.5))
    return render(families, open_metrics=open_metrics).decode()


def parse(text: str, *, open_metrics: bool):
    read = open_metrics_parser.text_string_to_metric_families if open_metrics else text_string_to_metric_families
    return {family.name: family for family in read(text)}


@pytest.mark.parametrize("open_metrics", [False, True], ids=["text", "openmetrics"])
def test_the_exposition_is_the_table_and_nothing_else(made, open_metrics):
    families = parse(page(made, open_metrics=open_metrics), open_metrics=open_metrics)
    table = {parsed_name(metric, open_metrics): metric for metric in METRICS}
    assert set(families) == set(table)
    for name, metric in table.items():
        family = families[name]
        assert family.documentation == metric.help
        assert family.type == ("gauge" if metric.kind == "info" and not open_metrics else metric.kind)
        for sample in family.samples:
            assert sample.name in metric.samples
            assert sample.labels.keys() - {"le"} == set(metric.labels)
            assert ("le" in sample.labels) == sample.name.endswith("_bucket")
            if metric.buckets and sample.name.endswith("_bucket"):
                assert float(sample.labels["le"]) in (*metric.buckets, np.inf)


def parsed_name(metric: Metric, open_metrics: bool) -> str:
    """prometheus_client names a family of the text format without `_total` too, but keeps `_info`."""
    return metric.family if open_metrics or metric.kind == "counter" else metric.name


def test_every_metric_shows_at_least_one_sample_once_engines_stream(made):
    """But for those that only a collector with --forward-to has, which forwards and is forwarded to by none."""
    families = parse(page(made, open_metrics=True), open_metrics=True)
    silent = {name for name, family in families.items() if not family.samples}
    forwards = Core(watchlist(FEATURES), forward_boot_id="f" * 32)
    shown = parse(page(forwards, open_metrics=True), open_metrics=True)
    assert silent == {name for name in shown if name.startswith("latentwatch_forward_")}
    assert all(shown[name].samples for name in silent)


def test_every_bounded_stage_shows_how_much_it_holds_of_what_it_may(made):
    families = parse(page(made, open_metrics=True), open_metrics=True)
    depth, capacity = (
        {sample.labels["stage"]: sample.value for sample in families[f"latentwatch_stage_{name}"].samples}
        for name in ("depth", "capacity")
    )
    assert depth.keys() == capacity.keys() >= {"streams", "merge_queue_messages", "replicas", "open_requests"}
    assert all(depth[stage] <= capacity[stage] or not capacity[stage] for stage in depth)
    assert (depth["replicas"], capacity["replicas"]) == (4, made.bounds.replicas)
    assert (depth["open_requests"], capacity["open_requests"]) == (0, made.bounds.open_requests)


def test_both_formats_show_the_same_numbers(made):
    shown = [
        {
            (s.name, tuple(s.labels.items())): s.value
            for f in parse(page(made, open_metrics=o), open_metrics=o).values()
            for s in f.samples
        }
        for o in (False, True)
    ]
    assert shown[0] == shown[1] and len(shown[0]) > 200


def test_hostile_text_comes_back_as_it_went_in(made):
    families = parse(page(made, open_metrics=True), open_metrics=True)
    assert families["latentwatch_feature"].samples[0].labels["label"] == FEATURES[0].label
    assert {s.labels["model_name"] for s in families["latentwatch_requests"].samples} == {"toy", 'model "%d"'}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric):
    assert re.fullmatch(r"(latentwatch|process)_[a-z0-9]+(_[a-z0-9]+)*", metric.name)
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    assert (metric.kind == "info") == metric.name.endswith("_info")
    assert not re.search(r"(milli|micro|nano|_ms$|_kb$|_percent|_rate$)", metric.name), "base units, and no rates"
    assert not metric.name.endswith(("_count", "_sum", "_bucket"))
    assert metric.help.endswith(".") and metric.help[0].isupper() and "  " not in metric.help
    assert len(set(metric.labels)) == len(metric.labels) and "le" not in metric.labels
    assert not {"request_id", "job", "instance", "cluster"} & set(metric.labels)


def test_names_are_unique_down_to_their_samples():
    assert len(sample_names()) == sum(len(metric.samples) for metric in METRICS)


def test_every_feature_with_a_limit_has_its_exceedances_at_zero_before_the_first():
    """increase() over a series that is born at 1 is 0: the first exceedance would page nobody."""
    core = Core(watchlist(FEATURES, hooks=2))
    core.ingest.hello(hello(), 1000.0)
    families = parse(page(core, open_metrics=False), open_metrics=False)
    samples = families["latentwatch_exceedances"].samples
    assert [(s.labels["feature"], s.labels["severity"], s.value) for s in samples] == [
        ("jailbreak", "critical", 0.0),
        ("deceive", "critical", 0.0),
    ]
    tokens_at_zero = families["latentwatch_tokens"].samples
    assert {(s.labels["state"], s.labels["reason"]) for s in tokens_at_zero} >= {
        ("scored", "none"),
        ("dropped", "lost"),
    }


def test_an_exceedance_leads_to_its_request_by_an_exemplar(made):
    samples = parse(page(made, open_metrics=True), open_metrics=True)["latentwatch_exceedances"].samples
    exemplars = [s.exemplar for s in samples if s.value and s.exemplar.labels]
    assert exemplars and all(made.lookup.find(e.labels["request_id"]) for e in exemplars)
    assert "#" not in re.sub(r"(?m)^# (HELP|TYPE) .*$", "", page(made, open_metrics=False))


def test_a_request_id_too_long_for_an_exemplar_is_left_out_whole():
    core = Core(watchlist(FEATURES, hooks=2))
    core.ingest.hello(hello(), 1000.0)
    rng = np.random.default_rng(0)
    request = tokens(rng, FEATURES, handle=1, total=30, prompt_tokens=10, hooks=2, unseen_share=0)
    request.request_id = "x" * 200
    for batch in Schedule.one_step([request]).batches(FEATURES, hooks=2):
        core.ingest.observe(hello(), received(1, batch), 1000.0)
    samples = parse(page(core, open_metrics=True), open_metrics=True)["latentwatch_exceedances"].samples
    assert [s.exemplar.labels for s in samples if s.value] == [{}] * 2


def test_histograms_of_signed_scores_have_buckets_around_the_limit_and_no_sum(made):
    families = parse(page(made, open_metrics=True), open_metrics=True)
    samples = [s for s in families["latentwatch_feature_request_max"].samples if s.labels["feature"] == "deceive"]
    assert {s.name for s in samples} == {"latentwatch_feature_request_max_bucket"}
    assert "0.2" in {s.labels["le"] for s in samples}, "the share of requests above the limit is exact"


def test_a_bound_on_the_samples_of_features_says_what_it_withheld_and_spares_the_rest(made):
    def shown(bound: int) -> tuple[int, int, int]:
        families = list(
            Families(made.watchlist, bound).of(made.lookup.snapshot(2000.0), ProcessFacts(900.0, 1 << 20, 1.5))
        )
        parse(render(families, open_metrics=True).decode(), open_metrics=True)
        (withheld,) = (f.values[0] for f in families if f.metric.name == "latentwatch_series_withheld")
        mine = sum(f.samples for f in families if "feature" in f.metric.labels)
        return mine, int(withheld), sum(f.samples for f in families if "feature" not in f.metric.labels)

    whole, none, others = shown(10**9)
    assert none == 0 and whole > 50
    for bound in (0, 1, whole // 2, whole - 1):
        mine, withheld, spared = shown(bound)
        assert mine <= bound and mine + withheld == whole and spared == others
