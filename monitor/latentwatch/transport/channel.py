"""How the sending end of a stream keeps its connection: the channel's options, and the waits between two streams."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from latentwatch.transport import codec

CHANNEL_OPTIONS: Final = (
    ("grpc.max_send_message_length", codec.MAX_MESSAGE_BYTES),
    # A frozen pod or a forgotten NAT entry closes no connection; only an unanswered ping shows it.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    # After recent traffic that ping is gRPC's own, for flow control, and has this limit: 60 s by default (measured).
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    # Also the time one connection attempt may take, so it has to outlast a TLS handshake across regions.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Each attempt has its own channel and must not wait for the back-off of the one before: `Backoff` decides.
    ("grpc.use_local_subchannel_pool", 1),
    # Scores go where they were told to go, not through a proxy meant for the engine's downloads.
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True)
class Backoff:
    """Waits between streams, seconds. Each is drawn from the upper half of its range, so that the engines which one
    collector lost do not come back in step."""

    first_seconds: float = 0.2
    longest_seconds: float = 1.0
    """A collector that returns is found again within this time, plus one connection set-up."""
    factor: float = 1.6
    refused_seconds: float = 5.0
    """After a Refusal: the collector is there and means it, a person has to act."""

    def seconds(self, failures: int, refused: bool, rng: random.Random) -> float:
        """The wait after the `failures`-th stream in a row (from 1) that brought no acknowledgement."""
        longest = self.refused_seconds if refused else self.longest_seconds
        first = self.refused_seconds if refused else self.first_seconds
        # The exponent is capped because a collector may be away for days, and floats overflow.
        upper = min(longest, first * self.factor ** min(failures - 1, 64))
        return upper * rng.uniform(0.5, 1.0)
