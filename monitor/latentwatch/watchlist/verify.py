"""Compare a built watchlist with its YAML and sources: row by row, and score by score on recorded activations.

Legend: T tokens, D d_model, K watched features of a source, F all features of a source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from latentwatch.arrays import F32, F64, U16
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical, selection, topk, upstream
from latentwatch.watchlist.build import CHECKED, compile_selection, row_index
from latentwatch.watchlist.file import SCALE_ROWS, HookRows, Watchlist
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.selection import SourceChoice
from latentwatch.watchlist.sources import Source, open_source
from latentwatch.watchlist.tensors import SafetensorsFile

NEAR_THRESHOLD: Final = 1e-4
"""Closer than this, relative to the largest activation, rounding decides whether a feature fires."""
MAX_RELATIVE_ERROR: Final = 1e-4
"""Of the largest activation: ten times what float32 sums and two bfloat16 terms leave."""
MAX_UNEXPLAINED: Final = 0.9
"""An SAE that leaves more of the stream's variance unexplained was trained on another one."""
MAX_L0_RATIO: Final = 3.0
"""How far the measured L0 may be from the declared one; a wrong tensor or scale moves it tenfold and more."""


def differences(watchlist: Watchlist, yaml_path: Path) -> list[str]:
    """What differs between a built file and its YAML, one line each; empty when nothing does.

    Raises: WatchlistRefused: the YAML or a source cannot be used.
    """
    fresh = compile_selection(selection.load(yaml_path))
    return list(_compare(watchlist, fresh))


@dataclass(frozen=True)
class Measured:
    """One source on recorded tokens."""

    hook_point: HookPoint
    source: str
    compared_with: str
    """The upstream library, or our own float64 reading of the authors' formula where it is not installed."""
    tokens: int
    features: int
    max_abs_error: float
    """Over the scores on whose gate both agree."""
    largest: float
    """Activation, of those features on those tokens."""
    gate_flips: int
    """Scores further than `NEAR_THRESHOLD` from their threshold that fire on one side only."""
    gate: str
    l0: float | None
    """Features of the whole source that fire on the average token; None for probes and directions."""
    declared_l0: float | None
    unexplained: float | None
    """Share of the stream's variance that the source's reconstruction leaves; None where it has no decoder."""

    @property
    def problems(self) -> list[str]:
        """What no sound source shows, one line each."""
        found = []
        if self.max_abs_error > MAX_RELATIVE_ERROR * max(1.0, self.largest):
            found.append(f"scores differ by up to {self.max_abs_error:.3g}")
        if self.gate == "exact" and self.gate_flips:
            found.append(f"{self.gate_flips} scores fire on one side only")
        if self.unexplained is not None and self.unexplained > MAX_UNEXPLAINED:
            found.append(
                f"it leaves {self.unexplained:.0%} of this stream unexplained: wrong hook point, model or scale?"
            )
        if self.l0 is not None and self.declared_l0 is not None:
            ratio = max(self.l0, 1e-9) / self.declared_l0
            if not 1 / MAX_L0_RATIO <= ratio <= MAX_L0_RATIO:
                found.append(f"{self.l0:.1f} features fire on a token, {self.declared_l0:g} are declared")
        return found


def measure(watchlist: Watchlist, yaml_path: Path, recordings: Sequence[Path]) -> Iterator[Measured]:
    """Score recorded tokens with the built rows and with each source's own library.

    Args:    recordings: .safetensors files with tensor x [T, D] and metadata `hook_point`, which may be left out
             where the watchlist has one hook point.
    Raises:  WatchlistRefused: the YAML, a source or a recording cannot be used.
    """
    chosen = selection.load(yaml_path)
    by_hook = _by_hook(recordings, [hook.hook_point for hook in chosen.hooks])
    built = {rows.hook_point: rows for rows in watchlist.hooks}
    for hook in chosen.hooks:
        if hook.hook_point not in by_hook or hook.hook_point not in built:
            continue
        x_TD = topk.recorded(by_hook[hook.hook_point], watchlist.model.d_model, hook.hook_point)
        at = 0
        for choice in hook.sources:
            columns = slice(at, at + len(choice.features))
            at = columns.stop
            yield _measure_source(choice, hook.hook_point, built[hook.hook_point], columns, x_TD)


