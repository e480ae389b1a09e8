"""What the engine's thread does after each step: row map and scores into a ring slot, and nothing else.

The target is 50 microseconds at 256 requests, so the work is array copies and one list of slot numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import NamedTuple

import numpy as np

from latentwatch.arrays import Array
from latentwatch.client_ids import bounded_id, carried
from latentwatch.engines.vllm import request_ends, row_map, trace_context
from latentwatch.engines.vllm.arming import ArmedHook
from latentwatch.engines.vllm.interfaces import ModelRunner, NewRequest, SchedulerOutput
from latentwatch.engines.vllm.kv_cache import KvCache
from latentwatch.engines.vllm.read_buffers import (
    UNSCORED,
    DeviceHandover,
    HostBuffers,
    Written,
    device_handovers,
    write_compacted,
)
from latentwatch.handover.events import (
    Blocks,
    Closed,
    Event,
    Grown,
    Opened,
    TurnEnded,
    Unannounced,
    encode_events,
    positions_computed,
)
from latentwatch.handover.ring import EVENT_BYTES, REQUEST_DTYPE, Ring, Slot

_STEPS_IN_FLIGHT = 3
_RESERVED_SLOTS = 2
_BLOCKS_PER_EVENT = 2048
"""Numbers of up to eight digits: a quarter of ring.EVENT_BYTES."""
MAX_OWED = 4096
"""Events that wait while the ring is full. Beyond them requests that began and ended meanwhile are folded into sums:
those that live, or that the exporter knows, are few; these may be any number."""


class _Queued(NamedTuple):
    """A step whose scores are still on their way from the GPU."""

    step: int
    time_unix_nano: int
    requests_Q: Array
    rows: int
    events: list[Event]
    handover: DeviceHandover


class Requests:
    """The engine's live requests, the table slots that they hold, and the KV blocks that they were given."""

    def __init__(self, cache: KvCache | None) -> None:
        self._cache = cache
        self._blocks: dict[str, list[int]] = {}
        self.slot_of: dict[str, int] = {}
        self._free: list[int] = []
        self._handles = 0
        self._reached = np.zeros(256, np.int64)
        """By slot: the first position past what its request has computed."""
        self._prompt: dict[int, int] = {}
        """By slot: the prompt tokens that were announced."""

    def update(self, scheduler_output: SchedulerOutput) -> list[Event]:
        """Take the openings and closings that the scheduler announces with a step; closings come first."""
        events: list[Event] = []
        if scheduler_output.finished_req_ids:
            for request_id, end in request_ends.ended_requests(scheduler_output).items():
                slot = self.slot_of.pop(request_id, None)
                if slot is not None:
                    self._blocks.pop(request_id, None)
                    self._free.append(slot)
                    # The number of tokens says how many positions there were; without one, only the steps do.
                    reached = int(self._reached[slot]) if end.output_tokens <= 0 else 0
                    events.append(Closed(slot, end.output_tokens, end.aborted, reached, end.prompt_tokens))
        for request_id, stop in request_ends.ended_outputs(scheduler_output).items():
            if (slot := self.slot_of.get(request_id)) is not None:
                self._reached[slot] = min(stop, self._reached[slot])
                events.append(TurnEnded(slot, stop))
        for new in scheduler_output.scheduled_new_reqs:
            if (slot := self.slot_of.get(new.req_id)) is None:
                events.append(self._open(new))
            elif self._prompt[slot] != (grown := prompt_tokens_of(new)):
                # A session went on with more input. One that was preempted is told as new too, on one of the runners.
                self._prompt[slot] = grown
                events.append(Grown(slot, grown))
        if self._cache is not None:
            events += _in_lines(self._given(scheduler_output, self._cache))
        return events

    def reach(self, slot_Q: Array, end_Q: Array) -> None:
        """A step computed these requests up to here."""
        self._reached[slot_Q] = np.maximum(self._reached[slot_Q], end_Q)  # one that was preempted begins further back

    def blocks_again(self) -> list[Event]:
        """The KV blocks of every live request, for an exporter that does not know what became of them."""
        return _in_lines([[self.slot_of[name], 0, len(blocks), *blocks] for name, blocks in self._blocks.items()])

    def _given(self, scheduler_output: SchedulerOutput, cache: KvCache) -> list[list[int]]:
        """The KV blocks of this step, as events.Blocks has them."""
        group, size = cache.group, cache.block_size
        given = []
        for new in scheduler_output.scheduled_new_reqs:
            self._blocks[new.req_id] = blocks = list(new.block_ids[group])
            given.append([self.slot_of[new.req_id], 0, new.num_computed_tokens // size, *blocks])
        cached = scheduler_output.scheduled_cached_reqs
        for i, ids in enumerate(cached.new_block_ids):
            if ids is None:
                continue
            name = cached.req_ids[i]
            if name in cached.resumed_req_ids:
                self._blocks[name] = []
                hits = cached.num_computed_tokens[i] // size
            else:
                hits = 0
            before = self._blocks[name]
            given.append([self.slot_of[name], len(before), hits, *ids[group]])
            before += ids[group]
        return given

    def _open(self, new: NewRequest) -> Opened:
        slot = self._free.pop() if self._free else len(self.slot_of)
        self._handles += 1
        told = trace_context.told_of(new)
        # The worker's runner re-adds a preempted request as new, with its output in the prefill; it has a slot then.
        opened = Opened(
            slot=slot,
            handle=self._handles,
            request_id=bounded_id(new.req_id),
            prompt_tokens=prompt_tokens_of(new),
            cached=int(new.num_computed_tokens),
            adapter=carried(str(getattr(new.lora_request, "lora_name", None) or "")),
            traceparent=told.traceparent,
            untraced=told.untraced,
            response_id=told.response_id,
        )
        self.slot_of[new.req_id] = slot
        self._prompt[slot] = opened.prompt_tokens
        if slot >= len(self._reached):
            self._reached = np.concatenate([self._reached, np.zeros_like(self._reached)])
        self._reached[slot] = opened.cached
        return opened


def prompt_tokens_of(new: NewRequest) -> int:
    """Positions of a prompt, given as tokens or as embeddings; of a session all that it was given or said before."""
    told: int | None = getattr(new, "prompt_len", None)
    if told is not None:
        return told
    # vLLM before NewRequestData.prompt_len.
    if new.prompt_token_ids is not None:
        return len(new.prompt_token_ids)
    embeds = getattr(new, "prompt_embeds", None)
    return 0 if embeds is None else int(embeds.shape[0])


def _in_lines(given: list[list[int]]) -> list[Event]:
    """Cut into events of which each fits into a ring slot with room to spare."""
    lines: list[Event] = []
    room = 0
    for slot, at, hits, *blocks in given:
        for cut in range(0, len(blocks), _BLOCKS_PER_EVENT):
            piece = blocks[cut : cut + _BLOCKS_PER_EVENT]
            if len(piece) > room:
                lines.append(Blocks([]))
                room = _BLOCKS_PER_EVENT
            last = lines[-1]
            assert isinstance(last, Blocks)
            last.given.append([slot, at + cut, min(max(hits - cut, 0), len(piece)), *piece])
            room -= len(piece)
    return lines


def _folded(owed: Sequence[Event]) -> list[Event]:
    """The same books in few events: requests that began and ended in them become sums, KV blocks are left out."""
    told: list[Event] = []
    begun: dict[int, Opened] = {}
    turns: dict[int, TurnEnded] = {}
    grown: dict[int, Grown] = {}
    sums = Unannounced(0, 0, 0)
    for event in owed:
        if isinstance(event, Opened):
            begun[event.slot] = event
        elif isinstance(event, Unannounced):
            sums = Unannounced(*(a + b for a, b in zip(astuple(sums), astuple(event), strict=True)))
        elif isinstance(event, Closed) and event.slot in begun:
            sums = _with(sums, begun.pop(event.slot), event)
        elif isinstance(event, Closed):
            # Of a session's turns the first says which of the rows that the exporter has are true.
            told += [of.pop(event.slot) for of in (turns, grown) if event.slot in of]
            told.append(event)
        elif isinstance(event, Grown) and event.slot in begun:
            begun[event.slot] = dataclasses.replace(begun[event.slot], prompt_tokens=event.prompt_tokens)
        elif isinstance(event, Grown):
            grown[event.slot] = event
        elif isinstance(event, TurnEnded) and event.slot not in begun:
            turns.setdefault(event.slot, event)
    return [*told, *turns.values(), *grown.values(), sums, *begun.values()]


def _with(sums: Unannounced, opened: Opened, closed: Closed) -> Unannounced:
    total = positions_computed(opened.prompt_tokens, closed, opened.cached)
    prompt = min(total, opened.prompt_tokens)
    return Unannounced(
        sums.requests + 1,
        sums.prompt_tokens + prompt,
        sums.output_tokens + total - prompt,
        sums.untraced + opened.untraced,
    )


class StepTap:
    """Hands every step over to the exporter, scored or not."""

    def __init__(self, ring: Ring, hooks: Sequence[ArmedHook], *, on_gpu: bool, cache: KvCache | None = None) -> None:
        self._ring = ring
        self._hooks = hooks
        self._through_handovers = bool(hooks) and on_gpu
        self._host = HostBuffers(hooks) if hooks and not on_gpu else None
        self._handovers = (
            device_handovers(hooks, ring.geometry.max_fires, _STEPS_IN_FLIGHT) if self._through_handovers else []
        )
        self._queue: list[_Queued] = []
        self._requests = Requests(cache)
        self._owed: list[Event] = []
        self._max_owed = MAX_OWED + 2 * ring.geometry.max_requests
        self._step = 0
        self._row_map = np.empty(ring.geometry.max_requests, REQUEST_DTYPE)

    def after_step(self, runner: ModelRunner, scheduler_output: SchedulerOutput) -> None:
        """Called right after the forward of each step, on the engine's thread."""
        self._owed += self._requests.update(scheduler_output)
        if len(self._owed) > self._max_owed:
            self._owed = [*_folded(self._owed), *self._requests.blocks_again()]
        rows = int(scheduler_output.total_num_scheduled_tokens)
        self._flush_ready(wait=rows == 0)
        if rows:
            self._step += 1
        elif not self._owed:
            return
        requests_Q = self._read_rows(runner, scheduler_output) if rows else self._row_map[:0]
        if rows and self._through_handovers:
            self._queue_handover(requests_Q, rows)
            return
        host = self._host
        self._publish(
            self._step,
            time.time_ns(),
            requests_Q,
            rows,
            lambda slot: host.write(slot, rows) if host and rows else UNSCORED,
        )
        if host is not None:
            host.reset()

    def exporter_restarted(self) -> None:
        """It goes on from where the one before stopped, but for the KV blocks and what they hold."""
        self._owed += self._requests.blocks_again()

    def _read_rows(self, runner: ModelRunner, scheduler_output: SchedulerOutput) -> Array:
        step = row_map.read(runner, scheduler_output)
        slot_of = self._requests.slot_of
        requests_Q = self._row_map[: len(step.request_ids)]
        requests_Q["slot"] = np.fromiter(map(slot_of.__getitem__, step.request_ids), np.int32, len(requests_Q))
        requests_Q["start"] = step.start
        requests_Q["count"] = step.count
        self._requests.reach(requests_Q["slot"], step.start + step.count)
        return requests_Q

    def _publish(
        self, step: int, now_ns: int, requests_Q: Array, rows: int, write_scores: Callable[[Slot], Written]
    ) -> None:
        # A step without rows only says how requests ended; an idle engine makes no other, so it must get through.
        slot = self._ring.reserve(leave_free=_RESERVED_SLOTS if rows else 0)
        if slot is None:
            self._ring.count_dropped()
            return
        events = self._events_that_fit()
        slot.events[: len(events)] = np.frombuffer(events, np.uint8)
        written = write_scores(slot)
        if self._owed:
            # Rows of a request that is not announced yet could not be attributed.
            self._ring.count_dropped()
            requests_Q, rows, written = requests_Q[:0], 0, UNSCORED
        slot.requests_Q[: len(requests_Q)] = requests_Q
        self._ring.commit(
            slot,
            step=step,
            time_unix_nano=now_ns,
            requests=len(requests_Q),
            rows=rows,
            scored_rows=written.scored_rows,
            fires=written.fires,
            silent=written.silent,
            events=len(events),
        )

    def _events_that_fit(self) -> bytes:
        """The owed events as bytes, leaving in `_owed` those that the slot has no room for."""
        data = bytearray()
        fit = 0
        for event in self._owed:
            line = encode_events([event])
            if len(data) + len(line) > EVENT_BYTES:
                break
            data += line
            fit += 1
        self._owed = self._owed[fit:]
        return bytes(data)

    def _queue_handover(self, requests_Q: Array, rows: int) -> None:
        if not self._handovers:
            # The GPU's copies are further behind than we have buffers for; the events wait for the next step.
            self._ring.count_dropped()
            for hook in self._hooks:
                hook.reset()
            return
        handover = self._handovers.pop()
        handover.start(rows)
        self._queue.append(_Queued(self._step, time.time_ns(), requests_Q.copy(), rows, self._owed, handover))
        self._owed = []

    def _flush_ready(self, *, wait: bool) -> None:
        """Publish the steps whose scores have arrived from the GPU, oldest first."""
        while self._queue:
            queued = self._queue[0]
            if wait:
                queued.handover.wait()
            elif not queued.handover.ready():
                return
            self._queue.pop(0)
            compacted, silent = queued.handover.result()
            owed, self._owed = self._owed, queued.events
            self._publish(
                queued.step,
                queued.time_unix_nano,
                queued.requests_Q,
                queued.rows,
                functools.partial(write_compacted, step=compacted, silent=silent),
            )
            self._owed += owed
            self._handovers.append(queued.handover)
