"""The drawing of a text's scores, on made-up activations: what is drawn is what was compared."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET

import latentwatch
import numpy as np
import pytest
from latentwatch.research import picture, scoring
from latentwatch.watchlist.file import Limit

from tests.support.streams import sparse, watchlist

SVG = "{http://www.w3.org/2000/svg}"
ACT_T = np.array([0.0, 1.0, 5.0, 1.0, 2.0, 2.0, 2.0, np.nan], np.float32)
ODD = ("<s>", "a&b", "\x1b[31m", *"defgh")


def scored(limit: Limit | None, tokens=ODD, act_T=ACT_T) -> scoring.Scored:
    """Two features of one limit; the second of half the activations."""
    both = watchlist([dataclasses.replace(sparse(name), limit=limit) for name in ("strong", "weak")])
    return scoring.Scored(tuple(tokens), 4, np.stack([act_T, act_T / 2], axis=1), both, "a model")


def drawn(made: picture.Picture) -> ET.Element:
    return ET.fromstring(made._repr_svg_())


def red(root: ET.Element) -> list[int]:
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.get("fill") == picture._OVER]
    return [int(bar.findtext(f"{SVG}title").rpartition(" ")[2]) for bar in bars]


@pytest.mark.parametrize(
    ("limit", "above"),
    [
        (None, []),
        (Limit("max", 1.5), [2, 4, 5, 6]),
        (Limit("max", 1.5, phase="output"), [4, 5, 6]),
        (Limit("max", 1.5, phase="prompt"), [2]),
        (Limit("rolling_mean", 1.9, 3, "output"), [6]),
        (Limit("max", 9.0), []),
    ],
)
def test_red_is_where_what_the_limit_looks_at_is_above_it(limit, above):
    root = drawn(latentwatch.plot(scored(limit), ["strong"]))
    assert red(root) == above
    assert len(list(root.iter(f"{SVG}polyline"))) == (limit is not None and limit.window_tokens > 1)
    dashed = [line for line in root.iter(f"{SVG}path") if line.get("stroke-dasharray")]
    assert len(dashed) == (limit is not None)


def test_without_names_those_above_their_limit_are_drawn_else_the_strongest_first():
    def named(limit: Limit) -> list[bool]:
        title = drawn(latentwatch.plot(scored(limit))).findtext(f"{SVG}title")
        return [name in title for name in ("strong", "weak")]

    assert named(Limit("max", 3.0)) == [True, False]
    assert named(Limit("max", 9.0)) == [True, True]


def test_an_unknown_feature_is_named():
    with pytest.raises(KeyError, match="'nobody' is no feature of"):
        latentwatch.plot(scored(None), ["nobody"])


@pytest.mark.parametrize("count", [0, 1, 8, 4000])
def test_it_stays_inside_its_width_and_is_sound_for_every_length_and_token(count):
    tokens = (ODD * 500)[:count]
    root = drawn(latentwatch.plot(scored(Limit("max", 1.5), tokens, np.resize(ACT_T, count))))
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.get("x")]
    assert all(float(bar.get("x")) + float(bar.get("width")) <= picture._WIDTH_PX for bar in bars)
    assert not list(root.iter(f"{SVG}script")) and "\x1b" not in "".join(root.itertext())
