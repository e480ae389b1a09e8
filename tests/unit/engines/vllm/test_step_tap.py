"""The engine's side of the hand-over, without an engine: what the tap writes, the exporter's ledger reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from latentwatch.client_ids import bounded_id
from latentwatch.engines.vllm import request_ends, row_map
from latentwatch.engines.vllm.arming import ArmedHook
from latentwatch.engines.vllm.kv_cache import KvCache
from latentwatch.engines.vllm.read_buffers import HostBuffers, write_compacted
from latentwatch.engines.vllm.step_tap import MAX_OWED, Requests, StepTap, prompt_tokens_of
from latentwatch.exporter.ledger import Ledger
from latentwatch.exporter.score_cache import ScoreCache
from latentwatch.handover.events import Blocks, Event, Grown, encode_events
from latentwatch.handover.ring import EVENT_BYTES, Geometry, Ring
from latentwatch.kernels import reference
from latentwatch.kernels.reference import UNWRITTEN
from latentwatch.names import Outcome, Reason, TokenState
from latentwatch.step.batch import UNANNOUNCED, EngineCounters

from tests.support import tiny
from tests.support.fake_model import scheduled


@pytest.fixture
def hooks(tmp_path: Any) -> tuple[ArmedHook, ...]:
    watchlist = tiny.watchlist(tmp_path / "w.safetensors", sparse=4, dense=1)
    made = tuple(ArmedHook(rows, torch.zeros(32, 5), torch.ones(32, 3)) for rows in watchlist.hooks)
    for hook in made:
        hook.stat_T3[:, 2] = 0
        hook.reset()
    return made


def forward(hooks: tuple[ArmedHook, ...], rows: int, value: float = 2.0) -> None:
    """What the op does to the buffers in one step: feature 1 fires on even rows, the probe says `value`."""
    for hook in hooks:
        hook.act_TK[:rows] = 0.0
        hook.act_TK[:rows:2, 1] = value
        hook.act_TK[:rows, 4] = -value
        hook.stat_T3[:rows, 0] = 7.0


def v1_runner(starts: dict[str, int]) -> Any:
    batch = SimpleNamespace(
        req_ids=list(starts), num_reqs=len(starts), num_computed_tokens_cpu=np.array([*starts.values(), 99], np.int32)
    )
    return SimpleNamespace(input_batch=batch, execute_model_state=None)


def geometry(hooks: tuple[ArmedHook, ...]) -> Geometry:
    return Geometry(max_requests=8, max_rows=32, features=5 * len(hooks), dense=len(hooks), hook_points=len(hooks))


def test_scores_arrive_at_the_ledger_with_their_request_and_position(hooks):
    ring = Ring.create(geometry(hooks))
    reader = Ring(ring.fd, ring.geometry, create=False)
    tap, ledger = StepTap(ring, hooks, on_gpu=False), Ledger(armed=True, drafts=False)
    forward(hooks, 5)
    tap.after_step(v1_runner({"a": 0, "b": 0}), scheduled({"a": 3, "b": 2}, new=[("a", 3), ("b", 2)]))
    tap.after_step(v1_runner({}), scheduled({}, finished={"a": (1, False), "b": (1, False)}))
    batches = []
    while (raw := reader.peek()) is not None:
        batches.append(ledger.settle(raw, EngineCounters()))
        reader.release()
    scored = batches[1]
    assert [(int(s["start"]), int(s["count"])) for s in scored.segments_S] == [(0, 3), (0, 2)]
    assert scored.fires_N.tolist() == [(r, f, 2.0) for r in (0, 2, 4) for f in (1, 6)]
    assert (scored.dense_RP == -2.0).all()
    assert (scored.norm_RH == 7.0).all()
    assert sorted(closed.request_id for closed in scored.closed) == ["a", "b"]


def test_a_forward_without_the_op_is_reported_silent_and_the_next_one_is_not(hooks):
    ring = Ring.create(geometry(hooks))
    tap = StepTap(ring, hooks, on_gpu=False)
    forward(hooks, 2)
    tap.after_step(v1_runner({"a": 0}), scheduled({"a": 2}, new=[("a", 2)]))
    tap.after_step(v1_runner({"a": 2}), scheduled({"a": 1}))  # no forward() before: nothing was written
    assert ring.peek().silent is False
    ring.release()
    assert ring.peek().silent is True


def test_a_full_ring_costs_steps_but_no_opening_or_closing_even_if_the_engine_then_idles(hooks):
    ring = Ring.create(geometry(hooks))
    reader = Ring(ring.fd, ring.geometry, create=False)
    tap, ledger = StepTap(ring, hooks, on_gpu=False), Ledger(armed=True, drafts=False)
    room = ring.slots - 2  # two are kept for steps without rows
    steps = room + 5
    for step in range(steps):
        forward(hooks, 1)
        tap.after_step(v1_runner({"a": step}), scheduled({"a": 1}, new=[("a", 1)] if step == 0 else []))
    batches = []
    tap.after_step(v1_runner({}), scheduled({}, finished={"a": (steps, False)}))
    while (raw := reader.peek()) is not None:
        batches.append(ledger.settle(raw, EngineCounters()))
        reader.release()
    assert ring.dropped_steps == 5
    tokens = {TokenState.SCORED: 0, TokenState.DROPPED: 0}
    for batch in batches:
        for segment in batch.segments_S:
            tokens[TokenState(segment["state"])] += int(segment["count"])
            assert segment["reason"] in (Reason.NONE, Reason.RING_FULL)
    assert tokens == {TokenState.SCORED: room, TokenState.DROPPED: 5}
    assert batches[-1].closed[0].total_tokens == steps


def test_while_nobody_reads_what_is_owed_stays_bounded_and_no_token_is_missing_in_the_books(hooks):
    """ "a" lives through it, "b" was known and ends meanwhile, thousands come and go: of those only sums are told."""
    ring = Ring.create(geometry(hooks))
    reader = Ring(ring.fd, ring.geometry, create=False)
    tap, ledger = StepTap(ring, hooks, on_gpu=False), Ledger(armed=True, drafts=False)
    tap.after_step(v1_runner({"a": 0, "b": 0}), scheduled({"a": 1, "b": 1}, new=[("a", 1), ("b", 1)]))
    batches = [ledger.settle(reader.peek(), EngineCounters())]
    reader.release()
    ring.reserve = lambda leave_free=0: None  # no slot is ever free
    ended = {"b": (4, False)}
    most = 0
    for i in range(MAX_OWED):
        step = {"a": 1, f"r{i}": 3} | ({"b": 3} if i == 0 else {})
        tap.after_step(
            v1_runner({"a": i + 1, f"r{i}": 2} | ({"b": 1} if i == 0 else {})),
            scheduled(step, new=[(f"r{i}", 5)], hits={f"r{i}": 2}, finished=ended if i else {}),
        )
        # Every other one is aborted before it has a token.
        ended = ({} if i else ended) | {f"r{i}": (1, False) if i % 2 else (0, True)}
        most = max(most, len(tap._owed))
    assert most <= MAX_OWED + 2 * ring.geometry.max_requests
    del ring.reserve
    for i in range(MAX_OWED, MAX_OWED + 400):
        tap.after_step(v1_runner({"a": i + 1}), scheduled({"a": 1}, finished=ended))
        ended = {}
        while (raw := reader.peek()) is not None:
            batches.append(ledger.settle(raw, EngineCounters()))
            reader.release()
    tap.after_step(v1_runner({}), scheduled({}, finished={"a": (MAX_OWED + 401, False)}))
    batches.append(ledger.settle(reader.peek(), EngineCounters()))
    outcomes = {
        closed.request_id: (closed.outcome, closed.total_tokens) for batch in batches for closed in batch.closed
    }
    assert outcomes["a"] == (Outcome.FINISHED, MAX_OWED + 401)
    assert outcomes["b"] == (Outcome.FINISHED, 4)
    tokens: dict[int, int] = {}
    for segment in (segment for batch in batches for segment in batch.segments_S):
        tokens[int(segment["handle"])] = tokens.get(int(segment["handle"]), 0) + int(segment["count"])
    told = {opened.handle for batch in batches for opened in batch.opened} - {1, 2}
    assert batches[-1].counters.unannounced_requests == MAX_OWED - len(told) > 0
    assert tokens[1] == MAX_OWED + 401 and tokens[2] == 4
    assert all(tokens[handle] == 5 for handle in told)
    assert tokens[UNANNOUNCED] == 5 * (MAX_OWED - len(told))
    assert not tap._owed


def test_a_request_id_as_long_as_a_slot_reaches_the_exporter_as_its_digest(hooks):
    ring = Ring.create(geometry(hooks))
    tap = StepTap(ring, hooks, on_gpu=False)
    name = "cmpl-" + "\u4e00" * EVENT_BYTES + "-0-0123abcd"
    tap.after_step(v1_runner({name: 0}), scheduled({name: 1}, new=[(name, 1)]))
    (opened,) = Ledger(armed=True, drafts=False).settle(ring.peek(), EngineCounters()).opened
    assert opened.request_id == bounded_id(name) != bounded_id(name + "0")


CACHE = KvCache(group=0, blocks=100_000, block_size=4)


def given(events: list[Event]) -> list[list[int]]:
    return [table for event in events if isinstance(event, Blocks) for table in event.given]


def test_kv_blocks_are_told_as_the_scheduler_gives_them():
    requests = Requests(CACHE)
    first = scheduled({"a": 2}, new=[("a", 10)], blocks={"a": [5, 6, 9]}, hits={"a": 8})
    assert given(requests.update(first)) == [[0, 0, 2, 5, 6, 9]]
    assert given(requests.update(scheduled({"a": 1}))) == []
    assert given(requests.update(scheduled({"a": 1}, blocks={"a": [7]}))) == [[0, 3, 0, 7]]
    again = scheduled({"a": 9}, blocks={"a": [5, 1, 2]}, hits={"a": 4}, resumed={"a"})
    assert given(requests.update(again)) == [[0, 0, 1, 5, 1, 2]]
    # The V2 runner is told of a resumed request as of a new one.
    assert given(requests.update(scheduled({"a": 9}, new=[("a", 10)], blocks={"a": [8]}))) == [[0, 0, 0, 8]]
    assert given(requests.blocks_again()) == [[0, 0, 1, 8]]
    requests.update(scheduled({}, finished={"a": (1, False)}))
    assert requests.blocks_again() == []


def test_a_request_with_more_blocks_than_an_event_holds_is_told_in_pieces():
    requests = Requests(CACHE)
    blocks = list(range(10_000, 15_000))
    events = requests.update(scheduled({"a": 1}, new=[("a", 20_000)], blocks={"a": blocks}, hits={"a": 4 * 3000}))
    assert all(len(encode_events([event])) < EVENT_BYTES for event in events)
    tables = given(events)
    assert [block for _, _, _, *piece in tables for block in piece] == blocks
    assert [(at, hits, len(piece)) for _, at, hits, *piece in tables] == [
        (0, 2048, 2048),
        (2048, 952, 2048),
        (4096, 0, 904),
    ]


def test_a_hit_inherits_through_the_ring(hooks):
    ring = Ring.create(geometry(hooks))
    reader = Ring(ring.fd, ring.geometry, create=False)
    tap = StepTap(ring, hooks, on_gpu=False, cache=CACHE)
    kept = ScoreCache(blocks=100, block_size=4, dense=len(hooks), hook_points=len(hooks))
    ledger = Ledger(armed=True, drafts=False, score_cache=kept)
    forward(hooks, 6)
    tap.after_step(v1_runner({"a": 0}), scheduled({"a": 6}, new=[("a", 6)], blocks={"a": [3, 4]}))
    forward(hooks, 2, value=5.0)
    second = scheduled({"b": 2}, new=[("b", 6)], blocks={"b": [3, 8]}, hits={"b": 4}, finished={"a": (1, False)})
    tap.after_step(v1_runner({"b": 4}), second)
    tap.after_step(v1_runner({}), scheduled({}, finished={"b": (1, False)}))
    batches = []
    while (raw := reader.peek()) is not None:
        batches.append(ledger.settle(raw, EngineCounters()))
        reader.release()
    assert [(int(s["start"]), int(s["count"]), int(s["state"])) for s in batches[2].segments_S] == [
        (0, 4, TokenState.INHERITED),
        (4, 2, TokenState.SCORED),
    ]
    assert batches[2].fires_N.tolist() == [(r, f, v) for r, v in ((0, 2.0), (2, 2.0), (4, 5.0)) for f in (1, 6)]


def test_more_activations_than_the_slot_holds_cut_whole_rows_and_say_which(hooks):
    ring = Ring.create(geometry(hooks))
    slot = ring.reserve()
    for hook in hooks:
        hook.act_TK[:6, :4] = 1.0
        hook.stat_T3[:6, 0] = 1.0
    buffers = HostBuffers(hooks)
    assert buffers.write(slot, 6)[:2] == (6, 48)
    slot.fires_N = slot.fires_N[:23]  # eight activations a row: two whole rows fit
    assert buffers.write(slot, 6)[:2] == (2, 16)


def test_what_a_gpu_compacted_lies_in_the_slot_as_what_a_cpu_compacted(hooks):
    """The GPU's own compaction is held against the same reference in tests/unit/kernels."""
    forward(hooks, 5)
    ring = Ring.create(geometry(hooks))
    slot = ring.reserve()
    on_cpu = HostBuffers(hooks).write(slot, 5)
    fires, dense, norm = slot.fires_N[: on_cpu.fires].copy(), slot.dense_TP[:5].copy(), slot.norm_TH[:5].copy()
    slot.fires_N[:], slot.dense_TP[:], slot.norm_TH[:] = 0, 0, 0
    dense_F = torch.tensor([feature.dense for hook in hooks for feature in hook.rows.features])
    acts, stats = [hook.act_TK for hook in hooks], [hook.stat_T3 for hook in hooks]
    compacted = reference.compact(acts, stats, dense_F, 5, capacity=100)
    assert write_compacted(slot, compacted, silent=False) == on_cpu
    np.testing.assert_array_equal(
        np.sort(slot.fires_N[: on_cpu.fires], order=["row", "feature"]), np.sort(fires, order=["row", "feature"])
    )
    np.testing.assert_array_equal(slot.dense_TP[:5], dense)
    np.testing.assert_array_equal(slot.norm_TH[:5], norm)


