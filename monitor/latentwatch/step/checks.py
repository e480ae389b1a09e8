"""What a StepBatch must say to mean something: looked at once, by whoever takes it into a state.

That its columns are whole records of their dtypes is not looked at here: the codec proves it of what came over a wire.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from latentwatch.arrays import Array
from latentwatch.errors import RefusalReason, StreamRefused
from latentwatch.names import Phase, Reason, TokenState
from latentwatch.step.batch import StepBatch, owns_rows

_INT32_MAX: Final = 2**31 - 1
# Looked up by a column's u1 values, as in `owns_rows`.
_UNKNOWN: Final = {
    name: ~np.isin(np.arange(256), [int(member) for member in allowed])
    for name, allowed in (("state", TokenState), ("reason", Reason), ("phase", Phase))
}


def validate(batch: StepBatch, *, sparse_F: Array, hook_points: int, armed: bool = True) -> None:
    """Refuse a batch that does not keep the contract of step.batch, so that nothing behind it has to look again.

    Args:   sparse_F: bool [F], which features of the watchlist may appear in `fires_N`; the others are dense.
            armed: what the engine said of itself.
    Raises: StreamRefused, reason "malformed_batch", naming the column and the offending value, or "scores_unarmed".
    """
    validate_segments(batch, armed=armed)
    _check_shapes(batch, int((~sparse_F).sum()), hook_points)
    if len(batch.fires_N):
        _check_fires(batch, sparse_F)
    for name, values in (("act", batch.fires_N["act"]), ("dense", batch.dense_RP), ("norm", batch.norm_RH)):
        if not np.isfinite(values).all():
            raise _malformed(batch, f"column {name} holds NaN or infinity")


def validate_segments(batch: StepBatch, *, armed: bool = True) -> None:
    """The part of `validate` that needs no watchlist."""
    segments_S = batch.segments_S
    if not armed and owns_rows(segments_S).any():
        raise StreamRefused(
            f"step {batch.step}",
            found=f"it brings scores of {batch.rows} tokens, and its engine said that it is not armed",
            instead="Scores without an armed watchlist mean nothing. Run the same version in engine and exporter, and "
            "report this as a bug.",
            reason=RefusalReason.SCORES_UNARMED,
        )
    for name, unknown in _UNKNOWN.items():
        foreign = unknown[segments_S[name]]
        if foreign.any():
            raise _malformed(batch, f"segment {name} {int(segments_S[name][foreign][0])} is not one this version knows")
    count, start = segments_S["count"], segments_S["start"]
    if (count < 1).any() or (start < 0).any() or (start > _INT32_MAX - count).any():
        raise _malformed(batch, "a segment's start and count are no positions of a request")
    if ((segments_S["reason"] != Reason.NONE) == owns_rows(segments_S)).any():
        raise _malformed(batch, "a reason must stand on unseen and dropped segments, and only there")


def _check_shapes(batch: StepBatch, dense: int, hook_points: int) -> None:
    rows = batch.rows
    for name, array, columns in (("dense scores", batch.dense_RP, dense), ("norms", batch.norm_RH, hook_points)):
        # A batch without rows (openings, a heartbeat, an engine that is not armed) need not know the widths.
        if len(array) != rows or (rows and array.shape[1] != columns):
            raise _malformed(batch, f"{name} have shape {array.shape}, expected {(rows, columns)}")


def _check_fires(batch: StepBatch, sparse_F: Array) -> None:
    fires_N, F = batch.fires_N, len(sparse_F)
    if int(fires_N["row"].max()) >= batch.rows:
        raise _malformed(batch, f"an activation names row {int(fires_N['row'].max())} of {batch.rows}")
    if int(fires_N["feature"].max()) >= F or not sparse_F[fires_N["feature"]].all():
        raise _malformed(batch, "an activation names a feature that is dense or beyond the watchlist")
    if (np.diff(fires_N["row"].astype(np.int64) * F + fires_N["feature"]) <= 0).any():
        raise _malformed(batch, "activations are not sorted by row and feature, or one stands twice")


def _malformed(batch: StepBatch, found: str) -> StreamRefused:
    return StreamRefused(
        f"step {batch.step}",
        found=found,
        instead="The exporter and the collector must run the same latentwatch version; upgrade the older one.",
        reason=RefusalReason.MALFORMED_BATCH,
    )
