"""Broken messages against decoder, receiver and core, whose books are compared; `make fuzz` runs it beside the targets.

Half are mutations of real messages (bits, cuts, splices, repeats, numbers at their edges), half come from the grammar:
well-formed protobuf whose fields hold anything. Every tenth goes through a stream of the receiver, the others straight
into decoder and core. Each must be taken or refused with a reason, and at the end the collector's totals must be
those of the messages that it took, and its state must come back from its checkpoint as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import numpy as np
from latentwatch.collector.config import Bounds
from latentwatch.collector.core import Core
from latentwatch.collector.durability import schema
from latentwatch.errors import StreamRefused
from latentwatch.names import Reason, TokenState
from latentwatch.step.batch import FIRE_DTYPE, SEGMENT_DTYPE, StepBatch
from latentwatch.transport import codec
from latentwatch.transport._pb import latentwatch_pb2 as pb
from latentwatch.transport.hello import Hello
from latentwatch.transport.receiver import Receiver
from latentwatch.transport.sink import ReceivedBatch, ReceivedReport
from latentwatch.watchlist.file import Limit

from tests.support.streams import Schedule, hello, probe, received, sparse, tokens, watchlist

FEATURES = (sparse("a", limit=Limit("max", 3.0)), sparse("b", skip=1), probe("p", limit=Limit("rolling_mean", 0.5, 4)))
_EDGES = (0, 1, 2, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_FLOATS = (0.0, -0.0, 1.0, 1e-45, 65504.0, 65520.0, 3.4e38, float("inf"), float("-inf"), float("nan"))


class Messages:
    """An endless supply, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        rng = np.random.default_rng(seed)
        requests = [tokens(rng, FEATURES, handle=i, total=30, prompt_tokens=10) for i in range(1, 9)]
        batches = Schedule.random(rng, requests, 9).batches(FEATURES)
        self._real = [codec.encode_batch(i, batch) for i, batch in enumerate(batches, start=1)]
        self._real.append(codec.encode_hello(hello(), last_acked_sequence=0, time_unix_nano=0))
        self._real += _reports(batches)

    def next(self) -> bytes:
        return self._mutated() if self._random.random() < 0.5 else self._made_up()

    def _mutated(self) -> bytes:
        random = self._random
        data = bytearray(random.choice(self._real))
        for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
            at = random.randrange(len(data)) if data else 0
            kind = random.randrange(6)
            if kind == 0 and data:
                data[at] ^= 1 << random.randrange(8)
            elif kind == 1 and data:
                data[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF))
            elif kind == 2:
                del data[at:]
            elif kind == 3:
                del data[at : at + random.randrange(1, 20)]
            elif kind == 4:
                other = random.choice(self._real)
                data[at:at] = other[random.randrange(len(other)) :][: random.randrange(1, 64)]
            else:
                data += data[at : at + 64]
        return bytes(data)

    def _made_up(self) -> bytes:
        random = self._random
        if random.random() < 0.1:
            message = pb.Hello()
            self._fill(message)
            if random.random() < 0.9:
                message.protocol = 1
            return pb.StreamRequest(hello=message).SerializeToString()
        segments = self._records(SEGMENT_DTYPE, random.randrange(4))
        if len(segments) and random.random() < 0.8:
            # Mostly within the contract, so that what comes after the first check is reached as well.
            segments["count"] = [random.randrange(1, 6) for _ in segments]
            segments["start"] = [random.randrange(0, 50) for _ in segments]
            segments["state"] = [random.randrange(1, 5) for _ in segments]
            segments["phase"] = [random.randrange(1, 3) for _ in segments]
            scored = segments["state"] <= TokenState.INHERITED
            segments["reason"] = np.where(scored, Reason.NONE, random.randrange(1, 9))
        scored = np.isin(segments["state"], (TokenState.SCORED, TokenState.INHERITED))
        rows = min(int(segments["count"][scored].astype(np.int64).clip(0).sum()), 64)
        fires = self._records(FIRE_DTYPE, random.randrange(4))
        if random.random() < 0.8:
            fires["row"] = sorted(random.randrange(rows + 1) for _ in fires)
            fires["feature"] = [random.choice((0, 1, 1, 2)) for _ in fires]
        message = pb.StepBatch(
            sequence=self._integer(),
            step=self._integer(),
            time_unix_nano=self._integer() % 2**63,
            segments=segments.tobytes(),
            fires=fires.tobytes(),
            dense=np.array([self._float() for _ in range(rows)], np.float32)
            .clip(-65504, 65504)
            .astype(np.float16)
            .tobytes(),
            norm=np.array([self._float() for _ in range(rows)], np.float32).tobytes(),
            dense_features=1,
            hook_points=1,
        )
        for repeated in (message.opened, message.closed):
            for _ in range(random.choice((0, 0, 0, 1, 3))):
                self._fill(repeated.add())
        if random.random() < 0.1:
            self._fill(message.counters)
        for column in ("segments", "fires", "dense", "norm"):
            if random.random() < 0.03:
                setattr(message, column, random.randbytes(random.randrange(200)))
        return pb.StreamRequest(batch=message).SerializeToString()

    def _fill(self, message: Any) -> None:
        """Anything in each of the fields."""
        random = self._random
        for descriptor in message.DESCRIPTOR.fields:
            if descriptor.type == descriptor.TYPE_STRING:
                text = random.choice(("", "a", "0" * 32, "ab" * 32, "\0\n", "x" * 5000, "é☃𝕏", "chatcmpl-1-0123abcd"))
                setattr(message, descriptor.name, text)
            elif descriptor.type == descriptor.TYPE_BOOL:
                setattr(message, descriptor.name, random.random() < 0.5)
            else:
                bits = 32 if descriptor.type == descriptor.TYPE_UINT32 else 63
                setattr(message, descriptor.name, self._integer() % 2**bits)

    def _records(self, dtype: np.dtype[Any], count: int) -> Any:
        records = np.frombuffer(self._random.randbytes(dtype.itemsize * count), dtype).copy()
        for name in dtype.names or ():
            if dtype[name].kind == "f":
                records[name] = [self._float() for _ in range(count)]
        return records

    def _integer(self) -> int:
        return self._random.choice(_EDGES) if self._random.random() < 0.3 else self._random.randrange(100)

    def _float(self) -> float:
        return self._random.choice(_FLOATS) if self._random.random() < 0.01 else self._random.uniform(-3, 9)


