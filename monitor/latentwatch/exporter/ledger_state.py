"""A ledger as bytes, for the exporter's checkpoint: written after every step, so in few copies; read once, by the next.

Both are of one installation: what cannot be read is a mistake, and raises.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latentwatch.arrays import I64, Array
from latentwatch.handover.ring import REQUEST_DTYPE, RawStep
from latentwatch.step.batch import FIRE_DTYPE


@dataclass(frozen=True)
class LedgerState:
    """Everything that a ledger knows, but for the step that waits whole in the ring and for the KV cache."""

    newest: int = 0
    lost_at: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    """The counters that the ledger keeps."""
    opened: bytes = b""
    """The open requests as events (handover/events.py), one to a line."""
    next_n: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    rows_at_n: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    """Of those requests, in their order."""
    hits: Sequence[Sequence[int]] = ()
    """Slot, start and stop of each."""
    parts: Sequence[RawStep] = ()
    """Of steps before the newest: what waits for a later one."""

    def to_bytes(self) -> bytes:
        arrays: list[Array] = [self.next_n, self.rows_at_n]
        for part in self.parts:
            arrays += [part.requests_Q, part.fires_N, part.dense_TP, part.norm_TH]
        head = {
            "newest": self.newest,
            "lost_at": self.lost_at,
            "counts": {name: int(count) for name, count in self.counts.items()},
            "opened": len(self.opened),
            "hits": [list(hit) for hit in self.hits],
            "requests": len(self.next_n),
            "parts": [_shape(part) for part in self.parts],
        }
        return b"".join(
            [json.dumps(head).encode(), b"\n", self.opened, *(np.ascontiguousarray(a).tobytes() for a in arrays)]
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> LedgerState:
        at = data.index(b"\n") + 1
        head = json.loads(data[:at])

        def array(dtype: Any, *shape: int) -> Any:
            nonlocal at
            count = int(np.prod(shape))
            found = np.frombuffer(data, dtype, count, offset=at).reshape(shape).copy()
            at += found.nbytes
            return found

        opened = data[at : at + head["opened"]]
        at += len(opened)
        return cls(
            newest=head["newest"],
            lost_at=head["lost_at"],
            counts=head["counts"],
            opened=opened,
            next_n=array(np.int64, head["requests"]),
            rows_at_n=array(np.int64, head["requests"]),
            hits=head["hits"],
            parts=[
                RawStep(
                    step=shape["step"],
                    time_unix_nano=shape["time_unix_nano"],
                    rows=shape["rows"],
                    scored_rows=shape["scored_rows"],
                    silent=shape["silent"],
                    requests_Q=array(REQUEST_DTYPE, shape["requests"]),
                    fires_N=array(FIRE_DTYPE, shape["fires"]),
                    dense_TP=array(np.float16, shape["scored_rows"], shape["dense"]),
                    norm_TH=array(np.float32, shape["scored_rows"], shape["hook_points"]),
                    events=b"",
                )
                for shape in head["parts"]
            ],
        )


def _shape(part: RawStep) -> dict[str, Any]:
    return {
        "step": part.step,
        "time_unix_nano": part.time_unix_nano,
        "rows": part.rows,
        "scored_rows": part.scored_rows,
        "silent": part.silent,
        "requests": len(part.requests_Q),
        "fires": len(part.fires_N),
        "dense": part.dense_TP.shape[1],
        "hook_points": part.norm_TH.shape[1],
    }
