"""The text itself: negotiation, quoting, numbers, exemplars, and the cost of a scrape."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentwatch.collector.core import Core
from latentwatch.collector.metrics_families import Families
from latentwatch.collector.process_facts import ProcessFacts
from latentwatch.export.families import ExemplarLine, Family
from latentwatch.export.metrics import Metric
from latentwatch.export.prometheus import OPEN_METRICS, TEXT, negotiate, render
from latentwatch.watchlist.file import Limit
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.support.streams import hello, probe, sparse, watchlist

COUNTER = Metric("latentwatch_things_total", "counter", ("name",), "Things.")
GAUGE = Metric("latentwatch_at", "gauge", ("name",), "Where it is.")
HISTOGRAM = Metric("latentwatch_size", "histogram", ("name",), "Sizes.")


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", TEXT),
        ("*/*", TEXT),
        ("text/html", TEXT),
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", OPEN_METRICS),
        ("text/plain;q=0.5, application/openmetrics-text; version=1.0.0; q=0.9", OPEN_METRICS),
        ("application/openmetrics-text;q=0,text/plain", TEXT),
        ("application/openmetrics-textual", TEXT),
    ],
)
def test_openmetrics_is_sent_to_those_who_ask_for_it(accept, content_type):
    assert negotiate(accept) == (content_type, content_type == OPEN_METRICS)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n"), max_size=30))
def test_any_label_value_comes_back_from_both_formats(value):
    family = Family(COUNTER, ((value,),), [7])
    for open_metrics, parse in ((False, parse_text), (True, parse_open_metrics)):
        text = render([family], open_metrics=open_metrics).decode()
        (parsed,) = parse(text)
        assert [(s.labels, s.value) for s in parsed.samples] == [({"name": value}, 7.0)]


def test_a_label_that_is_no_unicode_does_not_break_the_page():
    """JSON can spell half a surrogate pair, and a watchlist's label comes from JSON."""
    for open_metrics, parse in ((False, parse_text), (True, parse_open_metrics)):
        (parsed,) = parse(render([Family(COUNTER, (("a\ud800",),), [7])], open_metrics=open_metrics).decode())
        assert [s.labels for s in parsed.samples] == [{"name": "a?"}]


@pytest.mark.parametrize("value", [0, 2.5, 1e-300, 1e300, 10**15, 1700000000.25, -3.0, math.inf, -math.inf, math.nan])
def test_any_value_comes_back_from_both_formats(value):
    for open_metrics, parse in ((False, parse_text), (True, parse_open_metrics)):
        (parsed,) = parse(render([Family(GAUGE, (("a",),), [value])], open_metrics=open_metrics).decode())
        np.testing.assert_equal([s.value for s in parsed.samples], [float(value)])


@pytest.mark.parametrize(
    "family",
    [
        Family(COUNTER, (("a",),), []),
        Family(COUNTER, (("a", "b"),), [1]),
        Family(COUNTER, ((),), [1]),
        Family(HISTOGRAM, (("a",),), edges_SB=np.ones((1, 2)), cumulative_SB=np.ones((1, 2)), sum_S=[0.0]),
    ],
)
def test_a_series_without_its_value_or_label_is_never_shown_as_another(family):
    with pytest.raises((ValueError, AssertionError)):
        render([family], open_metrics=False)


def test_no_line_has_a_time_of_its_own_or_says_when_it_began():
    """Prometheus gives a sample the time of its scrape; with one of its own, a series that stops is not marked so."""
    for open_metrics in (False, True):
        families = parse_open_metrics if open_metrics else parse_text
        page = render([Family(COUNTER, (("a",),), [1]), Family(GAUGE, (("a",),), [1])], open_metrics=open_metrics)
        samples = [sample for family in families(page.decode()) for sample in family.samples]
        assert [(s.name, s.timestamp) for s in samples] == [
            ("latentwatch_things_total", None),
            ("latentwatch_at", None),
        ]


