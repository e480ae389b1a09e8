"""scikit-learn probes saved by skops: a linear classifier, alone or in a Pipeline behind a StandardScaler.

skops builds objects from a list of known types and runs no code from the file; a file that names any other type is
refused. A pickle or joblib file is not read at all. Row names are the classes that a positive score stands for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from latentwatch.arrays import F64
from latentwatch.errors import WatchlistRefused
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import About, Source, SourceOptions, refuse_architecture

skops: Any = importlib.import_module("skops.io")  # optional and not typed


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:  # noqa: ARG001
    """Open a .skops file."""
    options.refuse_unused(location)
    path = location.file()
    steps = _steps(location, _load(location))
    w_KD, bias_K, names = _classifier(location, steps[-1])
    mean_D, scale_D = _scaler(location, steps[:-1], w_KD.shape[1])

    def rows(index_K: Sequence[int]) -> EncoderRows:
        index = list(index_K)
        return canonical.linear(w_KD[index] / scale_D, bias_K[index], mean_D)

    about = About(
        architecture=type(steps[-1]).__name__,
        kind="probe",
        units="decision function",
        d_in=w_KD.shape[1],
        width=w_KD.shape[0],
        names=names,
    )
    return Source(about, (path,), rows)


def _load(location: Location) -> object:
    path = location.file()
    try:
        if untrusted := skops.get_untrusted_types(file=path):
            raise location.refuse(
                f"it holds objects of types that are not known to be safe: {', '.join(untrusted[:6])}",
                "Save a linear classifier, or a Pipeline of StandardScaler and one.",
            )
        return skops.load(path)
    except WatchlistRefused:
        raise
    except Exception as error:
        # skops, zipfile, json and NumPy raise a dozen kinds between them; all mean a damaged or foreign file.
        found = f"not a whole skops file ({type(error).__name__}: {str(error)[:160]})"
        raise location.refuse(found, "Save it again with skops.io.dump.") from error


def _steps(location: Location, model: object) -> list[object]:
    steps = [step for _, step in model.steps] if hasattr(model, "steps") else [model]
    if not steps or len(steps) > 2:
        names = ", ".join(type(step).__name__ for step in steps)
        raise refuse_architecture(location, f"pipeline of {names}", "only a StandardScaler may come before the probe")
    return steps


class _LinearClassifier(Protocol):
    coef_: npt.ArrayLike
    intercept_: npt.ArrayLike
    classes_: Iterable[object]


class _Scaler(Protocol):
    mean_: npt.ArrayLike | None
    scale_: npt.ArrayLike | None


def _classifier(location: Location, probe: object) -> tuple[F64, F64, Mapping[str, int]]:
    name = type(probe).__name__
    if not hasattr(probe, "coef_") or not hasattr(probe, "classes_") or getattr(probe, "kernel", "linear") != "linear":
        raise refuse_architecture(location, name, "it has no linear row per class")
    fitted = cast(_LinearClassifier, probe)
    w_KD = np.atleast_2d(np.asarray(fitted.coef_, np.float64))
    bias_K = np.broadcast_to(np.asarray(fitted.intercept_, np.float64), len(w_KD)).copy()
    if not np.isfinite(w_KD).all() or not np.isfinite(bias_K).all():
        raise location.refuse("its coefficients hold NaN or infinity", "Fit it again.")
    classes = [str(label) for label in fitted.classes_]
    # A two-class probe has one row, whose positive side is the second class.
    named = classes[1:] if len(w_KD) == 1 and len(classes) == 2 else classes
    if len(named) != len(w_KD):
        raise refuse_architecture(location, name, f"it has {len(w_KD)} rows for {len(classes)} classes")
    return w_KD, bias_K, {label: row for row, label in enumerate(named)}


def _scaler(location: Location, steps: Sequence[object], d_in: int) -> tuple[F64 | None, F64]:
    if not steps:
        return None, np.ones(d_in)
    if type(steps[0]).__name__ != "StandardScaler":
        raise refuse_architecture(location, type(steps[0]).__name__, "only a StandardScaler may come before the probe")
    scaler = cast(_Scaler, steps[0])
    mean_D = None if scaler.mean_ is None else np.asarray(scaler.mean_, np.float64)
    scale_D = np.ones(d_in) if scaler.scale_ is None else np.asarray(scaler.scale_, np.float64)
    return mean_D, scale_D