def _reports(batches: list[StepBatch]) -> list[bytes]:
    """What a collector that took these batches tells its gateway."""
    made = Core(watchlist(FEATURES), forward_boot_id="f" * 32)
    # Of an engine that does not stream to the gateway itself, or its reports would be refused for that alone.
    who = hello(replica="sidecar/0")
    made.ingest.hello(who, 1000.0)
    for i, batch in enumerate(batches, start=1):
        made.ingest.observe(who, received(i, batch), 1000.0)
        made.ingest.tick(1000.0)
    assert made.outbox is not None
    return [codec.encode_report(number, report) for number, report in made.outbox.reports]


class Context:
    """What a stream of gRPC's shows the receiver: messages, then the end."""

    def __init__(self, *messages: bytes) -> None:
        self._messages = list(messages)
        self.replies: list[Any] = []

    async def read(self) -> Any:
        return self._messages.pop(0) if self._messages else grpc.aio.EOF

    async def write(self, data: bytes) -> None:
        self.replies.append(codec.decode_reply(data))

    def peer(self) -> str:
        return "fuzz"


@dataclass
class Outcome:
    """What became of the messages."""

    messages: int = 0
    taken: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    """Tokens of the messages that were taken, without those that they call lost."""


class Witness:
    """A collector's sink that notes what it took, apart from the collector's own books."""

    def __init__(self) -> None:
        self.core = Core(watchlist(FEATURES), Bounds(closed_requests=200, flagged_requests=50))
        self.seen = Outcome()
        ingest = self.core.ingest
        self.hello, self.goodbye, self.commit = ingest.hello, ingest.goodbye, ingest.commit

    def observe(self, hello: Hello, received: ReceivedBatch, now: float) -> None:
        duplicates = self._duplicates()
        self.core.ingest.observe(hello, received, now)
        if self._duplicates() == duplicates:
            segments = received.batch.segments_S
            self.seen.taken += 1
            self.seen.tokens += int(segments["count"][segments["reason"] != Reason.LOST].sum(dtype=np.int64))

    def merge(self, hello: Hello, received: ReceivedReport, now: float) -> None:
        duplicates = self._duplicates()
        self.core.ingest.merge(hello, received, now)
        if self._duplicates() == duplicates:
            self.seen.taken += 1
            for engine in received.report.engines:
                self.seen.tokens += int(engine.tokens.sum() - engine.tokens[:, Reason.LOST].sum())

    def restored(self) -> Core:
        """Another core, with the state of this one as a checkpoint would give it back."""
        tree, arrays = schema.to_tree(self.core.state())
        other = Core(watchlist(FEATURES), self.core.bounds)
        other.restore(schema.from_tree(json.loads(json.dumps(tree)), arrays))
        return other

    def _duplicates(self) -> int:
        return self.core._state.totals.duplicates


