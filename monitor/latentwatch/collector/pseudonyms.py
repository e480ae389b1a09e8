"""Request ids as keyed hashes: nothing behind this collector's receiver holds the clear ones.

A request id holds what the client put into X-Request-Id. With a key, each id is replaced as a message comes in, before
it is merged, written to the journal, recorded or forwarded. Who has a clear id asks with it, and its hash is looked up.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

from latentwatch import secrets
from latentwatch.client_ids import IdKind, bounded_id, carried, hashed, meanings
from latentwatch.errors import RefusalReason
from latentwatch.facts import RequestInfo
from latentwatch.step.batch import RequestClosed, RequestOpened
from latentwatch.transport import codec
from latentwatch.transport.hello import Hello
from latentwatch.transport.sink import ReceivedBatch, ReceivedReport, Sink

_Named = TypeVar("_Named", RequestOpened, RequestClosed, RequestInfo)
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

    def of(self, request_id: str, response_id: str, *, forwarded: bool = False) -> tuple[str, str]:
        """What stands for the engine's id of a request and for its response id.

        Args: forwarded: by a sidecar, which may have a key too: a hash then stands for itself.
        """
        if request_id and self._exempt(request_id):
            return request_id, response_id
        return self._of(request_id, forwarded), self._of(response_id, forwarded)

    def hashed(self, name: str) -> str:
        """The hash of a name that somebody asks with, as which it may be noted down."""
        return name if not name or _HASHED.fullmatch(name) else self._hash(bounded_id(name))

    def meanings(self, name: str) -> dict[IdKind, tuple[str, ...]]:
        """As client_ids.meanings, of what requests are held under here."""
        return hashed(meanings(name), self._hash)

    def _of(self, id: str, forwarded: bool) -> str:
        return id if not id or (forwarded and _HASHED.fullmatch(id)) else self._hash(carried(id))

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
                opened=tuple(self._renamed(event) for event in batch.opened),
                closed=tuple(self._renamed(event) for event in batch.closed),
            )
            received = ReceivedBatch(received.sequence, batch, codec.encode_batch(received.sequence, batch))
        self._sink.observe(hello, received, now)

    def _renamed(self, said: _Named, *, forwarded: bool = False) -> _Named:
        request_id, response_id = self._of(said.request_id, said.response_id, forwarded=forwarded)
        return replace(said, request_id=request_id, response_id=response_id)

    def merge(self, hello: Hello, received: ReceivedReport, now: float) -> None:
        """See Sink."""
        if received.report.requests:
            rows = tuple(replace(row, info=self._renamed(row.info, forwarded=True)) for row in received.report.requests)
            report = replace(received.report, requests=rows)
            received = ReceivedReport(received.sequence, report, codec.encode_report(received.sequence, report))
        self._sink.merge(hello, received, now)
