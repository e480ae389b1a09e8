"""The page of cards: everything that is known stands on it, and nothing on it comes alive."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist import page
from latentwatch.watchlist.build import build

from tests.support.sources import document, hook, saelens, source, write_yaml

EVIDENCE: dict[str, Any] = {
    "auroc": 0.9713,
    "tpr_at_fpr_1pct": 0.62,
    "n": 1500,
    "n_positive": 76,
    "split": "held-out templates",
    "base_rate": 0.0123,
    "quantiles": {"p50": 1.5, "max": 9.25},
    "histogram": {"edges": [0, 2, 4, 10], "counts": [50, 20, 3]},
    "top_tokens": [{"token": "secretly", "before": "it ", "after": " copies", "activation": 9.25}],
    "confounds": ["fiction", "role play", "news", "law", "medicine", "history"],
}


@pytest.fixture
def watchlist(tmp_path: Path) -> watchlist_file.Watchlist:
    saelens(tmp_path / "sae")
    limit = {"statistic": "max", "value": 4.0}
    feature = {"index": 3, "id": "deceives", "label": "deceives", "severity": "critical", "limit": limit}
    content = document(hook(2, source("saelens", "sae", [feature | {"evidence": EVIDENCE}, 4], licence="MIT")))
    return build(write_yaml(tmp_path / "w.yaml", content), tmp_path / "out.safetensors")


def test_a_card_shows_the_figures_with_n_and_split_and_where_the_row_came_from(
    watchlist: watchlist_file.Watchlist,
) -> None:
    text = page.as_html(watchlist)
    for shown in (
        "0.9713",
        "1500, 76 with the behaviour",
        "held-out templates",
        "0.0123",
        "p50 1.5, max 9.25",
        "fiction; role play; news; law; and 2 more, below",
        "fiction; role play; news; law; medicine; history",
        "<mark>secretly</mark>",
        "max &gt; 4",
        "MIT",
        "fires where the published SAE fires",
        watchlist.features[0].source["sha256"]["sae_weights.safetensors"],
        watchlist.sha256,
    ):
        assert shown in text, shown
    assert text.count("<rect") == 3
    assert text.count("<article") == 2


def test_text_from_a_file_never_becomes_markup(watchlist: watchlist_file.Watchlist) -> None:
    """Labels and tokens come from models and strangers' lists, and the page is opened by people with access."""
    evil = "<script>alert(1)</script>\"'<img src=x onerror=alert(2)>"
    (rows,) = watchlist.hooks
    changed = dataclasses.replace(
        rows.features[0],
        label=evil,
        units=evil,
        source={evil: {evil: evil}},
        evidence=EVIDENCE | {"confounds": [evil], "remarks": evil, "top_tokens": [{"token": evil, "activation": 1.0}]},
    )
    hooks = (dataclasses.replace(rows, features=(changed, rows.features[1])),)
    text = page.as_html(dataclasses.replace(watchlist, name=evil, notes=evil, hooks=hooks))
    assert len(re.findall("<script", text)) == 1, "the page's own"
    assert "<img" not in text
    assert "onerror=alert(2)>" not in text.replace("onerror=alert(2)&gt;", "")


@pytest.mark.parametrize("histogram", [{"edges": [1, 1], "counts": [5]}, {"edges": [0, 1, 2], "counts": [0, 0]}, None])
def test_an_empty_histogram_is_left_out(histogram: Any) -> None:
    assert page._histogram(histogram, None) == ""


def test_the_page_needs_nothing_from_elsewhere(watchlist: watchlist_file.Watchlist) -> None:
    assert not re.search(r"(src|href)\s*=|@import|url\(", page.as_html(watchlist))
