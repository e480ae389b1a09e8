"""What is forgotten of a request when somebody asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from latentwatch.collector.state import CollectorState
from latentwatch.collector.step_listener import StepListener
from latentwatch.names import response_id


def forget(state: CollectorState, listeners: Sequence[StepListener], name: str) -> None:
    """Let go of the closed requests with this engine request id, response id or trace id.

    Their summaries go, and their ids wherever they stand: at exceedances, exemplars and examples of drift. What
    they added to counts stays, and that some request went above a limit.
    """
    known = {request.collector_serial: request for request in (*state.index.closed(), *state.exceedances.requests())}
    gone = [
        request
        for request in known.values()
        if request.collector_serial not in state.slots.by_serial and request.info.is_named(name)
    ]
    names = {name, *(request.info.request_id for request in gone)}

    def is_gone(request_id: str) -> bool:
        return request_id in names or response_id(request_id) in names

    for model in state.models.values():
        model.latest = {f: exemplar for f, exemplar in model.latest.items() if not is_gone(exemplar.request_id)}
    for listener in listeners:
        listener.forget(is_gone)
    for request in gone:
        state.index.drop(request)
        request.info = replace(request.info, request_id="", traceparent="")
