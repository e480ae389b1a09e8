"""What a reader without the model would say: text classifiers and the length, fitted on the texts of the probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from latentwatch.arrays import F64, Bool


def scores(fitted: Sequence[str], positive_F: Bool, asked: Sequence[str]) -> Mapping[str, F64]:
    """Of each text asked, by classifier: characters (n-grams of 2 to 5), words (of 1 and 2), and length.

    The n-grams are weighted by TF-IDF and told apart by logistic regression. Length counts either way: long texts where
    the positive ones are longer on average, short ones where they are not.

    Raises: ImportError: scikit-learn is missing.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    found: dict[str, F64] = {}
    for name, vectorizer in {
        "characters": TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2),
        "words": TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2),
    }.items():
        model = make_pipeline(vectorizer, LogisticRegression(C=10, max_iter=300, class_weight="balanced"))
        found[name] = np.asarray(model.fit(list(fitted), positive_F).decision_function(list(asked)), np.float64)
    length_F = np.array([len(text) for text in fitted], np.float64)
    longer = length_F[positive_F].mean() >= length_F[~positive_F].mean()
    length_A = np.array([len(text) for text in asked], np.float64)
    found["length"] = length_A if longer else -length_A
    return found
