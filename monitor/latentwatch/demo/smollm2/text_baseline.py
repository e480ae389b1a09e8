"""What reading the text would have said: character n-grams, a logistic regression, the texts that detectors had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from latentwatch.arrays import F64
from latentwatch.prompts.prompt import Prompt

PENALTY: Final = 10.0
"""scikit-learn's C: the best of 1, 10 and 100 for the text, so that the comparison is not lost by neglect."""


@dataclass(frozen=True)
class TextBaseline:
    """A classifier of texts for one concern."""

    model: Any
    """A scikit-learn pipeline."""

    @classmethod
    def fitted(cls, prompts: Sequence[Prompt], positive_R: Sequence[bool]) -> TextBaseline:
        """Fitted on texts and whether each is of the concern. Raises ImportError: scikit-learn is not installed."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        model = make_pipeline(
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True, dtype=np.float32),
            LogisticRegression(C=PENALTY, max_iter=300, class_weight="balanced"),
        )
        return cls(model.fit([prompt.text for prompt in prompts], np.asarray(positive_R)))

    def scores(self, texts: Sequence[str]) -> F64:
        """Logits; the higher, the more of the concern."""
        result: F64 = np.asarray(self.model.decision_function(list(texts)), np.float64)
        return result


def training(prompts: Sequence[Prompt], concern: str) -> tuple[list[Prompt], list[bool]]:
    """What a detector of a concern is trained on: its texts, and what is not of it, other concerns kept apart.

    What wraps a request says nothing of what is asked, so jailbreaks are neither for nor against a harmful request.
    """
    used = [
        prompt
        for prompt in prompts
        if not (concern == "harmful_request" and prompt.concern == "jailbreak_wrapper" and prompt.kind == "positive")
    ]
    return used, [prompt.concern == concern and prompt.kind == "positive" for prompt in used]