def run(count: int, seed: int) -> Outcome:
    """Feed `count` messages. Raises whatever is no refusal, and AssertionError where the books are wrong."""
    messages, witness = Messages(seed), Witness()
    receiver = Receiver(witness, [], clock=lambda: 1000.0)
    outcome, sequence = witness.seen, 0
    who = hello()
    sidecar = hello(replica="sidecar", engine="", model_name="", forwards=True)
    witness.hello(who, 1000.0)
    witness.hello(sidecar, 1000.0)
    loop = asyncio.new_event_loop()
    with contextlib.closing(loop):
        for i in range(count):
            data = messages.next()
            outcome.messages += 1
            if i % 10 == 0:
                _through_a_stream(loop, receiver, data, outcome, i)
                continue
            try:
                request = codec.decode_request(data)
                if isinstance(request, Hello):
                    witness.hello(request, 1000.0)
                    witness.goodbye(request, 1000.0)
                elif isinstance(request, ReceivedReport):
                    sequence += 1
                    witness.merge(sidecar, replace(request, sequence=sequence), 1000.0)
                else:
                    sequence += 1
                    witness.observe(who, replace(request, sequence=sequence), 1000.0)
            except StreamRefused as refused:
                outcome.refused[refused.reason] += 1
    snapshot = witness.core.lookup.snapshot(1000.0)
    lost = sum(int(engine.tokens[:, Reason.LOST].sum()) for engine in snapshot.engines)
    counted = sum(int(engine.tokens.sum()) for engine in snapshot.engines)
    assert counted - lost == outcome.tokens, (counted, lost, outcome.tokens)
    assert _text(witness.core) == _text(witness.restored())
    return outcome


def _text(core: Core) -> tuple[str, dict[str, bytes]]:
    tree, arrays = schema.to_tree(core.state())
    return json.dumps(tree), {name: array.tobytes() for name, array in arrays.items()}


def _through_a_stream(
    loop: asyncio.AbstractEventLoop, receiver: Receiver, data: bytes, outcome: Outcome, number: int
) -> None:
    opening = codec.encode_hello(
        hello(replica="stream/0", boot_id=f"{number:032x}"), last_acked_sequence=0, time_unix_nano=0
    )
    context = Context(opening, data)
    loop.run_until_complete(receiver.servicer.serve(None, context))
    assert isinstance(context.replies[0], codec.Welcome)
    last = context.replies[-1]
    if isinstance(last, StreamRefused):
        assert last.reason and last.found and last.instead
        outcome.refused[last.reason] += 1
    assert receiver.live_streams == 0
