"""The live page in a real browser: what it says, and what it makes of a client's text."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from latentwatch.collector.evidence import EvidenceSettings
from latentwatch.collector.http import app
from latentwatch.collector.service import Service

from tests.support import page_scene
from tests.support.browser import Tab, browser
from tests.support.collectors import FEATURES, collector, exceed
from tests.support.programs import program
from tests.support.streams import sparse

STATIC = Path(app.__file__).parent / "static"
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
    assert "5.00 largest value, limit 1.00, from token 2 (output)" in text and "Of 1 request" in text
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
    assert "A feature of a sparse autoencoder, read at resid_post.0" in text
    assert "A request whose largest value is above 1.00 (activation) pages somebody" in text
    assert "chatcmpl-1-0123abcd largest value 5.00, from token 2 (output)" in text
    assert re.search(r"Promised by the baseline [\d.]+ % of requests Seen here 100.0 % of 1, 95 % interval", text)


@pytest.mark.e2e
def test_drift_is_ranked_and_the_page_says_what_was_measured(service, tmp_path):
    exceed(service)
    _, text = text_of(service.http_url + "/", tmp_path / "profile")
    assert re.search(r"Drift from the baseline None above its limit in 1 windows\. .* Complying &lt;b&gt;", text)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Tab]]:
    """A collector with something of everything, and a browser."""
    folder = tmp_path_factory.mktemp("scene")
    with page_scene.scene(folder) as made, browser(folder / "profile") as (tab, _):
        yield made, tab


def body(tab: Tab) -> str:
    return re.sub(r"\s+", " ", str(tab.run("document.querySelector('#details-body').innerText")))


@pytest.mark.e2e
def test_one_request_is_one_row_however_many_limits_it_exceeded(shown: tuple[Service, Tab]) -> None:
    service, tab = shown
    tab.open(service.http_url + "/")
    tab.until("document.querySelectorAll('#flagged li').length")
    rows = tab.run("[...document.querySelectorAll('#flagged .id')].map((row) => row.textContent)")
    assert rows == [page_scene.TWICE, page_scene.BAD, page_scene.TWICE], "an id used twice is two requests"
    assert "and Deceiving the user, Asked for a weapon and 1 more" in tab.run(
        "document.querySelector('#flagged').innerText"
    )


@pytest.mark.e2e
def test_an_id_that_was_used_twice_is_two_requests_with_headings_and_their_own_tokens(
    shown: tuple[Service, Tab],
) -> None:
    service, tab = shown
    tab.open(f"{service.http_url}/#request={page_scene.TWICE}")
    tab.until("document.querySelectorAll('.which').length === 2")
    text = body(tab)
    first, second = text.split("Request 2 of 2 with this id")
    assert "Request 1 of 2 with this id" in first
    assert "largest value in the output: 9.00" in first and "largest value in the output: 5.50" in second


@pytest.mark.e2e
def test_a_strip_shows_what_the_limit_is_on_and_says_the_token_under_the_pointer_or_the_key(
    shown: tuple[Service, Tab],
) -> None:
    service, tab = shown
    tab.open(f"{service.http_url}/#request={page_scene.BAD}")
    tab.until("document.querySelectorAll('.strip-row').length")
    strips = "[...document.querySelectorAll('.strip-row')]"
    names = tab.run(f"{strips}.map((strip) => strip.querySelector('a').textContent)")
    mean, sink = names.index("Deceiving the user"), next(i for i, n in enumerate(names) if n.startswith("Explaining"))
    assert tab.run(f"{strips}[{mean}].querySelectorAll('path.mean').length") == 1
    assert tab.run(f"{strips}[{mean}].querySelectorAll('rect.apart').length") > 0, "the prompt is not counted"
    shown_of = tab.run(
        f"{strips}[{sink}].querySelector('rect.cell.over').getAttribute('height') > 25"
        f" && {strips}[{sink}].querySelector('rect.apart').getAttribute('x') === '0'"
    )
    assert shown_of, "the first token, ten times as large, is outside the scale"
    tab.run(f"{strips}[{sink}].querySelector('svg').focus()")
    tab.press("Home")
    said = f"{strips}[{sink}].querySelector('output').textContent"
    assert tab.run(said) == "token 0 (prompt): 60.0, not counted by the limit"
    assert tab.run(f"{strips}[{sink}].querySelector('svg').getAttribute('aria-valuetext')") == tab.run(said)


@pytest.mark.e2e
def test_a_features_view_has_its_top_tokens_its_reliability_and_ways_out(shown: tuple[Service, Tab]) -> None:
    service, tab = shown
    tab.open(f"{service.http_url}/#feature=l12.f8812")
    tab.until("document.querySelectorAll('#details-body .tokens li').length === 3")
    text = body(tab)
    assert "The first token does not count" in text and "as long as it stays in the story, nobody will 9.80" in text
    assert "Does the limit keep its promise?" in text and "0.84 % of 119" in text
    links = tab.run("[...document.querySelectorAll('.elsewhere a')].map((link) => link.href)")
    assert links == [
        "https://grafana.example.org/d/latentwatch-feature?var-feature=l12.f8812",
        "https://wiki.example.org/latentwatch#latentwatchcriticalexceedance",
    ]


@pytest.mark.e2e
def test_keys_search_and_help_and_can_be_switched_off(shown: tuple[Service, Tab]) -> None:
    service, tab = shown
    tab.open(service.http_url + "/")
    tab.until("document.querySelectorAll('#features tr').length")
    tab.press("/")
    assert tab.run("document.activeElement.id") == "filter"
    tab.press("?")
    assert tab.run("location.hash") == "", "what is typed into a field is text"
    tab.run("document.activeElement.blur()")
    tab.press("?")
    tab.until("document.querySelector('#details').open && document.querySelector('#details-body kbd')")
    tab.run("document.querySelector('#details-body input').click()")
    tab.press("Escape")
    tab.until("!document.querySelector('#details').open")
    tab.press("?")
    assert tab.run("location.hash") == ""
    tab.run("localStorage.clear()")


@pytest.mark.e2e
@pytest.mark.parametrize("view", page_scene.VIEWS)
@pytest.mark.parametrize("width", [1440, 800, 390])
def test_no_view_is_wider_than_its_window_and_no_text_is_cut(shown: tuple[Service, Tab], view: str, width: int) -> None:
    service, tab = shown
    tab.size(width, 1000)
    tab.open(f"{service.http_url}/{page_scene.VIEWS[view]}")
    tab.until("document.querySelectorAll('#features tr').length")
    if page_scene.VIEWS[view]:
        tab.until("document.querySelector('#details-body').children.length > 1")
    assert tab.run("document.documentElement.scrollWidth") <= width
    cut = """[...document.querySelectorAll('b, small, .id, dd, h2, h3, td')].filter((node) =>
      node.offsetParent && getComputedStyle(node).overflow === 'hidden' && node.scrollWidth > node.clientWidth
    ).map((node) => node.textContent)"""
    assert tab.run(cut) == []


@pytest.mark.e2e
def test_the_title_of_the_tab_says_that_the_collector_is_gone(tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as (tab, _):
        with collector(tmp_path) as made:
            exceed(made)
            tab.open(made.http_url + "/")
            tab.until("document.title.startsWith('✕ 1 critical')")
        tab.until("document.title === '✕ No connection – latentwatch'")
        assert "The collector does not answer" in tab.run("document.querySelector('#banner').textContent")


def test_the_page_has_enough_contrast_in_both_schemes() -> None:
    """Text 4.5 to 1 on everything that it stands on, what is drawn 3 to 1: WCAG 2.2 AA."""
    css = (STATIC / "page.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", css.split(":root {")[i])) for i in (1, 2))
    for scheme in (light, light | dark):
        for ground in ("ground", "card", "hover"):
            for text in ("ink", "soft", "faint", "blue", "amber", "red", "green"):
                assert contrast(scheme[text], scheme[ground]) >= 4.5, (text, ground, scheme[text])


def contrast(one: str, other: str) -> float:
    """By WCAG: of two colours, 1 to 21."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.e2e
