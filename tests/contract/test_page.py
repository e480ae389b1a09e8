"""The live page in a real browser: what it says, and what it makes of a client's text."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from latentwatch.collector.evidence import EvidenceSettings
from latentwatch.collector.service import Service

from tests.support.browser import browser
from tests.support.collectors import FEATURES, collector, exceed
from tests.support.programs import program
from tests.support.streams import sparse

EVIL = "chatcmpl-<img src=x onerror=\"document.title='taken'\">-0123abcd"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with collector(tmp_path) as made:
        yield made


def browse(url: str, profile: Path, *more: str) -> str:
    """What a headless browser prints of the page after its scripts ran for three seconds."""
    argv = [
        program("chromium"),
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--user-data-dir={profile}",
        "--virtual-time-budget=3000",
        *more,
        url,
    ]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def text_of(url: str, profile: Path) -> tuple[str, str]:
    """The page's markup, and the text in it."""
    markup = browse(url, profile, "--dump-dom")
    return markup, re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", markup))


@pytest.mark.e2e
def test_before_any_engine_connects_the_page_says_what_it_waits_for(service, tmp_path):
    _, text = text_of(service.http_url + "/", tmp_path / "profile")
    assert "Waiting for an engine" in text and "Nothing to judge yet" in text
    assert "No request has gone above a limit" in text and "does not answer" not in text


@pytest.mark.e2e
def test_an_exceedance_shows_with_its_request_and_values(service, tmp_path):
    exceed(service)
    markup, text = text_of(service.http_url + "/", tmp_path / "profile")
    assert "1 critical exceedance" in text and "Everything is seen" in text
    assert "5.00 over limit 1.00, from token 2 (output)" in text
    assert "chatcmpl-1-0123abcd" in text and "<title>✕ 1 critical exceedance" in markup


@pytest.mark.e2e
def test_text_of_clients_and_labels_stays_text(service, tmp_path):
    exceed(service, EVIL)
    markup, text = text_of(f"{service.http_url}/#request={quote(EVIL, safe='')}", tmp_path / "profile")
    assert "&lt;img src=x onerror=" in markup and "<img" not in markup
    assert "Complying &lt;b&gt;with&lt;/b&gt; a jailbreak" in markup
    assert "taken" not in re.findall(r"<title>(.*?)</title>", markup)[0]
    assert "Id in the response" in text and "Limits exceeded" in text, "the request itself is shown"


@pytest.mark.e2e
def test_a_feature_has_a_view_of_its_own_with_its_requests(service, tmp_path):
    exceed(service)
    _, text = text_of(f"{service.http_url}/#feature=jailbreak", tmp_path / "profile")
    assert "resid_post.0, sae" in text and "1.00 on the largest value" in text
    assert "Latest requests over the limit chatcmpl-1-0123abcd 5.00, from token 2 (output)" in text


@pytest.mark.e2e
def test_drift_is_ranked_and_the_page_says_what_was_measured(service, tmp_path):
    exceed(service)
    _, text = text_of(service.http_url + "/", tmp_path / "profile")
    assert re.search(r"Drift from the baseline None above its limit in 1 windows\. .* Complying &lt;b&gt;", text)


@pytest.mark.e2e
def test_a_collector_that_writes_evidence_shows_a_request_token_by_token(tmp_path):
    with collector(tmp_path, evidence=EvidenceSettings(tmp_path / "evidence")) as made:
        exceed(made)
        markup, text = text_of(f"{made.http_url}/#request=chatcmpl-1-0123abcd", tmp_path / "profile")
    assert "Token by token" in text and "One column a token, 4 in all" in text
    (cell,) = re.findall(r'<rect class="cell over" x="(\d+)"', markup)
    assert cell == "2" and "token 2: 5.00" in markup


@pytest.mark.e2e
def test_many_features_are_paged_and_searched_with_the_keyboard(tmp_path):
    """The browser holds one page of them, whatever the watchlist's size."""
    features = (*FEATURES, *(sparse(f"l1.f{i}", label=f"Topic {i}") for i in range(98)))
    rows = "document.querySelectorAll('#features tr').length"
    note = "document.querySelector('#features-note').textContent"
    with collector(tmp_path, features) as made, browser(tmp_path / "profile") as (tab, _):
        exceed(made, features=features)
        tab.open(made.http_url + "/")
        tab.until(f"{note} === '1 to 48 of 100, the most abnormal first'")
        for said, shown in (("49 to 96 of 100", 48), ("97 to 100 of 100", 4)):
            tab.run("document.querySelector('#later').focus()")
            tab.press("Enter")
            tab.until(f"{note}.startsWith('{said}') && {rows} === {shown}")
        tab.run("document.querySelector('#filter').focus()")
        for key in "topic 9":
            tab.press(key)
        tab.until(f"{note} === '9 found among 100, the most abnormal first' && {rows} === 9")
        tab.press("x")
        tab.until("!document.querySelector('#features-empty').hidden")
        tab.open(made.http_url + "/#feature=l1.f97")
        tab.until("document.querySelector('#details-body svg') && document.querySelector('#details').open")
        tab.press("Escape")
        tab.until("!document.querySelector('#details').open")


@pytest.mark.e2e
def test_the_browser_complains_of_nothing(tmp_path):
    """No exception, nothing that the page's own Content-Security-Policy refuses, no file that does not load."""
    kept = EvidenceSettings(tmp_path / "evidence")
    with collector(tmp_path, evidence=kept) as made, browser(tmp_path / "profile") as (tab, _):
        exceed(made)
        for view in ("", "#feature=jailbreak", "#request=chatcmpl-1-0123abcd"):
            tab.open(f"{made.http_url}/{view}")
            tab.until(f"document.querySelectorAll('{'#details-body dl' if view else '#features tr'}').length")
        assert tab.problems == []


@pytest.mark.e2e
@pytest.mark.parametrize("width", [1440, 800])
@pytest.mark.parametrize("view", ["", "#feature=jailbreak", "#request=chatcmpl-1-0123abcd"])
def test_every_view_is_drawn_at_both_widths(service, tmp_path, view, width):
    """The pictures stay in the test's folder for a person to look at; an empty page of this size has some 5 kB."""
    exceed(service)
    picture = tmp_path / "view.png"
    more = ("--hide-scrollbars", f"--window-size={width},1000", f"--screenshot={picture}")
    browse(f"{service.http_url}/{view}", tmp_path / "profile", *more)
    drawn = picture.read_bytes()
    assert (int.from_bytes(drawn[16:20]), int.from_bytes(drawn[20:24])) == (width, 1000)
    assert len(drawn) > 20_000
