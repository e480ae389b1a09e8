"""scikit-learn probes saved by skops: a linear classifier, alone or in a Pipeline behind a StandardScaler.

skops builds objects from a list of known types and runs no code from the file; a file that names any other type is
refused. A pickle or joblib file is not read at all. Row names are the classes that a positive score stands for.

Only classifiers are read whose decision function is one linear row per class, or one row for two classes. A many-class
SVC has a row per pair of classes, which are no classes, though for three classes there are as many of them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol, cast

import numpy as np
import numpy.typing as npt

from latentwatch.arrays import F64
from latentwatch.errors import RefusalReason, WatchlistRefused
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import About, Source, SourceOptions, refuse_architecture

skops: Any = importlib.import_module("skops.io")  # optional and not typed

_LINEAR: Final = frozenset(
    ("LinearSVC", "LogisticRegression", "LogisticRegressionCV", "PassiveAggressiveClassifier", "Perceptron")
) | {"LinearDiscriminantAnalysis", "RidgeClassifier", "RidgeClassifierCV", "SGDClassifier"}
"""One linear row per class, or one row for two classes."""
_PAIRWISE: Final = frozenset(("SVC", "NuSVC"))
"""One linear row per pair of classes, if the kernel is linear."""


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:  # noqa: ARG001
    """Open a .skops file."""
    options.refuse_unused(location)
    model = load(location)
    steps = _steps(location, model)
    w_KD, bias_K, names = _classifier(location, steps[-1])
    mean_D, scale_D = _scaler(location, steps[:-1], w_KD.shape[1])
    for step in steps:
        _refuse_mixed_columns(location, step, w_KD.shape[1])

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
    return Source(about, (location.file(),), rows)


def load(location: Location) -> object:
    """The fitted model of a .skops file. Raises WatchlistRefused: a damaged file, or one of unknown types."""
    path = location.file()
    try:
        if untrusted := skops.get_untrusted_types(file=path):
            raise location.refuse(
                f"it holds objects of types that are not known to be safe: {', '.join(untrusted[:6])}",
                "Save a linear classifier, or a Pipeline of StandardScaler and one.",
            )
        model: object = skops.load(path)
        return model
    except WatchlistRefused:
        raise
    except Exception as error:
        # skops, zipfile, json and NumPy raise a dozen kinds between them; all mean a damaged or foreign file.
        found = f"skops cannot read it: damaged, another format or version ({type(error).__name__}: {str(error)[:160]})"
        instead = f"Save it with skops.io.dump of {_versions()}."
        raise location.refuse(found, instead) from error


def _versions() -> str:
    return " and ".join(f"{name} {importlib.metadata.version(name)}" for name in ("scikit-learn", "skops"))


def decision(model: object, x_TD: F64) -> F64:
    """scikit-learn's own decision function, with a column also where it gives one number a token, [T, K]."""
    return np.asarray(cast(_LinearClassifier, model).decision_function(x_TD), np.float64).reshape(len(x_TD), -1)


def _steps(location: Location, model: object) -> list[object]:
    steps = [step for _, step in cast(_Pipeline, model).steps] if type(model).__name__ == "Pipeline" else [model]
    if not steps or len(steps) > 2:
        names = ", ".join(type(step).__name__ for step in steps)
        raise refuse_architecture(location, f"pipeline of {names}", "only a StandardScaler may come before the probe")
    return steps


class _Pipeline(Protocol):
    steps: Iterable[tuple[str, object]]


class _LinearClassifier(Protocol):
    def decision_function(self, x_TD: F64) -> npt.ArrayLike: ...

    coef_: npt.ArrayLike
    intercept_: npt.ArrayLike
    classes_: Iterable[object]


class _Scaler(Protocol):
    with_mean: bool
    with_std: bool
    mean_: npt.ArrayLike
    scale_: npt.ArrayLike


def _classifier(location: Location, probe: object) -> tuple[F64, F64, Mapping[str, int]]:
    name = type(probe).__name__
    pairwise = name in _PAIRWISE
    if name not in _LINEAR | _PAIRWISE:
        raise refuse_architecture(location, name, "it is not known to have one linear row per class")
    if missing := [attribute for attribute in ("coef_", "intercept_", "classes_") if not hasattr(probe, attribute)]:
        raise location.refuse(
            f"its {name} has no {' and no '.join(missing)}: it is not fitted, its kernel is not linear, or another "
            "scikit-learn saved it",
            f"Fit a linear one and save it by {_versions()}, or write its rows as a linear_probe.",
            RefusalReason.SOURCE_ARCHITECTURE,
        )
    fitted = cast(_LinearClassifier, probe)
    w_KD = _finite(location, "coef_", np.atleast_2d(_dense(fitted.coef_)))
    bias_K = _finite(location, "intercept_", np.broadcast_to(_dense(fitted.intercept_), len(w_KD)).copy())
    classes = [str(label) for label in fitted.classes_]
    if pairwise and len(classes) != 2:
        why = f"its rows are of pairs of its {len(classes)} classes, and no row scores one class"
        raise refuse_architecture(location, name, f"{why}; fit a LinearSVC or LogisticRegression")
    # A two-class probe has one row, whose positive side is the second class.
    named = classes[1:] if len(w_KD) == 1 and len(classes) == 2 else classes
    if len(named) != len(w_KD) or len(set(named)) != len(named):
        raise refuse_architecture(location, name, f"it has {len(w_KD)} rows for the classes {', '.join(classes[:8])}")
    return w_KD, bias_K, {label: row for row, label in enumerate(named)}


def _scaler(location: Location, steps: Sequence[object], d_in: int) -> tuple[F64 | None, F64]:
    """What is subtracted and what is divided by; a scaler has its mean even where it does not subtract it."""
    if not steps:
        return None, np.ones(d_in)
    if type(steps[0]).__name__ != "StandardScaler" or not hasattr(steps[0], "mean_"):
        raise refuse_architecture(
            location, type(steps[0]).__name__, "only a fitted StandardScaler may come before the probe"
        )
    scaler = cast(_Scaler, steps[0])
    mean_D = _finite(location, "mean_", _dense(scaler.mean_)) if scaler.with_mean else None
    scale_D = _finite(location, "scale_", _dense(scaler.scale_)) if scaler.with_std else np.ones(d_in)
    if scale_D.shape != (d_in,) or (mean_D is not None and mean_D.shape != (d_in,)):
        raise location.refuse(
            f"its scaler is {scale_D.size} wide and its probe {d_in}", "Save the pipeline as it was fitted."
        )
    return mean_D, scale_D


def _refuse_mixed_columns(location: Location, step: object, d_in: int) -> None:
    """A model that was fitted on named columns must have the stream's dimensions in the stream's order."""
    names = [str(name) for name in getattr(step, "feature_names_in_", ())]
    numbers = [int(match[1]) for name in names if (match := re.fullmatch(r"\D*(\d+)", name, re.ASCII))]
    if names and numbers not in (list(range(d_in)), list(range(1, d_in + 1))):
        raise location.refuse(
            f"it was fitted on columns named {', '.join(names[:4])}, ..., and nothing says which dimension each is",
            "Fit it on the array of activations itself.",
            RefusalReason.SOURCE_NUMBERS,
        )


def _dense(values: object) -> F64:
    """An array, also of a sparse matrix."""
    return np.asarray(getattr(values, "toarray", lambda: values)(), np.float64)


def _finite(location: Location, name: str, values: F64) -> F64:
    if not np.isfinite(values).all():
        raise location.refuse(f"its {name} holds NaN or infinity", "Fit it again.", RefusalReason.SOURCE_NUMBERS)
    return values
