"""The arithmetic behind the card: rolling means, AUROC, TPR, limits, and the judge of replies."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from latentwatch.demo.build import dialogues as dg
from latentwatch.demo.build.features import auroc_per_feature
from latentwatch.demo.build.measure import act_in, detection, limit_between
from latentwatch.demo.build.traces import auroc, rolling_mean, tpr_at_fpr


def test_rolling_mean_equals_the_mean_of_each_full_window() -> None:
    """Fewer tokens than the window give no value at all, as at serving."""
    scores_TK = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    expected = np.stack([scores_TK[i : i + 8].mean(0) for i in range(13)])
    np.testing.assert_allclose(rolling_mean(scores_TK, 8), expected, atol=1e-6)
    assert rolling_mean(scores_TK[:7], 8).shape == (0, 3)


def test_auroc_counts_pairs_and_half_of_ties() -> None:
    """Against the definition, with many ties, and column by column."""
    rng = np.random.default_rng(1)
    scores_RF = rng.integers(0, 4, size=(60, 5)).astype(np.float32)
    positive_R = rng.random(60) < 0.3
    pairs = [
        np.mean([(p > n) + 0.5 * (p == n) for p in column[positive_R] for n in column[~positive_R]])
        for column in scores_RF.T
    ]
    assert auroc(scores_RF[positive_R, 0], scores_RF[~positive_R, 0]) == pytest.approx(pairs[0])
    np.testing.assert_allclose(auroc_per_feature(scores_RF, positive_R), pairs, atol=1e-6)


def test_tpr_is_taken_where_at_most_one_percent_of_negatives_is_above() -> None:
    """With 200 negatives, two may be above the cut."""
    negative = np.arange(200, dtype=np.float32)
    positive = np.array([196.5, 197.5, 198.5, 500.0], np.float32)
    assert tpr_at_fpr(positive, negative) == 0.75
    assert tpr_at_fpr(positive, negative[:50]) == 1.0


def test_no_harmless_score_is_above_a_limit_even_when_acts_score_lower() -> None:
    """Alarms may be lost, never invented."""
    rng = np.random.default_rng(2)
    harmless = rng.normal(size=500).astype(np.float32)
    for shift in (-2.0, 0.0, 1.0, 10.0):
        limit = limit_between(harmless, rng.normal(shift, 1.0, size=50).astype(np.float32))
        assert (harmless <= limit).all()
    assert limit_between(np.array([1.0], np.float32), np.array([5.0], np.float32)) == 2.0


def test_detection_counts_requests_not_tokens() -> None:
    """One score a dialogue."""
    found = detection(np.array([3, 2, 1, 0], np.float32), np.array([True, True, False, False]))
    assert (found.auroc, found.tpr_at_fpr_1pct, found.n, found.n_positive) == (1.0, 1.0, 4, 2)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_judge_of_replies_knows_every_act_and_clears_every_near_miss(split: dg.Split) -> None:
    """On the generator's own replies, where the truth is known."""
    rng = np.random.default_rng(3)
    for topic in [*dg.topics("feared"), *dg.topics("near"), *dg.topics("ordinary")]:
        for _ in range(40):
            dialogue = dg.compose(topic, split, rng)
            found = act_in(dialogue.turns[-1].content, dialogue)
            assert found == (topic if dialogue.feared else None), dialogue.turns[-1].content
