"""An exporter may die between any two instructions: what its engine computed is in the books, once, with its scores.

The real tap, ring, exporter and buffers in one process; deaths are exceptions that nothing catches, after which only
what lies in the ring and the spool is left. The collector takes each number once, as the real one does.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latentwatch.engines.vllm import step_tap
from latentwatch.engines.vllm.arming import ArmedHook
from latentwatch.engines.vllm.kv_cache import KvCache
from latentwatch.engines.vllm.step_tap import StepTap
from latentwatch.exporter.forwarding import Before, Exporter
from latentwatch.exporter.ledger import Ledger
from latentwatch.exporter.score_cache import ScoreCache
from latentwatch.exporter.state import ExporterState
from latentwatch.handover.events import Opened
from latentwatch.handover.ring import Geometry, Ring
from latentwatch.names import Reason, TokenState
from latentwatch.step.batch import UNANNOUNCED, StepBatch, owns_rows
from latentwatch.transport import codec
from latentwatch.transport.send_buffer import Drop
from latentwatch.transport.sender import Sender, SenderStats
from latentwatch.transport.sink import ReceivedBatch
from latentwatch.transport.spool import SpoolFolder, SpoolSettings

from tests.chaos.scheduler import BLOCK, POOL, ROWS, Scheduler, Step
from tests.support import tiny
from tests.support.streams import hello

DENSE = 1
SPARSE = 4


class Died(BaseException):
    """A SIGKILL: nothing of ours catches it."""


class Collector:
    """Takes each number once, and each position once."""

    def __init__(self) -> None:
        self.highest = 0
        self.gaps = 0
        self.tokens: dict[int, int] = {}
        self.states: dict[tuple[TokenState, Reason], int] = {}
        self.score: dict[tuple[int, int], float] = {}
        self.name: dict[int, str] = {}
        self.total: dict[str, int] = {}
        self.counters: Any = None

    def take(self, message: bytes) -> int:
        received = codec.decode_request(message)
        assert isinstance(received, ReceivedBatch)
        if received.sequence > self.highest:
            self.gaps += received.sequence - self.highest - 1
            self.highest = received.sequence
            self._merge(received.batch)
        return self.highest

    def _merge(self, batch: StepBatch) -> None:
        self.counters = batch.counters
        for opened in batch.opened:
            assert opened.handle not in self.name, "a request opened twice"
            self.name[opened.handle] = opened.request_id
        row = 0
        for s, owns in zip(batch.segments_S, owns_rows(batch.segments_S), strict=True):
            handle, start, count = int(s["handle"]), int(s["start"]), int(s["count"])
            self.tokens[handle] = self.tokens.get(handle, 0) + count
            key = TokenState(s["state"]), Reason(s["reason"])
            self.states[key] = self.states.get(key, 0) + count
            for i in range(count if handle != UNANNOUNCED else 0):
                assert (handle, start + i) not in self.score, "a position twice"
                self.score[handle, start + i] = float(batch.dense_RP[row + i, 0]) if owns else np.nan
            row += count if owns else 0
        for closed in batch.closed:
            name = self.name[closed.handle]
            assert name not in self.total, "a request ended twice"
            self.total[name] = closed.total_tokens
            assert self.tokens.get(closed.handle, 0) == closed.total_tokens


class Site:
    """An engine and the exporters that it has one after the other."""

    def __init__(self, folder: Path, rng: np.random.Generator, *, spool: bool, slots: int = 48) -> None:
        self.rng = rng
        self.scheduler = Scheduler(4, rng)
        # Fewer slots are made faster, and what makes them few is room for rows.
        self.ring = Ring.create(Geometry(4, (170 << 20) // slots // (10 * SPARSE + 6), SPARSE + DENSE, DENSE, 1))
        watched = tiny.watchlist(folder / "w.safetensors", layers=(1,), sparse=SPARSE, dense=DENSE)
        self.hook = ArmedHook(watched.hooks[0], torch.zeros(ROWS, SPARSE + DENSE), torch.zeros(ROWS, 3))
        self.hook.reset()
        self.tap = StepTap(self.ring, (self.hook,), on_gpu=False, cache=KvCache(0, POOL, BLOCK))
        self.collector = Collector()
        self.spool_folder = folder / "spool" if spool else None
        self.spool: Any = None
        self.deaths = 0
        self.start()

    def start(self) -> None:
        """A new exporter, of which nothing is left but what lies in the ring and the spool."""
        if self.spool is not None:
            self.spool.close()  # the system lets go of a dead process's lock
            self.spool = None
        ring = Ring(self.ring.fd, self.ring.geometry, create=False)
        before = Before.load(ring)
        who = hello()
        folder = None
        if self.spool_folder is not None:
            folder = SpoolFolder(SpoolSettings(self.spool_folder, sync_seconds=0), who.replica)
            self.spool = folder.open(who)
        self.sender = Sender(
            "unix:///tmp/nobody.sock",
            who,
            spool=self.spool,
            earlier=before.state.sequence,
            encodes=True,
            on_drop=before.on_drop,
        )
        kept = ScoreCache(blocks=POOL, block_size=BLOCK, dense=DENSE, hook_points=1)
        self.exporter = Exporter(ring, Ledger(armed=True, drafts=False, score_cache=kept), self.sender, before, folder)
        self.exporter_ring = ring

    def compute(self, *, admit: bool = True) -> None:
        step = self.scheduler.step(admit=admit)
        if step is None:
            return
        acts = self.hook.act_TK
        acts[: step.rows] = 0.0
        acts[: step.rows, SPARSE] = torch.from_numpy(expected(step.token_T, step.position_T))
        self.hook.stat_T3[: step.rows, 0] = 1.0
        self.tap.after_step(step.runner, step.output)

    def deliver(self, most: int = 1 << 30, *, acks: bool = True) -> None:
        """What the stream would carry, in its order."""
        buffer = self.sender._buffer
        with contextlib.closing(self.spool.reader(buffer.acked)) if self.spool else contextlib.nullcontext() as reader:
            ahead = reader.read() if reader else None
            while most and (outgoing := buffer.send_next(ahead)) is not None:
                highest = self.collector.take(outgoing.message())
                if outgoing.spooled:
                    ahead = reader.read()
                most -= 1
                if acks:
                    buffer.acknowledge(highest)
                    if self.spool:
                        self.spool.release(highest)
        buffer.requeue()

    def hello_again(self) -> None:
        """What the welcome of a stream says."""
        self.sender._buffer.acknowledge(self.collector.highest)
        if self.spool:
            self.spool.release(self.collector.highest)

    def drain(self) -> None:
        while self.exporter.forward_step(0.0):
            self.deliver()
        self.deliver()

    def die_in(self, place: Callable[[Site], Iterator[None]]) -> None:
        """Forward steps until the exporter dies there, then start the next one."""
        with contextlib.suppress(Died), contextlib.contextmanager(place)(self):
            self.exporter.forward_step(0.0)
        self.deaths += 1
        self.restart()

    def restart(self) -> None:
        self.start()
        self.hello_again()
        self.tap.exporter_restarted()

    def check(self) -> None:
        """Everything that was computed is in the books, once, with its own score."""
        while self.scheduler.busy:
            self.compute(admit=False)
            self.drain()
        while self.tap._owed:
            idle = Step.idle()
            self.tap.after_step(idle.runner, idle.output)
            self.drain()
        self.drain()
        unannounced = self.collector.counters.unannounced_requests
        assert len(self.collector.total) + unannounced == self.scheduler.told
        assert sum(self.collector.tokens.values()) == self.scheduler.tokens
        assert self.collector.gaps == 0
        for (handle, position), score in self.collector.score.items():
            if not np.isnan(score):
                token = self.scheduler.token(self.collector.name[handle], position)
                assert score == expected(np.array([token]), np.array([position]))[0]


def expected(token_T: Any, position_T: Any) -> Any:
    return ((token_T * 31 + position_T) % 1024).astype(np.float32)


def after(target: Callable[[Site], tuple[Any, str]]) -> Callable[[Site], Iterator[None]]:
    """Death right behind a call."""
    return _around(target, before=False)


def before(target: Callable[[Site], tuple[Any, str]]) -> Callable[[Site], Iterator[None]]:
    """Death right before a call."""
    return _around(target, before=True)


def _around(target: Callable[[Site], tuple[Any, str]], *, before: bool) -> Callable[[Site], Iterator[None]]:
    def place(site: Site) -> Iterator[None]:
        owner, name = target(site)
        original = getattr(owner, name)

        def dying(*args: Any, **options: Any) -> Any:
            if not before:
                original(*args, **options)
            raise Died

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, dying)
            yield

    return place


def torn_commit(site: Site) -> Iterator[None]:
    """Everything of a commit is written but the word that counts it."""
    made = site.exporter_ring.checkpoint
    word = made._committed

    class Word:
        def __getitem__(self, i: int) -> Any:
            return word[i]

        def __setitem__(self, i: int, value: Any) -> None:
            raise Died

    made._committed = Word()  # type: ignore[assignment]  # it stands for the word until the death
    yield


PLACES = {
    "before the step is settled": before(lambda site: (site.exporter._ledger, "settle")),
    "when the step is settled": after(lambda site: (site.exporter._ledger, "settle")),
    "when it is numbered": after(lambda site: (site.sender.intake, "number")),
    "within the commit": after(lambda site: (site.exporter_ring.checkpoint, "_append")),
    "before the word of the commit": torn_commit,
    "when it is committed": after(lambda site: (site.exporter_ring.checkpoint, "commit")),
    "when it is sent": after(lambda site: (site.sender.intake, "send")),
    "before its slot is free": before(lambda site: (site.exporter_ring, "release")),
    "when its slot is free": after(lambda site: (site.exporter_ring, "release")),
    "before it is noted as done": before(lambda site: (site.exporter_ring.checkpoint, "done")),
    "at the next look": before(lambda site: (site.exporter_ring, "peek")),
}


@pytest.mark.parametrize("spool", [False, True], ids=["memory", "spool"])
@pytest.mark.parametrize("place", PLACES)
def test_an_exporter_that_dies_anywhere_loses_and_doubles_nothing(tmp_path, place, spool):
    """Once in a step with openings, hits and closings, again right after, and with all of it delivered or nothing."""
    site = Site(tmp_path, np.random.default_rng(5), spool=spool)
    for turn in range(45):
        site.compute()
        if turn % 7 == 3:
            site.die_in(PLACES[place])
            site.deliver(turn % 3, acks=turn % 2 == 0)
            if turn % 14 == 3:
                site.die_in(PLACES[place])
        elif turn % 3:
            site.exporter.forward_step(0.0)
            site.deliver(turn % 5, acks=turn % 4 > 1)
    site.check()
    assert site.deaths >= 6
    dropped = {key: count for key, count in site.collector.states.items() if key[0] == TokenState.DROPPED}
    assert not dropped


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spool=st.booleans(), small=st.booleans())
def test_whatever_the_scheduler_the_disk_and_death_do_every_token_is_in_one_state(tmp_path_factory, seed, spool, small):
    """`small`: the ring is full again and again, and the engine folds what it owes."""
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_tap, "MAX_OWED", 8)
        site = Site(tmp_path_factory.mktemp("site"), rng, spool=spool, slots=8 if small else 48)
        places = list(PLACES.values())
        for _ in range(60):
            for _ in range(int(rng.integers(1, 12 if small else 3))):
                site.compute()
            for _ in range(int(rng.integers(0, 4))):
                site.exporter.forward_step(0.0)
            if site.spool and rng.random() < 0.1:
                patch.setattr(site.spool, "append", lambda *_: False)  # the disk is full
            site.deliver(int(rng.integers(0, 6)), acks=bool(rng.integers(2)))
            if rng.random() < 0.3:
                site.die_in(places[int(rng.integers(len(places)))])
        site.check()
    reasons = {reason for state, reason in site.collector.states if state == TokenState.DROPPED}
    assert reasons <= {Reason.RING_FULL} if small else not reasons


def test_an_exporter_that_is_told_to_stop_while_its_engine_runs_leaves_all_to_the_next_one(tmp_path):
    site = Site(tmp_path, np.random.default_rng(1), spool=False)
    for _ in range(20):
        site.compute()
        site.exporter.forward_step(0.0)
    site.exporter.finish(engine_ended=False)
    site.restart()
    site.check()


@pytest.mark.parametrize("engine_ended", [True, False])
def test_ends_that_wait_for_the_next_batch_are_told_when_none_comes(tmp_path, monkeypatch, engine_ended):
    """They stood in a batch that the collector refused, the last one before the exporter ends."""
    site = Site(tmp_path, np.random.default_rng(1), spool=False)
    buffer = site.sender._buffer
    told: list[int] = []

    def take(message: bytes) -> int:
        received = codec.decode_request(message)
        assert isinstance(received, ReceivedBatch)
        told.extend(end.handle for end in received.batch.closed)
        return received.sequence

    monkeypatch.setattr(site.collector, "take", take)
    refused: list[int] = []
    while not refused:
        site.compute()
        site.exporter.forward_step(0.0)
        outgoing = buffer.send_next(None)
        if outgoing is None:
            continue
        received = codec.decode_request(outgoing.message())
        assert isinstance(received, ReceivedBatch)
        refused = [end.handle for end in received.batch.closed]
        if refused:
            buffer.drop_oldest_in_flight()
        else:
            buffer.acknowledge(outgoing.sequence)

    def close(_seconds: float) -> SenderStats:
        site.deliver()
        return site.sender.stats()

    monkeypatch.setattr(site.sender, "close", close)
    site.exporter.finish(engine_ended=engine_ended)
    assert told == refused


def test_a_step_that_no_exporter_survives_is_given_up_and_counted_and_those_behind_it_are_not(tmp_path):
    site = Site(tmp_path, np.random.default_rng(2), spool=False)
    for _ in range(10):
        site.compute()
        site.drain()
    site.compute()
    deadly = site.exporter_ring.read

    def kills(place: Site) -> Iterator[None]:
        settle = place.exporter._ledger.settle

        def dying(raw: Any, counters: Any) -> Any:
            if place.exporter_ring.read == deadly and raw.rows:
                raise Died
            return settle(raw, counters)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place.exporter._ledger, "settle", dying)
            yield

    deaths = 0
    while site.exporter_ring.read == deadly:
        site.die_in(kills)
        deaths += 1
        assert deaths < 10
    for _ in range(10):
        site.compute()
        site.drain()
    site.check()
    assert 0 < site.collector.states[TokenState.DROPPED, Reason.RING_FULL] <= ROWS


def test_a_step_that_cannot_be_settled_costs_its_rows_and_nothing_else(tmp_path, monkeypatch):
    site = Site(tmp_path, np.random.default_rng(3), spool=False)
    for turn in range(30):
        site.compute()
        if turn == 12:
            settle = site.exporter._ledger.settle
            with monkeypatch.context() as patch:

                def broken(raw: Any, counters: Any, settle: Any = settle) -> Any:
                    batch = settle(raw, counters)
                    if raw.rows:
                        raise ValueError("a bug")  # the ledger is changed by then
                    return batch

                patch.setattr(site.exporter._ledger, "settle", broken)
                site.exporter.forward_step(0.0)
        site.drain()
    site.check()
    assert 0 < site.collector.states[TokenState.DROPPED, Reason.RING_FULL] <= ROWS


def test_what_the_dead_one_counted_is_counted_on(tmp_path):
    site = Site(tmp_path, np.random.default_rng(4), spool=False)
    for _ in range(40):
        site.compute()
        site.exporter.forward_step(0.0)
    site.deliver()
    with site.sender._lock:
        site.sender._buffer.give_up(0, 17, Drop.REFUSED)
    site.compute()
    site.exporter.forward_step(0.0)
    before_it = site.exporter._counted
    assert before_it.lost_tokens == 17
    site.restart()
    site.compute()
    site.exporter.forward_step(0.0)
    assert site.exporter._counted.lost_tokens == 17
    assert site.exporter._counted.surplus_tokens >= before_it.surplus_tokens


def wrong_state(memory: Any) -> None:
    memory[24:40] = b"X" * 16


def wrong_sizes(memory: Any) -> None:
    memory[:24] = b"\xff" * 24


def wrong_half(memory: Any) -> None:
    struct.pack_into("<QQQ", memory, 0, 100, 7, 0)


@pytest.mark.parametrize("damage", [wrong_state, wrong_sizes, wrong_half])
def test_of_a_checkpoint_that_cannot_be_read_only_the_open_requests_are_lost(tmp_path, damage):
    """As another version writes it, or a bug: numbers go on, so that nothing new passes for what came before."""
    site = Site(tmp_path, np.random.default_rng(3), spool=False)
    for _ in range(30):
        site.compute()
        site.drain()
    checkpoint = site.exporter_ring.checkpoint
    damage(checkpoint._areas[int(checkpoint._committed[0]) % 2])
    told, ended = site.collector.highest, len(site.collector.total)
    site.collector.name.clear()  # what is left in the ring may be told again, which a collector takes
    site.restart()
    known = set(site.exporter._ledger._open)
    for _ in range(60):
        site.compute()
        site.drain()
    assert not known and site.collector.highest >= told + 60 and site.collector.gaps == 0
    assert len(site.collector.total) > ended
    missing = site.scheduler.tokens - sum(site.collector.tokens.values())
    assert 0 <= missing <= site.collector.counters.unattributed_rows + ROWS


def test_a_checkpoint_never_grows_beyond_its_place_whatever_is_open(tmp_path):
    """Preempted requests are open too, any number of them. The next exporter knows as many as have room, the newest."""
    site = Site(tmp_path, np.random.default_rng(6), spool=False)
    ledger = site.exporter._ledger
    for slot in range(5000):
        ledger._begin(Opened(slot, 10**6 + slot, "\U0001f600" * 250 + f"{slot:06d}", 10**5, 10**5, "a", "t"))
    site.exporter._commit([], site.exporter_ring.read)
    found = site.exporter_ring.checkpoint.load()
    assert found is not None and len(found[0]) <= site.exporter_ring.checkpoint.max_state_bytes
    site.start()
    known = site.exporter._ledger._open
    assert 50 < len(known) < 5000 and max(known) == 4999


def test_numbers_that_were_given_up_by_the_thousand_are_noted_as_ranges(tmp_path):
    site = Site(tmp_path, np.random.default_rng(7), spool=False)
    site.compute()
    site.exporter.forward_step(0.0)
    with site.sender._lock:
        for number in range(10_000, 60_000):
            site.sender._buffer.give_up(number, 1, Drop.NO_ROOM)
    site.compute()
    site.exporter.forward_step(0.0)
    found = site.exporter_ring.checkpoint.load()
    assert found is not None
    assert ExporterState.from_bytes(found[0]).dropped == [[10_000, 59_999]]
