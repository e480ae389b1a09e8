"""Read watchlist.yaml, the file that a person writes, into what is asked for: hook points, sources, features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NotRequired, TypedDict, cast

from latentwatch.errors import RefusalReason
from latentwatch.names import HookPoint, Severity
from latentwatch.watchlist.document import Document, Place, refuse
from latentwatch.watchlist.figures import Figures
from latentwatch.watchlist.file import Limit, ModelCard
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.places import hook_point
from latentwatch.watchlist.sources import SourceOptions

MAX_YAML_BYTES: Final = 8 << 20
_DEFAULT_SKIP: Final = 1
_CONFIG: Final = "config.json"
_SIZES: Final = ("architecture", "d_model", "layers", "vocab_size")


class _LimitEntry(TypedDict):
    statistic: str
    value: float
    window_tokens: NotRequired[int]
    phase: NotRequired[str]


class _FeatureEntry(TypedDict, total=False):
    index: int
    name: str
    id: str
    label: str
    severity: str
    skip_first_positions: int
    limit: _LimitEntry
    evidence: Figures


class _OptionsEntry(TypedDict, total=False):
    input_scale: float
    centre: bool
    k: int
    norm: str
    written_by: str
    trained_on: str
    ignore: list[str]


class _CalibrationEntry(TypedDict):
    activations: str
    match: NotRequired[str]


class _LabelsEntry(TypedDict):
    format: str
    path: str
    layer: NotRequired[int]


class _SourceEntry(TypedDict):
    format: str
    path: str
    options: NotRequired[_OptionsEntry]
    licence: NotRequired[str]
    calibration: NotRequired[_CalibrationEntry]
    labels: NotRequired[list[_LabelsEntry]]
    defaults: NotRequired[_FeatureEntry]
    features: list[_FeatureEntry]


class _HookEntry(TypedDict):
    hook_point: str
    sources: list[_SourceEntry]


class _ModelEntry(TypedDict):
    name: str
    dtypes: list[str]
    config: NotRequired[str]
    checkpoint: NotRequired[str]
    architecture: NotRequired[str]
    d_model: NotRequired[int]
    layers: NotRequired[int]
    vocab_size: NotRequired[int]


class _Root(TypedDict):
    """The file, once it has been checked against schema.json."""

    name: str
    notes: NotRequired[str]
    model: _ModelEntry
    hook_points: list[_HookEntry]


class _Sizes(TypedDict):
    architecture: str
    d_model: int
    layers: int
    vocab_size: int


@dataclass(frozen=True)
class FeatureChoice:
    """One feature that the YAML asks for."""

    where: str
    """Its place in the YAML, for errors."""
    index: int | None
    """Row of the source; None where `name` is given instead."""
    name: str | None
    id: str
    label: str | None
    """None where the source's label lists must know it."""
    severity: Severity
    skip_first_positions: int
    limit: Limit | None
    evidence: Figures


@dataclass(frozen=True)
class Calibration:
    """On what, and how, the gates of a TopK source are matched."""

    activations: Location
    match: str
    """"rate" or "l0"."""


@dataclass(frozen=True)
class LabelList:
    """A published list of labels."""

    format: str
    location: Location
    layer: int | None = None
    """That its labels are for, where the list itself does not say it."""


@dataclass(frozen=True)
class SourceChoice:
    """One source and what is wanted of it."""

    where: str
    format: str
    location: Location
    options: SourceOptions
    licence: str | None
    calibration: Calibration | None
    labels: tuple[LabelList, ...]
    features: tuple[FeatureChoice, ...]


@dataclass(frozen=True)
class HookChoice:
    """One hook point and its sources."""

    where: str
    hook_point: HookPoint
    sources: tuple[SourceChoice, ...]


@dataclass(frozen=True)
class Selection:
    """A checked watchlist.yaml."""

    name: str
    notes: str
    model: ModelCard
    hooks: tuple[HookChoice, ...]
    """In layer order."""
    checkpoint: Path | None = None
    """Folder of the model's checkpoint; None where the YAML names none."""


def load(path: Path) -> Selection:
    """Read and check a watchlist.yaml.

    Raises: WatchlistRefused: with the place in the file (`hook_points[0].sources[1].features[2].severity, line 31`),
            what was found there and what to write instead. `reason` is "yaml_missing", "yaml_syntax" or "yaml_schema".
    """
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise refuse(path.name, f"{path.stat().st_size} bytes", f"A watchlist has at most {MAX_YAML_BYTES}.")
        data = path.read_bytes()
    except OSError as error:
        raise refuse(
            str(path), f"it cannot be read ({error.strerror})", "Give a watchlist.yaml.", RefusalReason.YAML_MISSING
        ) from error
    return parse(data, path.name, path.parent)


def parse(data: bytes, name: str, base: Path) -> Selection:
    """Check the bytes of a watchlist.yaml; paths in it start from `base`. Raises as `load`."""
    document = Document(name, data)
    document.check()
    root = cast(_Root, document.value)
    model = _model(document, root["model"], base)
    hooks = [_hook(document, i, fields, model, base) for i, fields in enumerate(root["hook_points"])]
    points = [hook.hook_point for hook in hooks]
    for i, point in enumerate(points):
        if point in points[:i]:
            raise document.refuse(("hook_points", i), f"{point} stands twice", "Put all its sources under one entry.")
    in_order = tuple(sorted(hooks, key=lambda hook: hook.hook_point))
    with document.at(("model", "checkpoint")):
        folder = _checkpoint(root["model"], base)
    return Selection(root["name"], root.get("notes", ""), model, in_order, folder)


