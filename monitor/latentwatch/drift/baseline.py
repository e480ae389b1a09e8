"""The baseline file: sums over trusted traffic, what they are of, and what is tolerated; content-hashed and versioned.

It keeps the sums and not the rates made of them, so that baselines add (`Baseline.merge`) and a newer version may read
more out of an old file. The file is a .safetensors with a JSON card, as the watchlist is.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from latentwatch.aggregate.counts import Layout
from latentwatch.arrays import Array
from latentwatch.drift import windows
from latentwatch.drift.reference import DriftTolerance, Reference, fit
from latentwatch.drift.sums import TrafficSums
from latentwatch.errors import BaselineRefused, RefusalReason
from latentwatch.storage import HashedArtifact

MAX_FILE_BYTES: Final = 1 << 28
MOST_PARTS: Final = 16
"""Of a baseline; beyond it the oldest two become one, which no collector replaces."""
_AGAIN: Final = "Calibrate again with 'latentwatch calibrate'."
_FILE: Final = HashedArtifact(
    kind="baseline",
    format="latentwatch.baseline/2",
    max_bytes=MAX_FILE_BYTES,
    command="latentwatch calibrate",
    again=_AGAIN,
    refusal=BaselineRefused,
    missing=RefusalReason.BASELINE_MISSING,
    damaged=RefusalReason.BASELINE_FORMAT,
    ascii_card=True,
)


@dataclass(frozen=True)
class Fingerprint:
    """What the traffic was of. Empty text stands for "not known" and is not compared."""

    watchlist_sha256: str
    model_name: str
    engine_version: str = ""
    """Noted, not compared: an upgrade that moves scores is what the canary is for."""
    revision: str = ""
    quantisation: str = ""
    adapter: str = ""
    tokenizer: str = ""
    chat_template: str = ""

    def differences(self, other: Fingerprint) -> list[str]:
        """Names of the fields that are known on both sides and differ."""
        return [
            name
            for name in (field.name for field in dataclasses.fields(self))
            if name != "engine_version" and getattr(self, name) != getattr(other, name)
            if getattr(self, name) and getattr(other, name)
        ]


@dataclass(frozen=True)
class Baseline:
    """How the features of a watchlist behave on traffic that someone trusts."""

    fingerprint: Fingerprint
    features: tuple[str, ...]
    """Ids in watchlist order."""
    layout: Layout
    observed: TrafficSums
    options: DriftTolerance = field(default_factory=DriftTolerance)
    window_seconds: float = 60.0
    limit_fpr: float | None = None
    """Share of trusted requests above the limit that features without one by hand get; None for no such limits."""
    created_seconds: float = 0.0
    notes: str = ""
    sha256: str = ""
    """Of the file's bytes; empty until it is written or read."""
    parts: tuple[TrafficSums, ...] = ()
    """What `observed` is the sum of, where that is more than one: each is replaced where its collector says more."""

    def reference(self) -> Reference:
        """What detectors compare with. Raises BaselineRefused "baseline_volume" with too few requests."""
        try:
            return fit(self.observed, self.layout, self.options)
        except ValueError as error:
            raise _refuse(
                "baseline",
                f"it has {error}",
                "Let the collector see more traffic that you trust.",
                RefusalReason.BASELINE_VOLUME,
            ) from error

    def check(self, live: Fingerprint, what: str = "baseline") -> None:
        """Raises BaselineRefused "baseline_mismatch" where it was calibrated on something else."""
        for name in self.fingerprint.differences(live):
            raise _refuse(
                what,
                f"it was calibrated with {name.replace('_', ' ')} {getattr(self.fingerprint, name)!r}, "
                f"but this is {getattr(live, name)!r}",
                "Its rates would be compared with those of something else. " + _AGAIN,
                RefusalReason.BASELINE_MISMATCH,
            )

    def merge(self, other: Baseline) -> Baseline:
        """The traffic of both, each window once: what a collector gives includes what it gave before.

        Raises BaselineRefused where they are of different things, or have windows in common that cannot be told from
        others any more.
        """
        self.check(other.fingerprint)
        if self.features != other.features or self.window_seconds != other.window_seconds:
            raise _refuse(
                "baseline", "the two are over different features or windows", _AGAIN, RefusalReason.BASELINE_MISMATCH
            )
        parts = _each_once(self.parts or (self.observed,), other.parts or (other.observed,))
        return dataclasses.replace(
            self,
            observed=functools.reduce(TrafficSums.merge, parts),
            parts=parts if len(parts) > 1 else (),
            created_seconds=max(self.created_seconds, other.created_seconds),
            sha256="",
        )

    def to_bytes(self) -> bytes:
        """The file."""
        arrays = _arrays("observed", self.observed)
        for number, part in enumerate(self.parts):
            arrays |= _arrays(f"part{number}", part)
        arrays["layout.sparse"] = self.layout.sparse_F.astype(np.uint8)
        arrays["layout.levels"] = np.ascontiguousarray(self.layout.levels_FL)
        arrays["layout.pairs"] = self.layout.pairs_P
        card = {
            "fingerprint": dataclasses.asdict(self.fingerprint),
            "features": list(self.features),
            "strata": list(self.observed.strata),
            "parts": [list(part.strata) for part in self.parts],
            "options": dataclasses.asdict(self.options),
            "window_seconds": self.window_seconds,
            "limit_fpr": self.limit_fpr,
            "created_seconds": self.created_seconds,
            "notes": self.notes,
        }
        return _FILE.to_bytes(card, arrays)


