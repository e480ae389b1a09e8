"""How a request ended, from the scheduler to the worker.

The worker learns only THAT a request ended (`finished_req_ids`), not how many tokens it had. Without the number the
row that async scheduling computes past the end could not be told from a token. So the scheduler's process notes it
when the request is freed and sends it along with the ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from latentwatch.engines.vllm.interfaces import Request, SchedulerOutput

ATTRIBUTE: Final = "latentwatch_ended"
"""On SchedulerOutput: {request id: (output tokens, aborted)} for its `finished_req_ids`; travels with its pickle."""


def install(scheduler_class: Any, status_class: Any) -> None:
    """Wrap `_free_request` and `schedule` of vLLM's scheduler. Idempotent. Raises AttributeError on an unknown vLLM."""
    if hasattr(scheduler_class, "_latentwatch_wrapped"):
        return
    free, schedule = scheduler_class._free_request, scheduler_class.schedule
    aborted = {status_class.FINISHED_ABORTED}
    if hasattr(status_class, "FINISHED_ERROR"):
        aborted.add(status_class.FINISHED_ERROR)

    def _free_request(self: object, request: Request, *args: object, **kwargs: object) -> object:
        result = free(self, request, *args, **kwargs)
        try:
            ended = self.__dict__.setdefault("_latentwatch_ended", {})
            ended[request.request_id] = (int(request.num_output_tokens), request.status in aborted)
        except Exception:  # noqa: S110 - the request then closes without a token count, which the books show
            pass
        return result

    def wrapped_schedule(self: object, *args: object, **kwargs: object) -> object:
        output = schedule(self, *args, **kwargs)
        ended = self.__dict__.get("_latentwatch_ended")
        if ended:
            ids = output.finished_req_ids
            setattr(output, ATTRIBUTE, {request_id: ended.pop(request_id) for request_id in ids if request_id in ended})
        return output

    scheduler_class._free_request = _free_request
    scheduler_class.schedule = wrapped_schedule
    scheduler_class._latentwatch_wrapped = True


def ended_requests(scheduler_output: SchedulerOutput) -> Mapping[str, tuple[int, bool]]:
    """Per finished request id: (output tokens, aborted); (-1, False) where the scheduler did not say."""
    told: Mapping[str, tuple[int, bool]] = getattr(scheduler_output, ATTRIBUTE, {})
    return {request_id: told.get(request_id, (-1, False)) for request_id in scheduler_output.finished_req_ids}
