"""What one accepted stream may say next, and what it is owed. Pure: no clock, no gRPC."""

from __future__ import annotations

from typing import Final, TypeAlias

from latentwatch.errors import RefusalReason, StreamRefused
from latentwatch.transport import codec
from latentwatch.transport.hello import Hello
from latentwatch.transport.sink import ReceivedBatch, ReceivedReport

IDLE_SECONDS: Final = 60.0
"""An idle engine sends a heartbeat every 5 s; a welcomed stream without a whole message for so long is no engine's."""

Received: TypeAlias = ReceivedBatch | ReceivedReport


class StreamState:
    """One stream, from its hello on."""

    def __init__(self, hello: Hello, stored: int, now: float) -> None:
        """Args: stored: the highest number in the collector's state.   now: seconds, rising."""
        self.hello = hello
        self.stored = stored
        self.unacked = 0
        """Messages that came into the state since the last ack."""
        self._heard_seconds = now

    def read(self, data: bytes) -> Received:
        """The next message. Raises StreamRefused where it does not parse, or must not come now."""
        if len(data) > codec.MAX_MESSAGE_BYTES:
            raise _refused(
                self.hello,
                RefusalReason.MESSAGE_TOO_LARGE,
                f"it sent a message of {len(data)} bytes, this collector takes {codec.MAX_MESSAGE_BYTES}",
                "Run the same latentwatch version in the engine and in the collector.",
            )
        received = codec.decode_request(data)
        if isinstance(received, Hello):
            found, instead = "it said hello twice", "Open one stream for each engine boot."
            raise _refused(self.hello, RefusalReason.HELLO_REPEATED, found, instead)
        if isinstance(received, ReceivedReport) != self.hello.forwards:
            sends, said = ("batches", "forwards") if self.hello.forwards else ("reports", "does not forward")
            raise _refused(
                self.hello,
                RefusalReason.MALFORMED_BATCH,
                f"its hello says that it {said}, and it sends {sends}",
                "An engine sends batches, a collector with --forward-to sends reports; open a stream for each.",
            )
        if received.sequence <= self.stored:
            raise _refused(
                self.hello,
                RefusalReason.REPLAYED,
                f"it sent batch {received.sequence}, and was told that everything up to {self.stored} is held",
                "An engine sends nothing twice after it was told; if this is one, report it as a bug.",
            )
        return received

    def heard(self, now: float) -> None:
        """A whole message came."""
        self._heard_seconds = now

    def store(self, sequence: int) -> None:
        """A message is in the state now."""
        self.stored = sequence
        self.unacked += 1

    def acknowledge(self) -> int | None:
        """The number to acknowledge; None where everything is acknowledged."""
        owed, self.unacked = self.unacked, 0
        return self.stored if owed else None

    def patience_seconds(self, now: float) -> float:
        """How much longer it may say nothing."""
        return self._heard_seconds + IDLE_SECONDS - now


def first_message(data: bytes) -> Hello:
    """The hello of a stream. Raises StreamRefused."""
    hello = codec.decode_request(data)
    if not isinstance(hello, Hello):
        raise hello_missing(f"its first message is batch {hello.sequence}")
    return hello


def hello_missing(found: str) -> StreamRefused:
    """Something else came first, or nothing."""
    return StreamRefused(
        "stream",
        found=found,
        instead="Say who you are first: the first message of a stream is a Hello.",
        reason=RefusalReason.HELLO_MISSING,
    )


def superseded(hello: Hello) -> StreamRefused:
    """Told to the older of two streams."""
    found = "a newer stream of the same engine boot took its place"
    return _refused(hello, RefusalReason.SUPERSEDED, found, "If two engines run, give each a replica name of its own.")


def too_many_streams(what: str, found: str) -> StreamRefused:
    """Told to a stream beyond a bound."""
    instead = "Run another collector, or raise its --peer-streams where many engines share one address."
    return StreamRefused(what, found=found, instead=instead, reason=RefusalReason.TOO_MANY_STREAMS)


def stream_idle(hello: Hello) -> StreamRefused:
    """Told to a stream whose patience is over."""
    found = f"it sent no whole message for {IDLE_SECONDS:g} s"
    instead = "An engine sends a heartbeat every few seconds; look at its exporter's log."
    return _refused(hello, RefusalReason.STREAM_IDLE, found, instead)


def collector_error(hello: Hello, error: Exception) -> StreamRefused:
    """A bug of the collector's; what its text holds is for the collector's log."""
    found = f"the collector failed on it with {type(error).__name__}"
    instead = "Read the collector's log and report the error there as a bug."
    return _refused(hello, RefusalReason.COLLECTOR_ERROR, found, instead)


def _refused(hello: Hello, reason: RefusalReason, found: str, instead: str) -> StreamRefused:
    return StreamRefused(f"stream of replica {hello.replica!r}", found=found, instead=instead, reason=reason)