def test_dense_scores_beyond_float16_are_clipped_on_their_way_into_the_slot(hooks):
    """An infinity in the wire's float16 would be refused by the collector, with the whole step."""
    forward(hooks, 2)
    column, hook = next((i, hook) for hook in hooks for i, feature in enumerate(hook.rows.features) if feature.dense)
    hook.act_TK[:2, column] = torch.tensor([1e6, -1e6])
    slot = Ring.create(geometry(hooks)).reserve()
    HostBuffers(hooks).write(slot, 2)
    assert {-65504.0, 65504.0} <= set(slot.dense_TP[:2].ravel().tolist())
    assert np.isfinite(slot.dense_TP[:2]).all()


def test_the_sentinel_is_put_back_after_every_step(hooks):
    tap = StepTap(Ring.create(geometry(hooks)), hooks, on_gpu=False)
    forward(hooks, 2)
    tap.after_step(v1_runner({"a": 0}), scheduled({"a": 2}, new=[("a", 2)]))
    assert all(float(hook.stat_T3[0, 0]) == UNWRITTEN for hook in hooks)


def test_the_v2_row_map_follows_the_batch_order_not_the_schedulers():
    batch = SimpleNamespace(
        req_ids=["decode", "prefill"],
        num_reqs=2,
        num_tokens=6,
        num_computed_tokens_np=np.array([9, 0]),
        query_start_loc_np=np.array([0, 1, 6, 6]),
    )
    runner = SimpleNamespace(execute_model_state=SimpleNamespace(input_batch=batch))
    step = row_map.read(runner, scheduled({"prefill": 5, "decode": 1}))
    assert (list(step.request_ids), step.start.tolist(), step.count.tolist()) == (
        ["decode", "prefill"],
        [9, 0],
        [1, 5],
    )


