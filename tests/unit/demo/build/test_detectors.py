"""Detectors on streams that we made: what is planted at a prompt's end is found there, and nowhere else."""

from __future__ import annotations

import numpy as np
from latentwatch.demo.build.detectors import Labels, Windows, fit, heldout_area, rolling_means
from latentwatch.demo.build.streams import shared_start
from latentwatch.demo.smollm2.figures import auroc

WINDOW, WIDTH = 5, 16


def streams(count: int, positive: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Streams of 6 to 30 tokens at two layers; the last five of a positive one point along an axis, at layer 1 only."""
    made = []
    for one in positive[:count]:
        stream = rng.normal(size=(int(rng.integers(6, 30)), 2, WIDTH)).astype(np.float16)
        stream[-WINDOW:, 1, 3] += np.float16(3.0 * one)
        made.append(stream)
    return made


def test_means_are_over_consecutive_tokens_and_of_a_short_request_there_is_none() -> None:
    stream = np.arange(12, dtype=np.float16).reshape(6, 2)
    np.testing.assert_allclose(rolling_means(stream, 4)[:, 0], [3, 5, 7])
    assert rolling_means(stream[:3], 4).shape == (0, 2)
    assert np.isneginf(Windows([rolling_means(stream[:3], 4)]).scores(None))  # type: ignore[arg-type]


def test_what_is_planted_is_found_in_requests_and_families_that_were_not_seen() -> None:
    rng = np.random.default_rng(0)
    positive = rng.random(400) < 0.4
    made = streams(400, positive, rng)
    windows = [Windows.of(made, layer, WINDOW) for layer in range(2)]
    labels = Labels(positive, ~positive & (rng.random(400) < 0.3), [f"f{i % 3}" for i in range(400)])
    requests = list(range(300))
    areas = [heldout_area(one, labels, requests, rng) for one in windows]
    assert areas[1] > 0.95 > 0.7 > areas[0]
    scores = windows[1].scores(fit(windows[1], labels, requests, rng))[300:]
    assert auroc(scores[positive[300:]], scores[~positive[300:]]) > 0.95


def test_the_shared_beginning_is_as_long_as_all_agree() -> None:
    assert shared_start([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3]]) == [1, 2]
    assert shared_start([[1], [1, 2]]) == [1]
    assert shared_start([[3], [1, 2]]) == []