def test_an_exemplar_stands_on_its_own_series_and_only_in_openmetrics():
    exemplar = ExemplarLine((("request_id", "cmpl-a/b.c"), ("trace_id", "f" * 32)), 0.5, 1700000000.25)
    family = Family(COUNTER, (("a",), ("b",)), [1, 2], exemplars={1: exemplar})
    (parsed,) = parse_open_metrics(render([family], open_metrics=True).decode())
    first, second = parsed.samples
    assert first.exemplar is None
    assert second.exemplar.labels == {"request_id": "cmpl-a/b.c", "trace_id": "f" * 32}
    assert second.exemplar.value == 0.5 and float(second.exemplar.timestamp) == 1700000000.25
    assert b" # {" not in render([family], open_metrics=False)


@pytest.mark.parametrize("id", ['a"b', "a\\b", "a\nb", "a} # {b", "", "ü"])
def test_an_id_that_a_client_made_up_to_break_a_parser_stays_out_of_the_exemplar(id):
    exemplar = ExemplarLine((("request_id", id), ("trace_id", "f" * 32)), 1.0, 1.0)
    text = render([Family(COUNTER, (("a",),), [1], exemplars={0: exemplar})], open_metrics=True).decode()
    (parsed,) = parse_open_metrics(text)
    assert parsed.samples[0].exemplar.labels == {"trace_id": "f" * 32}


@pytest.mark.parametrize(("length", "kept"), [(118, True), (119, False)])
def test_an_exemplar_keeps_within_the_128_characters_of_the_standard(length, kept):
    exemplar = ExemplarLine((("request_id", "x" * length),), 1.0, 1.0)
    text = render([Family(COUNTER, (("a",),), [1], exemplars={0: exemplar})], open_metrics=True).decode()
    (parsed,) = parse_open_metrics(text)
    assert bool(parsed.samples[0].exemplar.labels) is kept


def test_histograms_show_cumulative_buckets_and_a_sum_only_without_negative_bounds():
    family = Family(
        HISTOGRAM,
        (("a",), ("b",)),
        edges_SB=np.array([[0.5, 1.0], [-1.0, 1.0]]),
        cumulative_SB=np.array([[1, 2, 3], [4, 5, 6]]),
        sum_S=[3.5, -2.0],
    )
    (parsed,) = parse_open_metrics(render([family], open_metrics=True).decode())
    by_name = {
        (s.labels["name"], s.name.removeprefix("latentwatch_size"), s.labels.get("le")): s.value for s in parsed.samples
    }
    assert by_name == {
        ("a", "_bucket", "0.5"): 1,
        ("a", "_bucket", "1.0"): 2,
        ("a", "_bucket", "+Inf"): 3,
        ("a", "_count", None): 3,
        ("a", "_sum", None): 3.5,
        ("b", "_bucket", "-1.0"): 4,
        ("b", "_bucket", "1.0"): 5,
        ("b", "_bucket", "+Inf"): 6,
    }


def test_a_family_without_series_still_says_that_it_exists():
    text = render([Family(COUNTER, ())], open_metrics=False).decode()
    assert text == "# HELP latentwatch_things_total Things.\n# TYPE latentwatch_things_total counter\n"


def test_openmetrics_ends_with_its_mark_and_text_has_none():
    assert render([], open_metrics=True) == b"# EOF\n" and render([], open_metrics=False) == b""


def test_a_scrape_of_1024_features_costs_the_loop_next_to_nothing():
    """Target 2 ms in the loop and 0.2 s in the thread, of one core each; the bounds leave room for a loaded machine."""
    limit = Limit("max", 5.0)
    features = [sparse(f"f{i}", limit=limit) if i % 16 else probe(f"p{i}", limit=limit) for i in range(1024)]
    made = Core(watchlist(features, hooks=4))
    made.ingest.hello(hello(), 0.0)
    families = Families(made.watchlist)
    loop, thread = [], []
    for _ in range(5):
        start = time.process_time()
        lazy = families.of(made.lookup.snapshot(0.0), ProcessFacts(0.0, 0, 0.0))
        handed_over = time.process_time()
        page = render(lazy, open_metrics=True)
        loop.append(handed_over - start)
        thread.append(time.process_time() - handed_over)
    assert page.count(b"\n") > 18_000
    assert sorted(loop)[2] < 0.010 and sorted(thread)[2] < 1.0
