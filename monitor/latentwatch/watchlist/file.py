"""The watchlist file: canonical encoder rows and a JSON card in ONE .safetensors file.

Shape legend: K features at one hook point, D d_model.

Every linear encoder is one canonical row per feature, scored on a hook point's output x [D]:

    s = n(x) @ w;   fires iff s > tau;   act = max(gain * s + bias, lo) where it fires, else 0

with n(x) one of `NORMS`. A feature with gate "none" (a probe, a direction) has tau = lo = -inf: it always "fires"
and is shipped as a dense column. The other features are sparse.

The file holds, for the i-th hook point, tensors `h<i>.w_hi` and `h<i>.w_lo` (bfloat16 bit patterns as U16 [K, D], since
numpy has no bfloat16; w_hi + w_lo equals the float32 row to 2.4e-6 rms) and `h<i>.scale` (F32 [6, K], rows in the order
of `SCALE_ROWS`), and the card as JSON under the metadata key "latentwatch". Its identity is the SHA-256 of the file's
bytes (`sha256sum` prints it too). The card carries a SHA-256 of the tensors and of itself, so that a damaged file is
refused and never scored.

Reading needs numpy and safetensors only: the collector reads cards without torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from latentwatch.arrays import F32, U16, Array, Bool
from latentwatch.errors import ConfigRefused, RefusalReason, WatchlistRefused
from latentwatch.names import HookPoint, Severity
from latentwatch.storage import HashedArtifact
from latentwatch.watchlist.figures import Figures
from latentwatch.watchlist.identity import ModelIdentity

MAX_FEATURES: Final = 1024
"""Over all hook points; the bound that ring slots, series and page are sized for."""
NORMS: Final = ("none", "layer_norm", "constant_norm", "centre")
"""n(x): x; (x - mean) / (std_unbiased + 1e-5); x * sqrt(D) / ||x||; x - mean. The index is the code in `scale`."""
SCALE_ROWS: Final = ("tau", "gain", "bias", "lo", "colsum", "norm")
GATES: Final = ("exact", "calibrated", "none")
STATISTICS: Final = ("max", "rolling_mean")
PHASES: Final = ("any", "prompt", "output")
_FILE: Final = HashedArtifact(
    kind="watchlist",
    format="latentwatch.watchlist/1",
    max_bytes=1 << 30,
    command="latentwatch watchlist build",
    again="Build it again with this version.",
    refusal=WatchlistRefused,
    missing=RefusalReason.WATCHLIST_MISSING,
    damaged=RefusalReason.WATCHLIST_FORMAT,
)


_Card = dict[str, Any]
"""JSON as it was read, or a part of it; `parse` refuses what does not hold together."""


LARGEST_HALF: Final = 65504.0
"""Scores of every token, and those that rolling means are made of, are clipped to this."""


@dataclass(frozen=True)
class Limit:
    """A request exceeds the limit when the statistic of its activations goes above `value`.

    statistic "max": the largest activation of one token. "rolling_mean": the largest mean over `window_tokens`
    consecutive tokens (fewer at the start of a request give no value).
    """

    statistic: str
    value: float
    window_tokens: int = 1
    phase: str = "any"

    def __post_init__(self) -> None:
        if self.statistic not in STATISTICS or self.phase not in PHASES:
            raise _refuse(
                "limit", f"statistic {self.statistic!r}, phase {self.phase!r}", f"Use {STATISTICS} and {PHASES}."
            )
        if not math.isfinite(self.value):
            raise _refuse("limit", f"value {self.value} is not finite", "Give a number in the feature's own units.")
        if not 1 <= self.window_tokens <= 64 or (self.statistic == "max") != (self.window_tokens == 1):
            raise _refuse(
                "limit",
                f"window_tokens {self.window_tokens} with statistic {self.statistic!r}",
                "Use 1 with max, 2 to 64 with rolling_mean.",
            )


@dataclass(frozen=True)
class Feature:
    """One watched direction and what is known about it."""

    id: str
    """Stable, unique in the watchlist, fit for a metric label: letters, digits and ._- only."""
    label: str
    severity: Severity
    kind: str
    """"sae", "probe" or "direction"."""
    gate: str
    """"exact", "calibrated" (a TopK subset) or "none" (dense)."""
    units: str
    limit: Limit | None = None
    skip_first_positions: int = 0
    """Positions at the start of a request that no statistic counts (1: the BOS token)."""
    source: Mapping[str, object] = field(default_factory=dict)
    """Where the row came from: format, repo or file, sha256, feature index."""
    evidence: Figures = field(default_factory=Figures)
    """Measured figures."""

    def __post_init__(self) -> None:
        if (
            not self.id
            or len(self.id) > 64
            or not all(c.isalnum() or c in "._-" for c in self.id)
            or not self.id.isascii()
        ):
            raise _refuse(
                f"feature {self.id!r}", "its id is not 1 to 64 letters, digits, '.', '_' or '-'", "Rename it."
            )
        if self.kind not in ("sae", "probe", "direction") or self.gate not in GATES:
            raise _refuse(
                f"feature {self.id}",
                f"kind {self.kind!r}, gate {self.gate!r}",
                f"Use sae, probe or direction and {GATES}.",
            )
        if not 0 <= self.skip_first_positions <= 64:
            raise _refuse(f"feature {self.id}", f"skip_first_positions {self.skip_first_positions}", "Use 0 to 64.")

    @property
    def dense(self) -> bool:
        """Whether the score is shipped for every token instead of only where it fires."""
        return self.gate == "none"


@dataclass(frozen=True)
class ModelCard:
    """The model that the rows belong to; the engine compares each field with its own and refuses a difference."""

    name: str
    """For people; not compared, since one checkpoint is served under many names."""
    architecture: str
    d_model: int
    layers: int
    vocab_size: int
    dtypes: tuple[str, ...]
    """Serving dtypes for which the scores are right, e.g. ("bfloat16", "float32")."""


@dataclass(frozen=True)
class HookRows:
    """The canonical rows at one hook point."""

    hook_point: HookPoint
    features: tuple[Feature, ...]
    w_hi_KD: U16
    """bfloat16 bit patterns."""
    w_lo_KD: U16
    scale_6K: F32

    @property
    def w_KD(self) -> F32:
        """The float32 rows, w_hi + w_lo."""
        return f32_from_bf16(self.w_hi_KD) + f32_from_bf16(self.w_lo_KD)

    def __post_init__(self) -> None:
        K = len(self.features)
        what = f"hook point {self.hook_point}"
        if K == 0 or self.w_hi_KD.ndim != 2 or self.w_hi_KD.shape[0] != K or self.w_lo_KD.shape != self.w_hi_KD.shape:
            raise _refuse(what, f"{K} features but rows of shape {self.w_hi_KD.shape}", "Build the watchlist again.")
        if self.scale_6K.shape != (len(SCALE_ROWS), K):
            raise _refuse(
                what,
                f"scale has shape {self.scale_6K.shape}, expected {(len(SCALE_ROWS), K)}",
                "Build the watchlist again.",
            )
        scale = dict(zip(SCALE_ROWS, self.scale_6K, strict=True))
        if not np.isfinite(self.w_KD).all() or not all(
            np.isfinite(scale[r]).all() for r in ("gain", "bias", "colsum", "norm")
        ):
            raise _refuse(what, "NaN or infinite weights", "Check the source file.")
        if not np.isin(scale["norm"], range(len(NORMS))).all():
            raise _refuse(what, "an unknown norm code", f"Known norms are {NORMS}.")
        dense = np.array([f.dense for f in self.features])
        if not (np.isneginf(scale["tau"]) == dense).all() or not (np.isneginf(scale["lo"]) == dense).all():
            raise _refuse(
                what,
                "tau and lo must be -inf for features with gate 'none' and finite for the others",
                "Build the watchlist again.",
            )
        if np.isnan(scale["tau"]).any() or np.isnan(scale["lo"]).any() or np.isposinf(scale["tau"]).any():
            raise _refuse(what, "a threshold is NaN or +inf", "Check the source file.")


@dataclass(frozen=True)
class Watchlist:
    """A built watchlist: what the engine scores and the collector explains."""

    name: str
    model: ModelCard
    hooks: tuple[HookRows, ...]
    notes: str = ""
    """Free text for people: what these features are and are not."""
    identity: ModelIdentity | None = None
    """Of the model, beyond its sizes; None in a file whose YAML names no checkpoint, or that an older version built."""
    sha256: str = ""
    """Of the file's bytes; empty until it is written or read."""

    def __post_init__(self) -> None:
        points = [rows.hook_point for rows in self.hooks]
        if not points or points != sorted(set(points)):
            raise _refuse(
                f"watchlist {self.name!r}",
                f"hook points {[str(p) for p in points]}",
                "Each must stand once, in layer order.",
            )
        for rows in self.hooks:
            if rows.w_hi_KD.shape[1] != self.model.d_model or not rows.hook_point.layer < self.model.layers:
                raise _refuse(
                    f"hook point {rows.hook_point}",
                    f"rows of width {rows.w_hi_KD.shape[1]} for a model of d_model {self.model.d_model} "
                    f"and {self.model.layers} layers",
                    "Use a source trained on this model, and a layer that it has.",
                    RefusalReason.WATCHLIST_WIDTH
                    if rows.hook_point.layer < self.model.layers
                    else RefusalReason.HOOK_POINT_UNKNOWN,
                )
        ids = [f.id for f in self.features]
        if len(ids) > MAX_FEATURES or len(set(ids)) != len(ids):
            twice = sorted({i for i in ids if ids.count(i) > 1}) if len(ids) <= MAX_FEATURES else []
            raise _refuse(
                f"watchlist {self.name!r}",
                f"{len(ids)} features, ids that stand twice: {twice}",
                f"At most {MAX_FEATURES}, each id once.",
            )

    @property
    def features(self) -> tuple[Feature, ...]:
        """All features in watchlist order: hook point by hook point. The index is the wire's feature number."""
        return tuple(feature for rows in self.hooks for feature in rows.features)

    @property
    def hook_point_F(self) -> tuple[HookPoint, ...]:
        """The hook point of each feature, in watchlist order."""
        return tuple(rows.hook_point for rows in self.hooks for _ in rows.features)

    @property
    def sparse_F(self) -> Bool:
        """bool [F]: which features are shipped as non-zeros; the others are dense columns, in the same order."""
        return np.array([not feature.dense for feature in self.features])