class _Status:
    FINISHED_STOPPED, FINISHED_ABORTED = 1, 2


class _Scheduler:
    """The two methods of vLLM's scheduler that finish.install() wraps."""

    def __init__(self) -> None:
        self.finished: set[str] = set()

    def _free_request(self, request: Any) -> str:
        self.finished.add(request.request_id)
        return "freed"

    def schedule(self) -> Any:
        finished, self.finished = self.finished, set()
        return SimpleNamespace(finished_req_ids=finished)


def test_how_a_request_ended_travels_with_the_schedulers_own_message():
    request_ends.install(_Scheduler, _Status)
    request_ends.install(_Scheduler, _Status)  # a second load of the plugin changes nothing
    scheduler = _Scheduler()
    assert scheduler._free_request(SimpleNamespace(request_id="a", num_output_tokens=7, status=1)) == "freed"
    scheduler._free_request(SimpleNamespace(request_id="b", num_output_tokens=0, status=2))
    assert request_ends.ended_requests(scheduler.schedule()) == {"a": (7, False, -1), "b": (0, True, -1)}
    assert request_ends.ended_requests(scheduler.schedule()) == {}


def test_a_scheduler_that_does_not_say_how_a_request_ended_is_read_as_unknown():
    assert request_ends.ended_requests(SimpleNamespace(finished_req_ids={"a"})) == {"a": (-1, False, -1)}


