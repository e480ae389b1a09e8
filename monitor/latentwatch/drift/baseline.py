"""The baseline file: sums over trusted traffic, what they are of, and what is tolerated; content-hashed and versioned.

It keeps the sums and not the rates made of them, so that baselines add (`Baseline.merge`) and a newer version may read
more out of an old file. The file is a .safetensors with a JSON card, as the watchlist is.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from latentwatch.aggregate.counts import Layout
from latentwatch.arrays import Array
from latentwatch.drift.reference import DriftTolerance, Reference, fit
from latentwatch.drift.sums import TrafficSums
from latentwatch.errors import BaselineRefused, RefusalReason
from latentwatch.storage import HashedArtifact

MAX_FILE_BYTES: Final = 1 << 28
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
        """The traffic of both. Raises BaselineRefused where they are of different things."""
        self.check(other.fingerprint)
        if self.features != other.features or self.window_seconds != other.window_seconds:
            raise _refuse(
                "baseline", "the two are over different features or windows", _AGAIN, RefusalReason.BASELINE_MISMATCH
            )
        return dataclasses.replace(
            self,
            observed=self.observed.merge(other.observed),
            created_seconds=max(self.created_seconds, other.created_seconds),
            sha256="",
        )

    def to_bytes(self) -> bytes:
        """The file."""
        arrays = {f"observed.{name}": np.ascontiguousarray(a) for name, a in self.observed.arrays().items()}
        arrays["layout.sparse"] = self.layout.sparse_F.astype(np.uint8)
        arrays["layout.levels"] = np.ascontiguousarray(self.layout.levels_FL)
        arrays["layout.pairs"] = self.layout.pairs_P
        card = {
            "fingerprint": dataclasses.asdict(self.fingerprint),
            "features": list(self.features),
            "strata": list(self.observed.strata),
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
    sums = {name.removeprefix("observed."): array for name, array in arrays.items() if name.startswith("observed.")}
    return Baseline(
        fingerprint=Fingerprint(**card["fingerprint"]),
        features=features,
        layout=layout,
        observed=TrafficSums.from_arrays(layout, sums, tuple(card["strata"])),
        options=DriftTolerance(**card["options"]),
        window_seconds=float(card["window_seconds"]),
        limit_fpr=None if card["limit_fpr"] is None else float(card["limit_fpr"]),
        created_seconds=float(card["created_seconds"]),
        notes=str(card["notes"]),
    )


def _refuse(what: str, found: str, instead: str, reason: str = RefusalReason.BASELINE_FORMAT) -> BaselineRefused:
    return BaselineRefused(what, found=found, instead=instead, reason=reason)
