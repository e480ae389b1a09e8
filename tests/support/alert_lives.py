"""What a collector shows Prometheus while something is wrong for a while, and how often an alert of that begins.

Rules run in promtool, on series at steps of 30 seconds: trouble begins at BEGIN and lasts for so many seconds; a kill
takes every series of the collector away and sets `up` to 0, until it is back.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from tests.support.programs import program
from tests.support.stack import RULES

STEP: Final = 30
BEGIN: Final = 3600
"""Behind an hour in which all was well: the longest time that a rule looks back for what is usual."""
BURST: Final = 51
"""Seconds in which a rollout's engines and collectors had different watchlists, on the night that asked for this."""
STEADY: Final = 2400
END: Final = BEGIN + STEADY + 2400
WHERE: Final = 'cluster="k",namespace="n",job="latentwatch",instance="c0:9464"'


@dataclass(frozen=True)
class Trouble:
    """Seconds at which it begins, and for how long it lasts."""

    begin: float
    seconds: float

    def lasted(self, at: float) -> float:
        """How many of its seconds are over."""
        return min(max(0.0, at - self.begin), self.seconds)

    def is_on(self, at: float) -> bool:
        return self.begin <= at < self.begin + self.seconds


Values = Callable[[Trouble, float], float]
"""A series at a time, of the trouble that there is."""


def counter(ill: float, well: float = 0.0) -> Values:
    """Grows by so much a second."""
    return lambda trouble, at: round(well * (at - trouble.lasted(at)) + ill * trouble.lasted(at))


def once(count: int) -> Values:
    """A counter that grows by `count` when the trouble begins, and no more."""
    return lambda trouble, at: count * (at >= trouble.begin)


def gauge(ill: float, well: float) -> Values:
    return lambda trouble, at: ill if trouble.is_on(at) else well


def clock(ill: Callable[[float], float] = lambda at: at) -> Values:
    """A time stamp that is now; while there is trouble, `ill` of now."""
    return lambda trouble, at: ill(at) if trouble.is_on(at) else at


def stuck_clock() -> Values:
    """A time stamp that is now, and stands still while there is trouble."""
    return lambda trouble, at: trouble.begin if trouble.is_on(at) else at


@dataclass(frozen=True)
class Kill:
    """The collector is away from one time to another; without its state it counts from 0 again."""

    begin: float
    seconds: float
    stateless: bool = False

    def is_away(self, at: float) -> bool:
        return self.begin <= at < self.begin + self.seconds


@dataclass(frozen=True)
class Case:
    """An alert, and the series that make it."""

    alert: str
    severity: str
    series: Mapping[str, Values] = field(default_factory=dict)
    """By name with its own labels: of the collector."""
    others: Mapping[str, Values] = field(default_factory=dict)
    """By name with all labels: of what is not killed with it."""
    once_is_enough: bool = False
    """One burst makes the alert; else only what goes on."""


def input_series(case: Case, trouble: Trouble, kill: Kill | None = None) -> list[dict[str, str]]:
    """As promtool reads them."""
    times = range(0, END + 1, STEP)
    made = {selector: [case.others[selector](trouble, at) for at in times] for selector in case.others}
    if f"up{{{WHERE}}}" not in made:
        made[f"up{{{WHERE}}}"] = [float(not (kill and kill.is_away(at))) for at in times]
    for selector, values in case.series.items():
        name, _, labels = selector.rstrip("}").partition("{")
        full = f"{name}{{{WHERE}{',' * bool(labels)}{labels}}}"
        made[full] = [_of_process(name, values, trouble, kill, at) for at in times]
    return [{"series": name, "values": " ".join(_word(value) for value in row)} for name, row in made.items()]


def _of_process(name: str, values: Values, trouble: Trouble, kill: Kill | None, at: float) -> float | None:
    if kill is None or at < kill.begin:
        return values(trouble, at)
    if kill.is_away(at):
        return None
    forgotten = values(trouble, kill.begin) if kill.stateless and name.endswith(("_total", "_bucket")) else 0.0
    return values(trouble, at) - forgotten


def _word(value: float | None) -> str:
    return "stale" if value is None else repr(value)


def begun(case: Case) -> str:
    """PromQL: how often the alert began to fire, over all of its labels and in any of them, up to the end."""
    firing = f'ALERTS{{alertname="{case.alert}",severity="{case.severity}",alertstate="firing"}}'
    return f"sum(count_over_time(({firing} unless {firing} offset {STEP}s)[{END}s:{STEP}s]))"


def promtool(folder: Path, case: Case, tests: Iterable[tuple[str, list[dict[str, str]], int]]) -> str:
    """Run tests of (name, series, how often the alert begins); what promtool found, empty for nothing."""
    file: dict[str, Any] = {
        "rule_files": [str(_rules_of(case, path, folder)) for path in sorted(RULES.glob("*.yaml"))],
        "evaluation_interval": f"{STEP}s",
        "tests": [
            {
                "name": name,
                "interval": f"{STEP}s",
                "input_series": series,
                "promql_expr_test": [
                    {
                        "expr": begun(case),
                        "eval_time": f"{END}s",
                        "exp_samples": [{"labels": "{}", "value": value}] if value else [],
                    }
                ],
            }
            for name, series, value in tests
        ],
    }
    path = folder / "tests.yaml"
    path.write_text(yaml.safe_dump(file))
    ran = subprocess.run([program("promtool"), "test", "rules", str(path)], capture_output=True, text=True)
    return "" if ran.returncode == 0 else ran.stdout + ran.stderr


def _rules_of(case: Case, path: Path, folder: Path) -> Path:
    """The file without the other alerts, which would cost time and change nothing."""
    rules = yaml.safe_load(path.read_text())
    for group in rules["groups"]:
        group["rules"] = [rule for rule in group["rules"] if rule.get("alert", case.alert) == case.alert]
    (folder / path.name).write_text(yaml.safe_dump(rules))
    return folder / path.name