def test_the_prompt_is_as_long_as_what_vllm_computes_of_it_given_as_embeddings_or_as_tokens():
    """NewRequestData of a prompt of embeddings has no token ids; before 0.32 it had no prompt_len either."""
    embedded = SimpleNamespace(prompt_token_ids=None, prompt_embeds=torch.zeros(40, 8))
    assert prompt_tokens_of(embedded) == 40
    assert prompt_tokens_of(SimpleNamespace(prompt_token_ids=[1, 2], prompt_embeds=None)) == 2
    assert prompt_tokens_of(SimpleNamespace(prompt_len=7, prompt_token_ids=[1], prompt_embeds=None)) == 7


class _SessionStatus(_Status):
    WAITING_FOR_STREAMING_REQ = 3


class _SessionScheduler:
    """The same of a vLLM that takes input while a request runs."""

    _free_request, schedule = _Scheduler._free_request, _Scheduler.schedule

    def __init__(self) -> None:
        self.finished: set[str] = set()
        self.requests: dict[str, Any] = {}

    def add_request(self, request: Any) -> None:
        existing = self.requests.setdefault(request.request_id, request)
        if existing is not request and not request.resumable:
            existing.status = _SessionStatus.FINISHED_ABORTED
            self._free_request(existing)

    def _handle_stopped_request(self, request: Any) -> bool:
        return not request.resumable


