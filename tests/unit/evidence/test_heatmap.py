"""What a person sees of a request: tokens with their scores, and nothing that a token could do."""

from __future__ import annotations

import dataclasses
import re

import pytest
from latentwatch.evidence import heatmap
from latentwatch.evidence.archive import Archive, StoredActivations
from latentwatch.watchlist.file import Limit

from tests.support.evidence import NOW, one_request, store
from tests.support.streams import sparse

HOSTILE = ["hello", " \x1b[2J", "\n", "<script>alert(1)</script>", "\u202eevil", "é", "'onmouseover='x"]


@pytest.fixture
def request_found(tmp_path):
    with store(tmp_path) as written:
        written.write(one_request(1, activations=7), NOW)
    return Archive(tmp_path).find("chatcmpl-made-000000000001")[0]


def activations(**changes):
    fields = {
        "feature": "f", "label": "F", "severity": "warning", "units": "activation", "limit": 4.0, "dense": False,
        "positions": [1, 3], "values": [8.0, 2.0],
    }  # fmt: skip
    return StoredActivations(**{**fields, **changes})


def described(limit, **changes):
    return dataclasses.replace(sparse("f"), limit=limit, **changes)


def test_heat_is_the_share_of_the_largest_score_or_of_the_limit():
    assert [cell.heat for cell in heatmap.cells(activations(), ["a", "b", "c", "d"])] == [0, 1.0, 0, 0.25]
    below = heatmap.cells(activations(values=[2.0, -1.0]), ["a", "b", "c", "d"])
    assert [cell.heat for cell in below] == [0, 0.5, 0, 0]
    assert [cell.value for cell in below] == [None, 2.0, None, -1.0]


def test_the_first_token_and_what_the_limit_does_not_count_set_no_scale():
    sink = activations(positions=[0, 1, 3], values=[800.0, 4.0, 8.0])
    assert [cell.heat for cell in heatmap.cells(sink, "abcd")] == [1.0, 0.5, 0, 1.0]
    made = heatmap.cells(sink, "abcd", 3, described(Limit("max", 4.0, phase="prompt"), skip_first_positions=1))
    assert [cell.heat for cell in made] == [1.0, 1.0, 0, 1.0], "position 3 is output"
    assert [cell.counted for cell in made] == [False, True, True, False]
    assert not any(cell.over for cell in made)


def test_a_mean_is_of_the_window_that_ends_at_the_token_and_lies_in_tokens_that_count():
    mean = described(Limit("rolling_mean", 4.0, window_tokens=2, phase="output"))
    made = heatmap.cells(activations(positions=[1, 2, 3], values=[9.0, 3.0, 6.0]), "abcde", 2, mean)
    assert [cell.statistic for cell in made] == [None, None, None, 4.5, 3.0]
    assert [cell.over for cell in made] == [False, False, False, True, False]
    gap = heatmap.cells(activations(dense=True, positions=[2, 4], values=[9.0, 9.0]), "abcde", 2, mean)
    assert [cell.statistic for cell in gap] == [None] * 5, "a token of a dense feature that was not seen"


def test_the_page_has_a_legend_and_says_what_the_limit_is_on(request_found):
    page = heatmap.as_html(request_found, HOSTILE)
    assert "above the limit" in page and "not counted by the limit" in page
    assert "With --watchlist FILE" in page and re.search(r"title='token \d+ \((prompt|output)\): [\d.]+", page)


def test_without_tokens_only_the_positions_that_have_a_score_are_shown():
    assert [cell.text for cell in heatmap.cells(activations(), ())] == ["[1]", "[3]"]


def test_positions_beyond_the_tokens_are_shown_by_number():
    assert [cell.text for cell in heatmap.cells(activations(), ["a", "b"])] == ["a", "b", "[3]"]


def test_no_token_reaches_the_terminal_with_a_control_character(request_found):
    text = heatmap.as_text(request_found, HOSTILE, colour=True)
    assert set(re.findall(r"\x1b\[[0-9;]*[a-zA-Z]", text)) <= {"\x1b[0m"} | {
        f"\x1b[30;48;5;{c}m" for c in heatmap._RAMP
    }
    assert "\u202e" not in text and "\\u{1b}[2J" in text
    assert "\x1b" not in heatmap.as_text(request_found, HOSTILE, colour=False)


def test_no_token_reaches_the_page_as_markup(request_found):
    page = heatmap.as_html(request_found, HOSTILE)
    assert "<script" not in page and "&lt;script&gt;" in page and "'onmouseover='" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_exceeded_features_come_first_and_others_on_demand(request_found):
    shown = heatmap.as_text(request_found, (), colour=False)
    assert "jailbreak" in shown and "in activation)" in shown and "mood" not in shown
    assert "mood" in heatmap.as_text(request_found, (), colour=False, feature="mood")
    assert "No activations" in heatmap.as_text(request_found, (), colour=False, feature="weather")
