"""What is measured of a feature: the keys of `evidence`, as schema.json describes them. Any may be missing."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class Histogram(TypedDict):
    edges: list[float]
    counts: list[float]


class Token(TypedDict):
    """A token in its context."""

    token: str
    before: NotRequired[str]
    after: NotRequired[str]
    activation: float


class Dictionary(TypedDict):
    """Of the whole SAE that a feature is of, on text that it was not trained on."""

    fvu: float
    l0: float
    dead_share: float
    loss_recovered: float
    tokens: int


class Figures(TypedDict, total=False):
    auroc: float
    tpr_at_fpr_1pct: float
    tpr_at_fpr_0_1pct: float
    n: int
    n_positive: int
    split: str
    aggregation: str
    q_value: float
    base_rate: float
    quantiles: dict[str, float]
    histogram: Histogram
    top_tokens: list[Token]
    confounds: list[str]
    label_source: str
    measured_on: str
    remarks: str
    sae: Dictionary
