"""PromQL that boards share: selectors by the template variables, and the series of the metrics table.

HERE keeps a metric to the chosen collectors, MODEL to the chosen models as well. Recorded series have lost job and
instance, so they are chosen by model alone: RECORDED.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import yaml
from latentwatch.errors import ConfigRefused
from latentwatch.export.metrics import FEATURE_INFO, METRICS, Metric

HERE: Final = 'job=~"$job",instance=~"$instance"'
MODEL: Final = f'{HERE},model_name=~"$model_name"'
RECORDED: Final = 'model_name=~"$model_name"'

_RULES: Final = Path(__file__).parents[1] / "rules" / "recording.yaml"
_RECORDED: Final = {
    rule["record"] for group in yaml.safe_load(_RULES.read_text("utf-8"))["groups"] for rule in group["rules"]
}
_EXPORTED: Final = {sample: metric for metric in METRICS for sample in metric.samples}
_PROMETHEUS_OWN: Final = {"up", "ALERTS"}
_ADDED_LABELS: Final = {"job", "instance", "le"}
"""By the scrape, and by a histogram to its buckets."""


def unnamed(expr: str) -> str:
    """The same values without their metric's name, by which a table would hold rows of two metrics apart."""
    return f"{expr} + 0"


def series(metric: Metric, where: str = HERE) -> str:
    """A metric's samples; of a histogram, its buckets."""
    return f"{metric.samples[0]}{{{where}}}"


def rate(metric: Metric, where: str = HERE) -> str:
    """A second, over the shortest time that the zoom allows."""
    return f"rate({series(metric, where)}[$__rate_interval])"


def increase(metric: Metric, where: str = HERE, *, over: str = "$__rate_interval") -> str:
    """Over the shortest time that the zoom allows, or over another, such as $__range: the whole time on the screen."""
    return f"increase({series(metric, where)}[{over}])"


def named(expr: str) -> str:
    """`expr` by feature, with the words for people."""
    return f"({expr}) * on (feature) group_left (label) group by (feature, label) ({series(FEATURE_INFO)})"


def checked(expr: str) -> str:
    """`expr` on one line. Raises ConfigRefused for a series that nobody exports or records, or for a label it lacks."""
    line = " ".join(expr.split())
    bare = re.sub(r'"[^"]*"', '""', line)
    for name, selector in re.findall(r"([A-Za-z_:][\w:]*)(\{[^}]*\})?", bare):
        if selector or "latentwatch_" in name:
            _check_series(name, set(re.findall(r"(\w+)\s*[=!]", selector)), line)
    return line


def _check_series(name: str, labels: set[str], expr: str) -> None:
    if name in _RECORDED | _PROMETHEUS_OWN:
        return
    if name not in _EXPORTED:
        found, instead = "nobody exports or records it", "Take it from the metrics table or rules/recording.yaml."
        raise ConfigRefused(f"{name} in {expr!r}", found=found, instead=instead, reason="metric_unknown")
    allowed = _ADDED_LABELS | set(_EXPORTED[name].labels)
    if labels - allowed:
        found = f"it has no label {', '.join(sorted(labels - allowed))}"
        instead = f"It has {', '.join(sorted(allowed))}."
        raise ConfigRefused(f"{name} in {expr!r}", found=found, instead=instead, reason="label_unknown")
