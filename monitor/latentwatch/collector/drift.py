"""Drift in the collector: ended requests go to their model's detectors, canary runs to their own; nothing else here.

Shape legend: n requests, F features.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from latentwatch.aggregate.counts import Layout
from latentwatch.aggregate.features import FeatureTable
from latentwatch.aggregate.requests import RequestFeatures
from latentwatch.arrays import Array
from latentwatch.collector.requests import RequestSummary
from latentwatch.collector.served_names import Names
from latentwatch.collector.step_listener import Ends, RemoteRows, StepListener
from latentwatch.drift.baseline import Baseline, Fingerprint
from latentwatch.drift.canary import canary_prompt
from latentwatch.drift.detection import Budget
from latentwatch.drift.limits import tail_probability
from latentwatch.drift.model import DriftView, ModelDrift, ModelDriftState
from latentwatch.errors import BaselineRefused
from latentwatch.watchlist.file import Watchlist

NO_BASELINE: Final = "no_baseline"


@dataclass(frozen=True)
class DriftSettings:
    """What drift is measured against, and how often it may page for nothing."""

    baseline: Baseline | None = None
    budget: Budget = field(default_factory=Budget)
    canary_key: bytes = b""
    """Empty where no canary runs."""
    route: re.Pattern[str] | None = None
    """What it finds first in a request's id is its route, of its first group where there is one; each route has rates
    of its own, within each adapter. None where ids say nothing of routes."""


class Drift(StepListener):
    """The detectors of every model that this collector sees."""

    def __init__(self, watchlist: Watchlist, settings: DriftSettings) -> None:
        """Raises BaselineRefused where the baseline is of another watchlist, or too small."""
        self._ids = tuple(feature.id for feature in watchlist.features)
        self._layout = Layout.of(FeatureTable.of(watchlist.features), watchlist.features)
        self._sha256, self._settings = watchlist.sha256, settings
        self._models: dict[str, ModelDrift] = {}
        self._reference = None
        if baseline := settings.baseline:
            baseline.check(Fingerprint(watchlist.sha256, ""))
            self._reference = baseline.reference()

    def tail_probability(self, feature: int, value: float) -> float | None:
        """Share of the baseline's requests with at least this value; None without a baseline."""
        baseline = self._settings.baseline
        return tail_probability(baseline.observed, feature, value) if baseline else None

    def model_seen(self, model_name: str) -> None:
        """It has series from now on."""
        if model_name not in self._models:
            self._models[model_name] = self._new(model_name)

    def names_gone(self, names: Names) -> None:
        """See StepListener."""
        for model_name in names.models:
            self._models.pop(model_name, None)

    def ended(self, ends: Ends) -> None:
        """See StepListener."""
        if ends.whole:
            self._add(ends.requests, ends.features, ends.whole, ends.seconds)

    def remote(self, remote: RemoteRows) -> None:
        """See StepListener."""
        places: dict[tuple[str, str], list[int]] = {}
        for i in remote.whole:
            info = remote.rows[i].info
            places.setdefault((info.model_name, info.replica), []).append(i)
        for some in places.values():
            self._add(remote.requests, remote.features, some, remote.seconds)

    def _add(
        self, ended: Sequence[RequestSummary], features: RequestFeatures, places: Sequence[int], now: float
    ) -> None:
        requests = [ended[i].request.info for i in places]
        self.add(
            requests[0].model_name,
            requests[0].replica,
            [request.adapter for request in requests],
            [request.request_id for request in requests],
            features.fired_nF[places],
            features.statistic_nF[places],
            now,
        )

    def add(
        self,
        model_name: str,
        replica: str,
        adapters: Sequence[str],
        request_ids: Sequence[str],
        fired_nF: Array,
        value_nF: Array,
        now: float,
    ) -> None:
        """Take n requests of one replica that ended, each seen from its beginning.

        Args: value_nF: the statistic, NaN for none.
        """
        model = self._models[model_name]
        prompts = [canary_prompt(self._settings.canary_key, request_id) for request_id in request_ids]
        for i, prompt in enumerate(prompts):
            if prompt is not None:
                model.add_canary(prompt, value_nF[i], now)
        ordinary = [i for i, prompt in enumerate(prompts) if prompt is None]
        if ordinary:
            model.add(
                replica,
                [self._stratum(adapters[i], request_ids[i]) for i in ordinary],
                [request_ids[i] for i in ordinary],
                fired_nF[ordinary],
                value_nF[ordinary],
                now,
            )

    def forget(self, is_gone: Callable[[str], bool]) -> None:
        """See ModelDrift.forget, for every model."""
        for model in self._models.values():
            model.forget(is_gone)

    def tick(self, now: float) -> None:
        """Close windows that are over."""
        for model in self._models.values():
            model.close_windows(now)

    def views(self) -> tuple[DriftView, ...]:
        """Every model, by name."""
        return tuple(self._models[name].view() for name in sorted(self._models))

    def observed(self, model_name: str, now: float) -> Baseline | None:
        """A copy of what `latentwatch calibrate` makes a baseline of; None for a model that never streamed here."""
        model = self._models.get(model_name)
        if model is None:
            return None
        return Baseline(
            fingerprint=Fingerprint(self._sha256, model_name),
            features=self._ids,
            layout=self._layout,
            observed=copy.deepcopy(model.observed),
            window_seconds=self._settings.budget.window_seconds,
            created_seconds=now,
        )

    def state(self) -> dict[str, ModelDriftState]:
        """Everything that the next request or reading depends on, by model name; copies."""
        return {name: model.state() for name, model in self._models.items()}

    def restore(self, state: dict[str, ModelDriftState]) -> None:
        """Go on from `state`. Detectors of another baseline begin anew, what was observed stays."""
        for name, of_model in state.items():
            self.model_seen(name)
            self._models[name].restore(of_model)

    def _stratum(self, adapter: str, request_id: str) -> str:
        """Whose rates a request is compared with."""
        found = self._settings.route.search(request_id) if self._settings.route else None
        route = found and (found[1] if found.re.groups else found[0])
        return f"{adapter} {route}".strip() if route else adapter

    def _new(self, model_name: str) -> ModelDrift:
        baseline, reason, reference = self._settings.baseline, NO_BASELINE, None
        if baseline is not None:
            try:
                baseline.check(Fingerprint(self._sha256, model_name))
                reason, reference = "", self._reference
            except BaselineRefused as refusal:
                reason = refusal.reason
        return ModelDrift(
            model_name,
            self._ids,
            self._layout,
            self._settings.budget,
            reference,
            reason=reason,
            baseline_sha256=baseline.sha256 if baseline and reference else "",
            baseline_created_seconds=baseline.created_seconds if baseline and reference else 0.0,
        )
