"""The report client: a collector's reports to its gateway, over one gRPC stream, in the collector's own event loop.

The guarantee is that of `sender`: a report stays where it waits until the gateway says that its state holds it, and is
sent again above that number when a stream ends. What waits, and what is given up, is not decided here: see
`federation.outbox`. grpc.aio, unlike the sender, because a collector's loop has it already.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import grpc

from latentwatch.errors import ConfigRefused, RefusalReason, StreamRefused
from latentwatch.log_limit import LogLimit
from latentwatch.transport import codec
from latentwatch.transport.address import Address
from latentwatch.transport.channel import CHANNEL_OPTIONS, Backoff
from latentwatch.transport.credentials import Credentials
from latentwatch.transport.hello import Hello
from latentwatch.transport.report import Report

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    Call: TypeAlias = grpc.aio.StreamStreamCall[bytes, bytes]

_REPLY_SECONDS: Final = 30.0
"""A report is cut each second and acknowledged at once; a gateway silent for so long is gone."""
_LOG_AGAIN_SECONDS: Final = 600.0


@dataclass(frozen=True)
class ReportClientFacts:
    """How the stream to the gateway goes."""

    connected: bool = False
    reconnects: int = 0
    """Streams that the gateway welcomed, after the first."""
    resent_reports: int = 0


class ReportClient:
    """Carries reports. Run `run` as a task, call `news` when there may be another one, and `drain` before the end."""

    def __init__(
        self,
        target: str,
        hello: Hello,
        waiting: Callable[[], Iterable[tuple[int, Report]]],
        acknowledged: Callable[[int], None],
        *,
        credentials: Credentials | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        """
        Args:   waiting: numbers and reports without an ack, ascending.   acknowledged: told the highest one held.
        Raises: ConfigRefused, "target_invalid".   StreamRefused, "malformed_hello".
        """
        self._target = Address.parse(target)
        self._hello = hello
        self._waiting = waiting
        self._acknowledged = acknowledged
        self._credentials = credentials or Credentials()
        self._backoff = backoff or Backoff()
        self._rng = random.Random()  # noqa: S311, it only spreads reconnects
        self._news = asyncio.Event()
        self._held = asyncio.Event()
        self._welcomes = self._highest_sent = self._resent = 0
        self._connected = False
        self._may_log = LogLimit(_LOG_AGAIN_SECONDS, time.monotonic)
        codec.encode_hello(hello, last_acked_sequence=0, time_unix_nano=0)

    @property
    def facts(self) -> ReportClientFacts:
        """How it goes."""
        return ReportClientFacts(self._connected, max(0, self._welcomes - 1), self._resent)

    def news(self) -> None:
        """There may be a report that was not sent yet."""
        self._news.set()

    async def run(self) -> None:
        """Keep a stream open until cancelled."""
        failures = 0
        while True:
            welcomes, refused = self._welcomes, False
            try:
                await self._stream()
            except StreamRefused as refusal:
                refused = True
                self._tell(f"refused {refusal.reason[:64]}", str(refusal))
            except grpc.RpcError as error:
                self._tell("unreachable", f"{error.code().name}: {error.details()}")
            except TimeoutError:
                self._tell("unreachable", f"no reply for {_REPLY_SECONDS:g} s")
            except ConfigRefused as error:
                refused = True
                self._tell("credentials", str(error))
            except Exception:
                # Without this task nothing would ever be forwarded again.
                log.exception("forwarding to %s failed; it opens a new stream", self._target)
            finally:
                self._connected = False
            failures = 1 if self._welcomes > welcomes else failures + 1
            await asyncio.sleep(self._backoff.seconds(failures, refused, self._rng))

    async def drain(self, seconds: float) -> bool:
        """Wait until the gateway holds everything, at most so long; whether it does."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while any(True for _ in self._waiting()):
                    self._held.clear()
                    await self._held.wait()
        return not any(True for _ in self._waiting())

    async def _stream(self) -> None:
        """One stream, until it ends. Raises what it ended with."""
        async with self._credentials.aio_channel(str(self._target), CHANNEL_OPTIONS) as channel:
            call: Call = channel.stream_stream(codec.METHOD)(metadata=self._credentials.metadata())
            hello = codec.encode_hello(self._hello, last_acked_sequence=0, time_unix_nano=time.time_ns())
            await call.write(hello)
            sent = await self._reply(call)
            self._welcomes += 1
            self._connected = True
            log.info("forwarding to the gateway at %s, which holds reports up to %d", self._target, sent)
            tasks = [asyncio.create_task(self._send(call, sent)), asyncio.create_task(self._listen(call))]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if tasks[0] in done and isinstance(tasks[0].exception(), grpc.RpcError):
                    # A write only says that the stream is over; why it is stands in what can still be read.
                    await asyncio.wait(tasks)
                for task in reversed(tasks):
                    if task.done():
                        task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                call.cancel()

    async def _send(self, call: Call, sent: int) -> None:
        while True:
            self._news.clear()
            for number, report in [(n, report) for n, report in self._waiting() if n > sent]:
                await call.write(codec.encode_report(number, report))
                self._resent += number <= self._highest_sent
                self._highest_sent = max(self._highest_sent, number)
                sent = number
            await self._news.wait()

    async def _listen(self, call: Call) -> None:
        while True:
            await self._reply(call)

    async def _reply(self, call: Call) -> int:
        """Take the next reply; the highest number that the gateway holds. Raises what the stream ended with."""
        async with asyncio.timeout(_REPLY_SECONDS):
            data = await call.read()
            if not isinstance(data, bytes):  # gRPC's mark of the end
                raise StreamRefused(
                    f"stream to {self._target}",
                    found=f"the gateway ended it with {(await call.code()).name} {await call.details()}",
                    instead="Look at the gateway's log.",
                    reason=RefusalReason.ENDED,
                )
        reply = codec.decode_reply(data)
        if isinstance(reply, StreamRefused):
            raise reply
        held = reply.sequence if isinstance(reply, codec.Ack) else reply.resume_after_sequence
        self._acknowledged(held)
        self._held.set()
        return held

    def _tell(self, key: str, found: str) -> None:
        if self._may_log(key):
            log.warning(
                "gateway %s: %.1000s. Counts and requests wait here; start the gateway or correct its address.",
                self._target,
                found,
            )