def _by_hook(recordings: Sequence[Path], points: Sequence[HookPoint]) -> dict[HookPoint, Location]:
    found: dict[HookPoint, Location] = {}
    for path in recordings:
        location = Location(path.name, path.parent)
        stated = SafetensorsFile(location.file()).metadata.get("hook_point")
        if stated is None and len(points) != 1:
            raise location.refuse(
                f"its metadata names no hook_point and the watchlist has {len(points)}",
                "Write metadata hook_point, e.g. resid_post.12.",
            )
        point = points[0] if stated is None else HookPoint.parse(str(stated))
        if point not in points:
            raise location.refuse(f"it was recorded at {point}", f"The watchlist has {', '.join(map(str, points))}.")
        found[point] = location
    return found


def _measure_source(choice: SourceChoice, hook_point: HookPoint, rows: HookRows, columns: slice, x_TD: F64) -> Measured:
    source = open_source(choice.format, choice.location, hook_point, choice.options)
    index = [row_index(feature, source) for feature in choice.features]
    hi, lo, scale = rows.w_hi_KD[columns], rows.w_lo_KD[columns], rows.scale_6K[:, columns]
    ours_TK = canonical.activations(hi, lo, scale, x_TD)
    oracle = upstream.load(choice, source)
    whole = _whole(source, x_TD)
    theirs_TK = oracle.encode(x_TD)[:, index] if oracle.encode else _encoded(source, index, x_TD, whole.kth_T)
    largest = float(np.abs(theirs_TK).max())
    same = (ours_TK != 0) == (theirs_TK != 0)
    near = np.minimum(np.abs(ours_TK - theirs_TK), _margin(hi, lo, scale, x_TD)) <= NEAR_THRESHOLD * max(1.0, largest)
    declared = source.about.k or source.about.notes.get("declared_l0") or source.about.notes.get("l0")
    return Measured(
        hook_point=hook_point,
        source=choice.location.text,
        compared_with=oracle.library if oracle.encode else f"the authors' formula in float64 ({oracle.library})",
        tokens=len(x_TD),
        features=len(index),
        max_abs_error=float(np.abs(ours_TK - theirs_TK)[same].max(initial=0.0)),
        largest=largest,
        gate_flips=int((~same & ~near).sum()),
        gate=source.about.gate,
        l0=whole.l0,
        declared_l0=float(declared) if isinstance(declared, int | float) else None,
        unexplained=whole.unexplained,
    )


def _margin(hi: U16, lo: U16, scale: F32, x_TD: F64) -> F64:
    """Distance of each score from its threshold, in units of the activation."""
    fields = dict(zip(SCALE_ROWS, scale.astype(np.float64), strict=True))
    s_TK = canonical.scores(hi, lo, scale, x_TD)
    return np.asarray(np.abs(s_TK - fields["tau"]) * fields["gain"])


@dataclass(frozen=True)
class _Whole:
    """What every feature of a source does together."""

    kth_T: F64 | None
    """TopK: the smallest activation that is kept, per token."""
    l0: float | None
    unexplained: float | None


def _whole(source: Source, x_TD: F64) -> _Whole:
    """One pass over all features, some thousand at a time."""
    if source.about.kind != "sae":
        return _Whole(None, None, None)
    kth_T = topk.kth_largest(source, x_TD, source.about.k) if source.about.k is not None else None
    fires = 0
    recon_TD: F64 | None = None
    for index in topk.chunks(source.about.width):
        act_TC = _encoded(source, index, x_TD, kth_T)
        fires += int((act_TC > 0).sum())
        if source.decoder is not None:
            part_TD = act_TC @ source.decoder.rows(index)
            recon_TD = part_TD if recon_TD is None else recon_TD + part_TD
    if source.decoder is None or recon_TD is None:
        return _Whole(kth_T, fires / len(x_TD), None)
    target_TD = canonical.normalised(source.rows(range(1)).norm, x_TD) * source.decoder.input_scale
    residual = ((target_TD - recon_TD - source.decoder.bias()) ** 2).sum()
    variance = ((target_TD - target_TD.mean(axis=0)) ** 2).sum()
    return _Whole(kth_T, fires / len(x_TD), float(residual / variance))