def write(watchlist: Watchlist, path: Path) -> Watchlist:
    """Write the file and return the watchlist with its hash. Never leaves a half-written file behind."""
    tensors = {
        f"h{i}.{name}": np.ascontiguousarray(array)
        for i, rows in enumerate(watchlist.hooks)
        for name, array in (("w_hi", rows.w_hi_KD), ("w_lo", rows.w_lo_KD), ("scale", rows.scale_6K))
    }
    return dataclasses.replace(watchlist, sha256=_FILE.write(_FILE.to_bytes(_card(watchlist), tensors), path))


def read(path: Path) -> Watchlist:
    """Read and check a watchlist file.

    Raises: WatchlistRefused: the file is missing, truncated, damaged, of another format or version, or its content
            does not hold together. `reason` is "watchlist_missing", "watchlist_format", "watchlist_width" or
            "hook_point_unknown".
    """
    return parse(_FILE.read(path), f"watchlist {path}")


def parse(data: bytes, what: str = "watchlist") -> Watchlist:
    """Check the bytes of a watchlist file; `what` names them in errors. Raises as `read`."""
    card, tensors = _FILE.parse(data, what)
    try:
        watchlist = _from_card(card, tensors)
    except WatchlistRefused as refusal:
        raise _refuse(f"{what}: {refusal.what}", refusal.found, refusal.instead, refusal.reason) from refusal
    except (KeyError, TypeError, ValueError, AttributeError, ConfigRefused) as error:
        found = f"its card does not hold together ({type(error).__name__}: {error})"
        raise _refuse(what, found, "Build it again with this version.") from error
    return dataclasses.replace(watchlist, sha256=hashlib.sha256(data).hexdigest())


