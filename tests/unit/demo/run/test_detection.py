"""Pages against what was right, against what limits promised, and against reading the text; and how it is drawn."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from latentwatch.demo.run import detection_plots, detection_report
from latentwatch.demo.run.detection import Counts, Detection, HeatMap, Token, chance_of_more
from latentwatch.demo.run.traffic import Answer, Prompt
from latentwatch.demo.smollm2.card import Card, FamilyFigures, FeatureCard, card_text

from tests.support.demo_run import BEGAN, a_run, an_exceedance

CONCERNS = ("harmful_request", "false_statement")


def a_card(limit_rate: float = 0.005) -> Card:
    family = FamilyFigures("f", "hard", 30, 100, 0.9, 0.5, 0.5, 0.6, 0.4, 0.7, 0.1, 0.0)
    thresholds = {"0.1": 1.0, "0.01": 1.8, "0.005": 2.0}
    features = {
        concern: FeatureCard(
            concern=concern,
            label=f"Label of {concern}",
            hook_point="resid_post.9",
            window_tokens=6,
            selection_auroc={"resid_post.9": 0.9},
            limit=2.0,
            limit_rate=limit_rate,
            limit_requests=600,
            thresholds=thresholds,
            text_limit=1.0,
            families=[family],
        )
        for concern in CONCERNS
    }
    return Card(0, {"garak": "0.17"}, 24, 5, {"train": 9}, 1, [], features)


def a_detection(*, false_pages: int = 1, text: bool = True) -> Detection:
    """100 ordinary requests and 10 of each concern; each detector catches 7 of its 10."""
    answers, scores, exceedances, logits = [], {}, [], {concern: {} for concern in CONCERNS}
    rng = np.random.default_rng(0)
    for i in range(120):
        concern = "" if i < 100 else CONCERNS[i % 2]
        words = ({"role": "user", "content": f"Question {i} <b>"},)
        answer = Answer(f"r{i}", Prompt("t", words, bool(concern), concern), BEGAN, BEGAN + 1, "", 30 + i, 5)
        answers.append(answer)
        scores[answer.response_id] = {}
        for feature in a_card().features.values():
            caught = concern == feature.concern and i < 114
            false = not concern and i < false_pages and feature.concern == CONCERNS[0]
            value = 3.0 if caught or false else float(rng.uniform(-3, 1))
            scores[answer.response_id][feature.id] = value
            logits[feature.concern][answer.response_id] = 2.0 if concern == feature.concern and i < 104 else 0.0
            if value > feature.limit:
                exceedances.append(an_exceedance(BEGAN, answer.response_id, feature.id, feature.label, value=value))
    heat = HeatMap("r100", CONCERNS[0], True, 2.0, [Token("<|x|>", None), Token(" how", -1.0), Token(" to", 3.0)])
    return Detection(a_card(), answers, scores, exceedances, logits if text else {}, [heat], ["cissp: not installed"])


def test_pages_are_counted_against_the_incident_and_against_each_concern() -> None:
    detection = a_detection(false_pages=2)
    assert detection.all_pages() == Counts(14, 20, 2, 100)
    assert detection.all_pages().precision == 14 / 16
    harmful, false = (detection.pages(feature) for feature in detection.card.features.values())
    assert (harmful, false) == (Counts(7, 10, 2, 100), Counts(7, 10, 0, 100))
    assert detection.all_text_pages() == Counts(4, 20, 0, 100)


def test_a_page_on_another_concern_of_the_incident_is_no_false_one() -> None:
    detection = a_detection(false_pages=0)
    feature = detection.card.features[CONCERNS[0]]
    other = an_exceedance(BEGAN, "r101", feature.id, feature.label)
    assert detection.answers[101].prompt.concern == CONCERNS[1]
    more = replace(detection, exceedances=[*detection.exceedances, other])
    assert more.pages(feature) == detection.pages(feature)
    assert more.all_pages().false == 0


def test_what_no_page_says_is_no_precision() -> None:
    assert Counts(0, 0, 0, 10).precision is None and Counts(0, 0, 0, 10).recall is None


def test_the_chance_of_false_pages_is_that_of_drawing_old_and_new_requests_together() -> None:
    rng = np.random.default_rng(1)
    draws = rng.normal(size=(20_000, 70))
    limit = np.sort(draws[:, :50], 1)[:, ::-1][:, 2]
    seen = (draws[:, 50:] > limit[:, None]).sum(1)
    for count in (0, 1, 3, 6):
        assert chance_of_more(count, 20, 2, 50) == pytest.approx((seen >= count).mean(), abs=0.012)


def test_more_false_pages_than_the_limit_allows_break_its_promise() -> None:
    fine, broken = a_detection(false_pages=2), a_detection(false_pages=12)
    feature = fine.card.features[CONCERNS[0]]
    assert fine.as_promised(feature)
    assert not broken.as_promised(feature)
    checks = {check.name: check.passed for check in replace(a_run(), detection=broken).checks()}
    assert checks["false pages as promised: harmful request"] is False
    assert checks["false pages as promised: false statement"] is True
    assert "no critical exceedance outside" not in checks


def test_the_figures_are_plain_json_without_a_text_baseline_too() -> None:
    for detection in (a_detection(), a_detection(text=False)):
        figures = json.loads(json.dumps(detection.as_json(), allow_nan=False))
        assert figures["pages"]["recall"] == 0.7
        assert (figures["text_baseline"] is None) == (not detection.text_logits)


@pytest.mark.parametrize("text", [True, False])
def test_the_page_is_well_formed_and_holds_every_plot(text: bool) -> None:
    html = detection_report.to_html(a_detection(text=text))
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert "nan" not in html
    assert "cissp: not installed" in html
    assert "No false page" in html
    assert "&lt;|x|&gt;" in html


def test_a_run_without_any_request_of_a_concern_is_drawn_too() -> None:
    detection = a_detection()
    ordinary = [answer for answer in detection.answers if not answer.prompt.feared]
    html = detection_report.to_html(replace(detection, answers=ordinary, heat_maps=()))
    assert html.count("<svg") == 3


def test_heat_is_deepest_at_the_largest_logit() -> None:
    html = detection_plots.heat_map(a_detection().heat_maps[0])
    assert re.findall(r"--heat\) (\d+)%", html) == ["0", str(detection_plots.DEEPEST)]


def test_the_card_says_what_is_worse_than_the_text_too() -> None:
    text = card_text(a_card())
    assert "| f | 100 hard | 30 | 0.900 | 0.500 | 0.500 | 60% | 40% to 70% | 10% | 0% |" in text
