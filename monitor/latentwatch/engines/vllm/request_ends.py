"""How a request ended, or a turn of it, from the scheduler to the worker.

The worker learns only THAT a request ended (`finished_req_ids`), not how many tokens it had. Without the number the
row that async scheduling computes past the end could not be told from a token. So the scheduler's process notes it
when the request is freed and sends it along with the ids. Of a session, which takes input while it runs, the worker
does not even learn that an output of it ended; it is told where, for the same reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from latentwatch.engines.vllm.interfaces import Request, SchedulerOutput

ATTRIBUTE: Final = "latentwatch_ended"
"""On SchedulerOutput: {request id: fields of RequestEnd} for its `finished_req_ids`; travels with its pickle."""
OUTPUT_ENDS_ATTRIBUTE: Final = "latentwatch_output_ends"
"""On SchedulerOutput: {request id: first position past what counts} of sessions that ended an output since the last."""
_ENDED: Final = "_latentwatch_ended"
_TURNS: Final = "_latentwatch_output_ends"
_INPUT_ENDED: Final = "_latentwatch_input_ended"


class RequestEnd(NamedTuple):
    """What the scheduler knows of a request when it ends; -1 for what it did not say."""

    output_tokens: int = -1
    aborted: bool = False
    prompt_tokens: int = -1


def install(scheduler_class: Any, status_class: Any) -> None:
    """Wrap the scheduler's methods that end a request or a turn, and `schedule`, which tells of it. Idempotent.

    Raises: AttributeError: an unknown vLLM. One that knows no sessions is fine.
    """
    if hasattr(scheduler_class, "_latentwatch_wrapped"):
        return
    free, schedule = scheduler_class._free_request, scheduler_class.schedule
    aborted = {status_class.FINISHED_ABORTED}
    if hasattr(status_class, "FINISHED_ERROR"):
        aborted.add(status_class.FINISHED_ERROR)

    def _free_request(self: object, request: Request, *args: object, **kwargs: object) -> object:
        result = free(self, request, *args, **kwargs)
        try:
            # vLLM aborts a session whose client said that no more input comes: that is its regular end.
            was_aborted = request.status in aborted and not getattr(request, _INPUT_ENDED, False)
            end = (int(request.num_output_tokens), was_aborted, int(getattr(request, "num_prompt_tokens", -1)))
            self.__dict__.setdefault(_ENDED, {})[request.request_id] = end
            self.__dict__.get(_TURNS, {}).pop(request.request_id, None)
        except Exception:  # noqa: S110 - the request then closes without a token count, which the books show
            pass
        return result

    def wrapped_schedule(self: object, *args: object, **kwargs: object) -> object:
        output = schedule(self, *args, **kwargs)
        ended = self.__dict__.get(_ENDED)
        if ended:
            ids = output.finished_req_ids
            setattr(output, ATTRIBUTE, {request_id: ended.pop(request_id) for request_id in ids if request_id in ended})
        if turns := self.__dict__.pop(_TURNS, None):
            setattr(output, OUTPUT_ENDS_ATTRIBUTE, turns)
        return output

    scheduler_class._free_request = _free_request
    scheduler_class.schedule = wrapped_schedule
    scheduler_class._latentwatch_wrapped = True
    if hasattr(scheduler_class, "_handle_stopped_request") and hasattr(status_class, "WAITING_FOR_STREAMING_REQ"):
        _follow_sessions(scheduler_class, status_class.WAITING_FOR_STREAMING_REQ)


def _follow_sessions(scheduler_class: Any, waiting: object) -> None:
    stopped, add_request = scheduler_class._handle_stopped_request, scheduler_class.add_request

    def _handle_stopped_request(self: object, request: Request, *args: object, **kwargs: object) -> object:
        finished = stopped(self, request, *args, **kwargs)
        try:
            if not finished:
                self.__dict__.setdefault(_TURNS, {})[request.request_id] = int(request.num_computed_tokens)
        except Exception:  # noqa: S110 - a row past the end of this turn then counts as a token of it
            pass
        return finished

    def wrapped_add_request(self: Any, request: Any, *args: object, **kwargs: object) -> object:
        try:
            existing = self.requests.get(request.request_id)
            if existing is not None and not request.resumable and existing.status == waiting:
                setattr(existing, _INPUT_ENDED, True)
        except Exception:  # noqa: S110 - the session then ends as aborted, which vLLM calls it too
            pass
        return add_request(self, request, *args, **kwargs)

    scheduler_class._handle_stopped_request = _handle_stopped_request
    scheduler_class.add_request = wrapped_add_request


def ended_requests(scheduler_output: SchedulerOutput) -> Mapping[str, RequestEnd]:
    """Per finished request id how it ended; RequestEnd() where the scheduler did not say."""
    told: Mapping[str, tuple[int, bool, int]] = getattr(scheduler_output, ATTRIBUTE, {})
    return {request_id: RequestEnd(*told.get(request_id, ())) for request_id in scheduler_output.finished_req_ids}


def ended_outputs(scheduler_output: SchedulerOutput) -> Mapping[str, int]:
    """Per session that ended an output since the step before: the first position past what counts."""
    turns: Mapping[str, int] = getattr(scheduler_output, OUTPUT_ENDS_ATTRIBUTE, {})
    return turns