def test_a_collector_that_writes_evidence_shows_a_request_token_by_token(tmp_path):
    with collector(tmp_path, evidence=EvidenceSettings(tmp_path / "evidence")) as made:
        exceed(made)
        markup, text = text_of(f"{made.http_url}/#request=chatcmpl-1-0123abcd", tmp_path / "profile")
    assert "Token by token" in text and "One column a token, 4 in all" in text
    # The legend has one, too.
    strip = markup.partition("strip-legend")[0] + markup.partition("strip-legend")[2].partition("</p></div>")[2]
    (cell,) = re.findall(r'<rect class="cell over" x="(\d+)" y', strip)
    assert cell == "2" and "largest value: 5.00 at token 2, limit 1.00" in text


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
@pytest.mark.parametrize("view", ["", "#feature=jailbreak", "#request=chatcmpl-1-0123abcd", "#help"])
def test_every_view_is_drawn_at_both_widths(service, tmp_path, view, width):
    """The pictures stay in the test's folder for a person to look at; an empty page of this size has some 5 kB."""
    exceed(service)
    picture = tmp_path / "view.png"
    more = ("--hide-scrollbars", f"--window-size={width},1000", f"--screenshot={picture}")
    browse(f"{service.http_url}/{view}", tmp_path / "profile", *more)
    drawn = picture.read_bytes()
    assert (int.from_bytes(drawn[16:20]), int.from_bytes(drawn[20:24])) == (width, 1000)
    assert len(drawn) > 20_000
