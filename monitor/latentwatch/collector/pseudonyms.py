"""Request ids as keyed hashes: nothing behind this collector's receiver holds the clear ones.

A request id holds what the client put into X-Request-Id. With a key, each id is replaced as a message comes in, before
it is merged, written to the journal, recorded or forwarded. Who has a clear id asks with it, and its hash is looked up.
Hashed is the id of the response, which the client and its gateway know.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from latentwatch import secrets
from latentwatch.errors import RefusalReason
from latentwatch.names import response_id
from latentwatch.transport import codec
from latentwatch.transport.hello import Hello
from latentwatch.transport.sink import ReceivedBatch, ReceivedReport, Sink

_HASHED: Final = re.compile(r"hmac-[0-9a-f]{32}")


class Pseudonyms:
    """Ids under one key."""

    def __init__(self, key: bytes, exempt: Callable[[str], bool]) -> None:
        """Args: exempt: which engine request ids stay as they are, since they are ours and of no client."""
        self._key = key
        self._exempt = exempt

    @classmethod
    def read(cls, path: Path, exempt: Callable[[str], bool]) -> Pseudonyms:
        """With the key in a file. Raises ConfigRefused, "request_id_key"."""
        instead = f"Write at least {secrets.MIN_KEY_BYTES} random bytes there, e.g. of openssl rand -hex 32."
        return cls(secrets.read_key(path, "--request-id-key-file", RefusalReason.REQUEST_ID_KEY, instead), exempt)

    def of(self, request_id: str) -> str:
        """What stands for an engine request id. A hash, from a sidecar that has a key too, stands for itself."""
        if not request_id or _HASHED.fullmatch(request_id) or self._exempt(request_id):
            return request_id
        return self._hash(response_id(request_id))

    def candidates(self, name: str) -> tuple[str, ...]:
        """What a request may be held under that somebody asks for by this name, in the order to try.

        The name is a response id, or the engine's own; else one that is never hashed: a trace id, or a hash.
        """
        return tuple(dict.fromkeys((self._hash(name), self._hash(response_id(name)), name)))

    def _hash(self, name: str) -> str:
        return "hmac-" + hmac.new(self._key, name.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]


class PseudonymSink:
    """A `transport.sink.Sink` that hands on what it is given under other request ids."""

    def __init__(self, sink: Sink, pseudonyms: Pseudonyms) -> None:
        self._sink = sink
        self._of = pseudonyms.of
        self.hello, self.commit, self.goodbye = sink.hello, sink.commit, sink.goodbye

    def observe(self, hello: Hello, received: ReceivedBatch, now: float) -> None:
        """See Sink."""
        batch = received.batch
        if batch.opened or batch.closed:
            batch = replace(
                batch,
                opened=tuple(replace(event, request_id=self._of(event.request_id)) for event in batch.opened),
                closed=tuple(replace(event, request_id=self._of(event.request_id)) for event in batch.closed),
            )
            received = ReceivedBatch(received.sequence, batch, codec.encode_batch(received.sequence, batch))
        self._sink.observe(hello, received, now)

    def merge(self, hello: Hello, received: ReceivedReport, now: float) -> None:
        """See Sink."""
        if received.report.requests:
            rows = tuple(
                replace(row, info=replace(row.info, request_id=self._of(row.info.request_id)))
                for row in received.report.requests
            )
            report = replace(received.report, requests=rows)
            received = ReceivedReport(received.sequence, report, codec.encode_report(received.sequence, report))
        self._sink.merge(hello, received, now)