def _model(document: Document, fields: _ModelEntry, base: Path) -> ModelCard:
    given = [key for key in _SIZES if key in fields]
    if "config" in fields:
        if given:
            raise document.refuse(
                ("model",), f"it gives config and also {', '.join(given)}", "Give config alone, or the four sizes."
            )
        with document.at(("model", "config")):
            sizes = _model_config(Location(fields["config"], base))
    elif missing := [key for key in _SIZES if key not in given]:
        raise document.refuse(("model",), f"{', '.join(missing)} missing", "Add them, or give 'config' instead.")
    else:
        sizes = _Sizes(
            architecture=fields["architecture"],
            d_model=fields["d_model"],
            layers=fields["layers"],
            vocab_size=fields["vocab_size"],
        )
    return ModelCard(name=fields["name"], dtypes=tuple(fields["dtypes"]), **sizes)


def _checkpoint(fields: _ModelEntry, base: Path) -> Path | None:
    """The folder that is named, else the one that config.json lies in: of the hub, what was fetched of it."""
    if (named := fields.get("checkpoint")) is not None:
        return Location(named, base).file(_CONFIG).parent
    if "config" not in fields:
        return None
    return _config_file(Location(fields["config"], base)).parent


def _config_file(location: Location) -> Path:
    return location.file("" if location.text.endswith(".json") else _CONFIG)


def _model_config(location: Location) -> _Sizes:
    """Architecture and sizes out of a Hugging Face config.json."""
    config = location.json("" if location.text.endswith(".json") else _CONFIG)
    text_config = config.get("text_config")
    text = text_config if isinstance(text_config, dict) else config
    architectures = config.get("architectures")
    values = {
        "architecture": architectures[0] if isinstance(architectures, list) and architectures else None,
        "d_model": _first(text, "hidden_size", "n_embd", "d_model"),
        "layers": _first(text, "num_hidden_layers", "n_layer"),
        "vocab_size": _first(text, "vocab_size") or _first(config, "vocab_size"),
    }
    for key, value in values.items():
        if not isinstance(value, str if key == "architecture" else int) or isinstance(value, bool) or not value:
            raise location.refuse(f"it gives no {key}", "Give architecture, d_model, layers and vocab_size instead.")
    return cast(_Sizes, values)


def _first(fields: Mapping[str, object], *names: str) -> object:
    return next((fields[name] for name in names if name in fields), None)


def _hook(document: Document, i: int, fields: _HookEntry, model: ModelCard, base: Path) -> HookChoice:
    path: Place = ("hook_points", i)
    with document.at((*path, "hook_point")):
        point = hook_point(fields["hook_point"])
    if point.layer >= model.layers:
        raise document.refuse(
            (*path, "hook_point"),
            f"{point} in a model of {model.layers} layers",
            f"Use resid_post.0 to resid_post.{model.layers - 1}.",
            RefusalReason.HOOK_POINT_UNKNOWN,
        )
    sources = tuple(_source(document, (*path, "sources", j), s, base) for j, s in enumerate(fields["sources"]))
    return HookChoice(document.where(path), point, sources)


def _source(document: Document, path: Place, fields: _SourceEntry, base: Path) -> SourceChoice:
    defaults: _FeatureEntry = fields.get("defaults", {})
    features = [
        _feature(document, (*path, "features", i), {**defaults, **feature}, needs_label="labels" not in fields)
        for i, feature in enumerate(fields["features"])
    ]
    return SourceChoice(
        where=document.where(path),
        format=fields["format"],
        location=Location(fields["path"], base),
        options=_options(fields.get("options", {})),
        licence=fields.get("licence"),
        calibration=_calibration(fields.get("calibration"), base),
        labels=tuple(
            LabelList(item["format"], Location(item["path"], base), item.get("layer"))
            for item in fields.get("labels", ())
        ),
        features=tuple(features),
    )


def options_of(text: str, what: str) -> SourceOptions:
    """The options of a source, as they stand in a watchlist.yaml; `what` names them in errors. Raises as `load`."""
    document = Document(what, text.encode())
    document.check("options")
    return _options(cast(_OptionsEntry, document.value))


def _options(fields: _OptionsEntry) -> SourceOptions:
    return SourceOptions(
        input_scale=fields.get("input_scale"),
        centre=fields.get("centre"),
        k=fields.get("k"),
        norm=fields.get("norm"),
        written_by=fields.get("written_by"),
        trained_on=fields.get("trained_on"),
        ignore=tuple(fields.get("ignore", ())),
    )


def _calibration(fields: _CalibrationEntry | None, base: Path) -> Calibration | None:
    if fields is None:
        return None
    return Calibration(Location(fields["activations"], base), fields.get("match", "rate"))


def _feature(document: Document, path: Place, fields: _FeatureEntry, *, needs_label: bool) -> FeatureChoice:
    if "severity" not in fields:
        raise document.refuse(path, "key 'severity' is missing", "Give it here or in the source's 'defaults'.")
    if needs_label and "label" not in fields:
        raise document.refuse(path, "key 'label' is missing", "Add it, or give the source a list under 'labels'.")
    with document.at((*path, "limit")):
        limit = Limit(**fields["limit"]) if "limit" in fields else None
    return FeatureChoice(
        where=document.where(path),
        index=fields.get("index"),
        name=fields.get("name"),
        id=fields["id"],
        label=fields.get("label"),
        severity=Severity(fields["severity"]),
        skip_first_positions=fields.get("skip_first_positions", _DEFAULT_SKIP),
        limit=limit,
        evidence=fields.get("evidence", {}),
    )
