"""Compare a built watchlist with what its YAML and sources give today."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from monitor.watchlist import selection
from monitor.watchlist.build import compile_selection
from monitor.watchlist.card import SCALE_ROWS, HookRows, Watchlist


def differences(watchlist: Watchlist, yaml_path: Path) -> list[str]:
    """What differs between a built file and its YAML, one line each; empty when nothing does.

    Raises: WatchlistRefused: the YAML or a source cannot be used.
    """
    fresh = compile_selection(selection.load(yaml_path))
    return list(_compare(watchlist, fresh))


def _compare(built: Watchlist, fresh: Watchlist) -> Iterator[str]:
    for name in ("name", "notes"):
        if getattr(built, name) != getattr(fresh, name):
            yield f"{name} differs"
    for name, value in dataclasses.asdict(built.model).items():
        if value != getattr(fresh.model, name):
            yield f"model.{name} is {value!r} in the file, {getattr(fresh.model, name)!r} in the YAML"
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
            if getattr(a, field.name) != getattr(b, field.name):
                yield f"{a.id}: {field.name} differs"