def _encoded(source: Source, index: Sequence[int], x_TD: F64, kth_T: F64 | None) -> F64:
    """The authors' own formula in float64, with no folding and no rounding of the rows."""
    rows = source.rows(index)
    act_TK = canonical.authors(rows, x_TD)
    if kth_T is None:
        return act_TK
    rank_TK = act_TK if rows.rank_K is None else act_TK * rows.rank_K
    return np.where(rank_TK >= kth_T[:, None], act_TK, 0.0)


def report(measured: Measured) -> list[str]:
    """Lines for a terminal."""
    lines = [
        f"{measured.hook_point}  {measured.source}: {measured.features} features on {measured.tokens} tokens, "
        f"against {measured.compared_with}",
        f"  max error {measured.max_abs_error:.2g} (largest activation {measured.largest:.3g}), "
        f"gate {measured.gate}, {measured.gate_flips} gate flips",
    ]
    if measured.l0 is not None:
        declared = "" if measured.declared_l0 is None else f" (declared {measured.declared_l0:g})"
        unexplained = (
            "" if measured.unexplained is None else f", fraction of variance unexplained {measured.unexplained:.3f}"
        )
        lines.append(f"  L0 {measured.l0:.1f}{declared}{unexplained}")
    return lines + [f"  PROBLEM: {problem}" for problem in measured.problems]


def _compare(built: Watchlist, fresh: Watchlist) -> Iterator[str]:
    for name in ("name", "notes"):
        if getattr(built, name) != getattr(fresh, name):
            yield f"{name} differs"
    for name, value in dataclasses.asdict(built.model).items():
        if value != getattr(fresh.model, name):
            yield f"model.{name} is {value!r} in the file, {getattr(fresh.model, name)!r} in the YAML"
    # A file that states none was built before there were any; it says so elsewhere.
    if built.identity is not None and built.identity != fresh.identity:
        told = [one.summary() if one else "not stated" for one in (built.identity, fresh.identity)]
        yield f"the model's identity is {told[0]} in the file, {told[1]} of the YAML's checkpoint"
    points = [rows.hook_point for rows in built.hooks], [rows.hook_point for rows in fresh.hooks]
    if points[0] != points[1]:
        yield f"hook points are {[str(p) for p in points[0]]} in the file, {[str(p) for p in points[1]]} in the YAML"
        return
    for old, new in zip(built.hooks, fresh.hooks, strict=True):
        yield from _compare_rows(old, new)


def _compare_rows(old: HookRows, new: HookRows) -> Iterator[str]:
    old_ids, new_ids = [f.id for f in old.features], [f.id for f in new.features]
    if old_ids != new_ids:
        yield f"{old.hook_point}: features {sorted(set(old_ids) ^ set(new_ids))[:8] or 'in another order'}"
        return
    old_w, new_w = old.w_KD, new.w_KD
    for i, (a, b) in enumerate(zip(old.features, new.features, strict=True)):
        if not np.array_equal(old_w[i], new_w[i]):
            yield f"{a.id}: its row differs by up to {np.abs(old_w[i] - new_w[i]).max():.3g}"
        for row, name in enumerate(SCALE_ROWS):
            if old.scale_6K[row, i] != new.scale_6K[row, i]:
                yield f"{a.id}: {name} is {old.scale_6K[row, i]:g} in the file, {new.scale_6K[row, i]:g} now"
        for field in dataclasses.fields(a):
            if _plain(getattr(a, field.name)) != _plain(getattr(b, field.name)):
                yield f"{a.id}: {field.name} differs"


def _plain(value: object) -> object:
    """Without who checked the rows: another library may be installed now."""
    return {name: one for name, one in value.items() if name != CHECKED} if isinstance(value, Mapping) else value