def a_session(**changes: Any) -> Any:
    fields = {"request_id": "s", "resumable": True, "status": 1, "num_output_tokens": 2, "num_computed_tokens": 9}
    return SimpleNamespace(**{**fields, "num_prompt_tokens": 8, **changes})


def test_the_end_of_a_sessions_output_travels_and_its_last_input_is_no_abort():
    request_ends.install(_SessionScheduler, _SessionStatus)
    scheduler, session = _SessionScheduler(), a_session()
    scheduler.add_request(session)
    assert scheduler._handle_stopped_request(session) is False
    assert request_ends.ended_outputs(scheduler.schedule()) == {"s": 9}
    assert request_ends.ended_outputs(scheduler.schedule()) == {}
    session.status = _SessionStatus.WAITING_FOR_STREAMING_REQ
    scheduler.add_request(a_session(resumable=False))
    assert request_ends.ended_requests(scheduler.schedule()) == {"s": (2, False, 8)}


def test_a_session_is_told_anew_with_each_input_and_not_when_it_was_preempted(hooks):
    requests = Requests(None)
    requests.update(scheduled({"s": 3}, new=[("s", 3)]))
    assert requests.update(scheduled({"s": 4}, new=[("s", 9)])) == [Grown(0, 9)]
    assert requests.update(scheduled({"s": 4}, new=[("s", 9)])) == []
