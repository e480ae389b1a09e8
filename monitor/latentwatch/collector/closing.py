"""How requests end here: their statistics are counted, their books balanced, their summaries kept.

Shape legend: n requests, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from latentwatch.aggregate.requests import RequestFeatures, slices
from latentwatch.aggregate.window import FeatureWindow
from latentwatch.arrays import Array
from latentwatch.client_ids import carried
from latentwatch.collector.replicas import Boot
from latentwatch.collector.requests import RequestSummary, TrackedRequest, summarise
from latentwatch.collector.state import CollectorState, EngineCounts
from latentwatch.collector.step_listener import Ends, StepListener
from latentwatch.facts import FeatureSummary, RequestProgress
from latentwatch.names import Outcome, Phase, Reason, TokenState
from latentwatch.step.batch import RequestClosed


class Closing:
    """Closes requests that have a slot."""

    def __init__(self, state: CollectorState, listeners: Sequence[StepListener]) -> None:
        self._state = state
        self._listeners = listeners

    def end(self, boot: Boot, closed: tuple[RequestClosed, ...], now: float) -> None:
        """Take the ends that one step tells of; those of requests unknown here are counted only."""
        if not closed:
            return
        slots = boot.handles.find(np.array([event.handle for event in closed], np.int64)).tolist()
        ends: dict[int, RequestClosed | None] = {s: event for s, event in zip(slots, closed, strict=True) if s >= 0}
        unknown = [event for slot, event in zip(slots, closed, strict=True) if slot < 0]
        engine = self._state.engine((boot.hello.model_name, boot.hello.engine))
        engine.requests.update(event.outcome for event in unknown)
        self._close(ends, now)

    def expire(self, slots: Sequence[int], now: float) -> None:
        """Close requests that nobody will close any more."""
        of_boot: dict[int, list[int]] = {}
        for slot in slots:
            of_boot.setdefault(id(self._state.slots.request(slot).handles), []).append(slot)
        for together in of_boot.values():
            self._close(dict.fromkeys(together), now)

    def _close(self, ends: dict[int, RequestClosed | None], now: float) -> None:
        """Close requests of one boot. Args: ends: by slot; None where the engine never said how it ended."""
        told = list(ends.items())
        for some in slices(len(told), len(self._state.features)):
            self._close_some(dict(told[some]), now)

    def _close_some(self, ends: dict[int, RequestClosed | None], now: float) -> None:
        state, slots = self._state, np.array(list(ends), np.int64)
        handles = state.slots.request(int(slots[0])).handles
        features = state.statistics.features_of(slots)
        whole = self._count_statistics(slots, features)
        summaries = summarise(features, state.table.limit_F, state.bounds.summary_features)
        requests = [self._close_one(slot, event, summaries[i], now) for i, (slot, event) in enumerate(ends.items())]
        for i, summary in enumerate(requests):
            if summary.features.exceeded:
                state.exceedances.settle(summary.request.collector_serial, features.statistic_nF[i])
        told = Ends(list(ends), requests, features, whole, now)
        for listener in self._listeners:
            listener.ended(told)
        if handles is not None:
            handles.remove(slots)

    def _count_statistics(self, slots: Array, features: RequestFeatures) -> list[int]:
        """Add the statistics of n closing requests of one model to its histograms.

        Returns the places of those that were seen whole: of a request that began before this collector only the end
        was seen, and it would count as one with fewer fires.
        """
        state = self._state
        requests = [state.slots.request(slot) for slot in slots.tolist()]
        model, sparse_F = state.models[requests[0].info.model_name], state.table.sparse_F
        accounted = state.slots.accounted[slots]
        seen_n = accounted[:, [TokenState.SCORED, TokenState.INHERITED]].sum(axis=(1, 2)) > 0
        counted_nF = seen_n[:, None] & (sparse_F | ~np.isnan(features.statistic_nF))
        # A sparse feature's tokens without activation are zeros, and the maximum is over them too.
        statistic_nF = np.where(sparse_F, np.fmax(features.statistic_nF, 0), features.statistic_nF)
        model.statistic.observe(statistic_nF, counted_nF)
        model.requests_F += np.count_nonzero(features.fired_nF, axis=0)
        return [i for i, request in enumerate(requests) if seen_n[i] and request.info.opening_seen]

    def _close_one(
        self, slot: int, event: RequestClosed | None, features: FeatureSummary, now: float
    ) -> RequestSummary:
        state = self._state
        accounted = state.slots.accounted[slot].copy()
        request = state.slots.release(slot)
        engine = state.engines[request.info.model_name, request.info.engine]
        outcome = Outcome.LOST if event is None else event.outcome
        engine.requests[outcome] += 1
        if event is not None:
            self._settle(request, event, accounted, engine, now)
        progress = RequestProgress(
            outcome=outcome,
            closed_seconds=now,
            tokens=accounted.sum(axis=1),
            output_tokens=None if event is None else event.output_tokens,
            total_tokens=None if event is None else event.total_tokens,
        )
        summary = RequestSummary(request, progress, features)
        state.index.close(summary)
        return summary

    def _settle(
        self, request: TrackedRequest, event: RequestClosed, accounted: Array, engine: EngineCounts, now: float
    ) -> None:
        """Apply what the end says, and make the books balance: tokens that no message told of were lost."""
        state = self._state
        if request.info.prompt_tokens != event.prompt_tokens:
            request.info = replace(request.info, prompt_tokens=event.prompt_tokens)
        if not request.info.request_id:
            request.info = replace(
                request.info, request_id=carried(event.request_id), response_id=carried(event.response_id)
            )
            state.index.add(request)
        missing = event.total_tokens - int(accounted.sum())
        if not request.info.opening_seen or missing == 0:
            return
        if missing < 0:
            state.totals.excess_tokens -= missing
            return
        prompt_missing = min(event.prompt_tokens, event.total_tokens) - int(accounted[:, Phase.PROMPT].sum())
        prompt_missing = min(max(prompt_missing, 0), missing)
        lost = np.zeros(len(Phase) + 1, np.int64)
        lost[Phase.PROMPT], lost[Phase.OUTPUT] = prompt_missing, missing - prompt_missing
        accounted[TokenState.DROPPED] += lost
        engine.tokens[TokenState.DROPPED, Reason.LOST] += lost
        window = FeatureWindow.empty(len(state.features))
        window.tokens_by_state[TokenState.DROPPED] = missing
        state.windows.add(window, now)
