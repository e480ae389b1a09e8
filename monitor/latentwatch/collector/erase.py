"""What is forgotten of a request when somebody asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from latentwatch.client_ids import IdKind, kinds_of
from latentwatch.collector.state import CollectorState
from latentwatch.collector.step_listener import StepListener
from latentwatch.facts import RequestInfo
from latentwatch.names import trace_id


def forget(state: CollectorState, listeners: Sequence[StepListener], meant: Mapping[IdKind, Sequence[str]]) -> None:
    """Let go of the closed requests with one of these ids, and of no other; see client_ids.meanings.

    Their summaries go, and their ids wherever they stand: at exceedances, exemplars and examples of drift. What
    they added to counts stays, and that some request went above a limit.
    """
    known = {request.collector_serial: request for request in (*state.index.closed(), *state.exceedances.requests())}
    gone = [
        request
        for request in known.values()
        if request.collector_serial not in state.slots.by_serial and _is_meant(request.info, meant)
    ]
    ids = {*meant.get(IdKind.REQUEST, ()), *(request.info.request_id for request in gone)} - {""}

    def is_gone(request_id: str) -> bool:
        return request_id in ids

    for model in state.models.values():
        model.latest = {f: exemplar for f, exemplar in model.latest.items() if not is_gone(exemplar.request_id)}
    for listener in listeners:
        listener.forget(is_gone)
    for request in gone:
        state.index.drop(request)
        request.info = replace(request.info, request_id="", response_id="", traceparent="")


def _is_meant(info: RequestInfo, meant: Mapping[IdKind, Sequence[str]]) -> bool:
    return bool(kinds_of(meant, response=info.response_id, request=info.request_id, trace=trace_id(info.traceparent)))