def write(baseline: Baseline, path: Path) -> Baseline:
    """Write the file and return the baseline with its hash. Never leaves a half-written file behind."""
    return dataclasses.replace(baseline, sha256=_FILE.write(baseline.to_bytes(), path))


def read(path: Path) -> Baseline:
    """Read and check a baseline file. Raises BaselineRefused "baseline_missing" or "baseline_format"."""
    return parse(_FILE.read(path), f"baseline {path}")


def parse(data: bytes, what: str = "baseline") -> Baseline:
    """Check the bytes of a baseline file; `what` names them in errors. Raises as `read`."""
    card, arrays = _FILE.parse(data, what)
    try:
        baseline = _from_card(card, arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise _refuse(what, f"it does not hold together ({type(error).__name__}: {error})", _AGAIN) from error
    return dataclasses.replace(baseline, sha256=hashlib.sha256(data).hexdigest())


def _from_card(card: Mapping[str, Any], arrays: Mapping[str, Array]) -> Baseline:
    layout = Layout(arrays["layout.sparse"].astype(bool), arrays["layout.levels"], arrays["layout.pairs"])
    features = tuple(card["features"])
    if not len(features) == layout.features == len(layout.levels_FL):
        raise ValueError(f"{len(features)} feature ids for {layout.features} features")
    parts = tuple(
        TrafficSums.from_arrays(layout, _named(arrays, f"part{number}"), tuple(strata))
        for number, strata in enumerate(card["parts"])
    )
    return Baseline(
        fingerprint=Fingerprint(**card["fingerprint"]),
        features=features,
        layout=layout,
        observed=TrafficSums.from_arrays(layout, _named(arrays, "observed"), tuple(card["strata"])),
        parts=parts,
        options=DriftTolerance(**card["options"]),
        window_seconds=float(card["window_seconds"]),
        limit_fpr=None if card["limit_fpr"] is None else float(card["limit_fpr"]),
        created_seconds=float(card["created_seconds"]),
        notes=str(card["notes"]),
    )


def _arrays(prefix: str, sums: TrafficSums) -> dict[str, Array]:
    return {f"{prefix}.{name}": np.ascontiguousarray(array) for name, array in sums.arrays().items()}


def _named(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """Of the arrays of one sum."""
    return {name.removeprefix(f"{prefix}."): a for name, a in arrays.items() if name.startswith(f"{prefix}.")}


def _each_once(mine: Sequence[TrafficSums], theirs: Sequence[TrafficSums]) -> tuple[TrafficSums, ...]:
    """Both without what another one covers. Raises BaselineRefused, "baseline_overlap"."""
    parts = list(mine)
    for new in theirs:
        met = [part for part in parts if windows.common(part.windows_W2, new.windows_W2)]
        if any(windows.covers(part.windows_W2, new.windows_W2) for part in met if part.requests >= new.requests):
            continue
        for part in met:
            if not windows.covers(new.windows_W2, part.windows_W2):
                both = windows.common(part.windows_W2, new.windows_W2)
                raise _refuse(
                    "baseline",
                    f"{both} windows are in both, and {len(part.windows_W2) - both} and {len(new.windows_W2) - both} "
                    "in one alone",
                    "They would count twice: calibrate from one of the two, or anew from all collectors at once.",
                    RefusalReason.BASELINE_OVERLAP,
                )
        parts = [part for part in parts if not any(part is one for one in met)] + [new]
    while len(parts) > MOST_PARTS:
        parts = [parts[0].merge(parts[1]), *parts[2:]]
    return tuple(parts)


def _refuse(what: str, found: str, instead: str, reason: str = RefusalReason.BASELINE_FORMAT) -> BaselineRefused:
    return BaselineRefused(what, found=found, instead=instead, reason=reason)