def f32_from_bf16(bits: U16) -> F32:
    """The exact float32 values of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16_from_f32(values: F32) -> U16:
    """Bit patterns of the nearest bfloat16, ties to even; finite input only."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _card(watchlist: Watchlist) -> _Card:
    # Beside the model and not in it: versions that know no identity read the file all the same.
    stated = {} if watchlist.identity is None else {"identity": dataclasses.asdict(watchlist.identity)}
    return {
        **stated,
        "name": watchlist.name,
        "notes": watchlist.notes,
        "model": dataclasses.asdict(watchlist.model),
        "hooks": [
            {"hook_point": str(rows.hook_point), "features": [dataclasses.asdict(feature) for feature in rows.features]}
            for rows in watchlist.hooks
        ],
    }


def _from_card(card: _Card, tensors: Mapping[str, Array]) -> Watchlist:
    expected = {f"h{i}.{name}" for i in range(len(card["hooks"])) for name in ("w_hi", "w_lo", "scale")}
    if set(tensors) != expected:
        raise _refuse(
            "tensors",
            f"{sorted(set(tensors) ^ expected)[:6]} are missing or unknown",
            "Build it again with this version.",
        )
    return Watchlist(
        name=card["name"],
        notes=card["notes"],
        model=ModelCard(**{**card["model"], "dtypes": tuple(card["model"]["dtypes"])}),
        identity=ModelIdentity(**card["identity"]) if "identity" in card else None,
        hooks=tuple(
            HookRows(
                hook_point=HookPoint.parse(hook["hook_point"]),
                features=tuple(_feature(feature) for feature in hook["features"]),
                w_hi_KD=_array(tensors, f"h{i}.w_hi", np.uint16),
                w_lo_KD=_array(tensors, f"h{i}.w_lo", np.uint16),
                scale_6K=_array(tensors, f"h{i}.scale", np.float32),
            )
            for i, hook in enumerate(card["hooks"])
        ),
    )


def _feature(fields: _Card) -> Feature:
    limit = fields["limit"]
    return Feature(
        **{**fields, "severity": Severity(fields["severity"]), "limit": None if limit is None else Limit(**limit)}
    )


def _array(tensors: Mapping[str, Array], name: str, dtype: type[np.generic]) -> Array:
    if tensors[name].dtype != dtype:
        raise _refuse(
            f"tensor {name}",
            f"dtype {tensors[name].dtype}, expected {np.dtype(dtype)}",
            "Build it again with this version.",
        )
    return tensors[name]


def _refuse(what: str, found: str, instead: str, reason: str = RefusalReason.WATCHLIST_FORMAT) -> WatchlistRefused:
    return WatchlistRefused(what, found=found, instead=instead, reason=reason)
