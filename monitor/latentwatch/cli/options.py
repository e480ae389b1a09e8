"""What verbs share, since none imports another: options of a settings model, routes and drift, the evidence folder."""

from __future__ import annotations

import argparse
import contextlib
import errno
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_origin

from latentwatch import host
from latentwatch.errors import ConfigRefused, RefusalReason

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from latentwatch.collector.config import CollectorConfig
    from latentwatch.collector.drift import DriftSettings
    from latentwatch.evidence.archive import Archive
    from latentwatch.evidence.audit import Audit


def add_settings(parser: argparse.ArgumentParser, model: type[CollectorConfig], groups: Mapping[str, str]) -> None:
    """An option for each field. One that is not given leaves no attribute, so that `given` is what was.

    Args: groups: title in the help by the first word of the fields' names; the others stand in no group.
    """
    titled = {title: parser.add_argument_group(title) for title in dict.fromkeys(groups.values())}
    for name, field in model.model_fields.items():
        title = groups.get(name.partition("_")[0])
        _add_setting(titled[title] if title else parser, name, field)


def given(args: argparse.Namespace, model: type[CollectorConfig]) -> dict[str, object]:
    """The fields that the command line set."""
    return {name: value for name, value in vars(args).items() if name in model.model_fields}


def _add_setting(group: argparse._ActionsContainer, name: str, field: FieldInfo) -> None:
    from latentwatch.collector.config import Metavar, flag

    parts = [*field.metadata, *_parts(field.annotation)]
    is_list = get_origin(field.annotation) is tuple
    if field.annotation is bool:
        text = " ".join(str(field.description).split())
        group.add_argument(f"--{flag(name)}", dest=name, action="store_true", default=argparse.SUPPRESS, help=text)
        return
    group.add_argument(
        f"--{flag(name)}",
        dest=name,
        action="append" if is_list else "store",
        default=argparse.SUPPRESS,
        metavar=next((part.text for part in parts if isinstance(part, Metavar)), None),
        choices=get_args(field.annotation) if get_origin(field.annotation) is Literal else None,
        help=" ".join(f"{field.description} {_default(field)}".split()),
    )


def _default(field: FieldInfo) -> str:
    """For the help; nothing where the text says what holds without a value."""
    if field.is_required():
        return "(required)"
    values = field.default if isinstance(field.default, tuple) else (field.default,)
    shown = [f"{value:g}" if isinstance(value, float | int) else value for value in values]
    return f"(default: {' '.join(shown)})" if shown and shown != [None] else ""


def _parts(annotation: object) -> Iterator[object]:
    for part in get_args(annotation):
        yield part
        yield from _parts(part)


def text(word: str) -> str:
    """Type of what is looked for: a word that is no text is in no file, and is not sought there."""
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{word!r} is no text in UTF-8") from error
    return word


def count(word: str) -> int:
    """Type of how many: a whole number above 0."""
    if not word.isdecimal() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number above 0")
    return int(word)


def route(text: str) -> re.Pattern[str]:
    """Type of --route."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def drift_settings(baseline: Path | None, canary_key: Path | None, route: re.Pattern[str] | None) -> DriftSettings:
    """What drift is measured against. Raises BaselineRefused or ConfigRefused "canary_key"."""
    from latentwatch.collector.drift import DriftSettings
    from latentwatch.drift import baseline as baselines
    from latentwatch.drift import canary
    from latentwatch.drift.detection import Budget

    key = canary.read_key(canary_key) if canary_key else b""
    if baseline is None:
        return DriftSettings(canary_key=key, route=route)
    read = baselines.read(baseline)
    return DriftSettings(read, Budget(window_seconds=read.window_seconds), key, route)


@contextlib.contextmanager
def opened_evidence(folder: Path) -> Iterator[tuple[Archive, Audit]]:
    """The folder's archive and audit log. Raises: ConfigRefused: it is missing, cannot be read, or is none of evidence;
    nothing is written there then."""
    import sqlite3

    from latentwatch.evidence import store
    from latentwatch.evidence.archive import Archive
    from latentwatch.evidence.audit import Audit

    store.check_folder(folder)
    try:
        with contextlib.closing(Archive(folder)) as archive, contextlib.closing(Audit(folder)) as audit:
            yield archive, audit
    except sqlite3.Error as error:
        raise ConfigRefused(
            f"evidence folder {folder}",
            found=str(error),
            instead="Run as the user of the collector: whoever reads has to be able to write the audit log.",
            reason=RefusalReason.EVIDENCE_UNREADABLE,
        ) from error


def write_page(path: Path, text: str) -> None:
    """A page, for this user alone. Raises ConfigRefused, "out_exists": no file of this user may be written there.

    A file that is there is replaced. A link is refused: whoever put it there would choose what is overwritten.
    """
    from latentwatch import storage

    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(path.lstat().st_mode):
                raise FileExistsError(errno.EEXIST, "it is a link, or no file")
        with storage.atomic_write(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise ConfigRefused(
            f"writing {path}",
            found=error.strerror or str(error),
            instead="Name a file in a folder of this user.",
            reason=RefusalReason.OUT_EXISTS,
        ) from error


def actor() -> str:
    """Who reads, for the audit log."""
    return f"cli:{host.user_name()}"
