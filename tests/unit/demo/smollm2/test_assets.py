"""What is shipped of SmolLM2's detectors agrees with itself, and holds no text of others."""

from __future__ import annotations

from pathlib import Path

import pytest
from latentwatch.demo.run import commands
from latentwatch.demo.smollm2 import texts
from latentwatch.demo.smollm2.card import Card, card_text, read_card
from latentwatch.demo.smollm2.texts import Role
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.build import build

FOLDER = commands.ASSETS / "smollm2"
MAX_BYTES = 100_000


@pytest.fixture(scope="module")
def card() -> Card:
    return read_card(FOLDER / "card.json")


def test_the_watchlist_has_the_cards_limits_and_skips_what_every_request_begins_with(card: Card) -> None:
    features = {feature.id: feature for feature in watchlist_file.read(FOLDER / "demo.watchlist.safetensors").features}
    assert set(features) == {feature.id for feature in card.features.values()}
    for known in card.features.values():
        feature = features[known.id]
        assert feature.limit is not None
        assert feature.limit.value == pytest.approx(known.limit, abs=1e-4)
        assert (feature.limit.window_tokens, feature.limit.phase) == (known.window_tokens, "prompt")
        assert feature.skip_first_positions == card.shared_positions > 0
        assert feature.severity == "critical"


def test_the_watchlist_is_built_from_its_yaml(tmp_path: Path) -> None:
    out = FOLDER / "demo.watchlist.safetensors"
    rebuilt = build(FOLDER / "watchlist.yaml", tmp_path / "again.safetensors")
    assert rebuilt.sha256 == watchlist_file.read(out).sha256


def test_every_concern_has_a_detector_with_families_that_were_not_trained_on(card: Card) -> None:
    assert set(card.features) == set(texts.CONCERNS)
    for feature in card.features.values():
        assert {row.negatives for row in feature.families} == {"ordinary", "hard"}
        assert list(feature.thresholds.values()) == sorted(feature.thresholds.values())
        assert feature.thresholds[f"{feature.limit_rate:g}"] == feature.limit


def test_the_card_in_words_is_that_in_numbers(card: Card) -> None:
    assert (FOLDER / "card.md").read_text("utf-8") == card_text(card)


def test_no_text_of_others_is_shipped() -> None:
    shipped = b"".join(path.read_bytes() for path in sorted(FOLDER.iterdir()))
    assert len(shipped) <= MAX_BYTES
    read = texts.read()
    assert not any(prompt.text.encode() in shipped for role in Role for prompt in read.of(role))
