"""`latentwatch evidence ...`: what a collector wrote down of requests that exceeded a limit."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from latentwatch.cli import options, terminal
from latentwatch.errors import ConfigRefused, RefusalReason, WatchlistRefused

if TYPE_CHECKING:
    from latentwatch.evidence.archive import StoredRequest
    from latentwatch.facts import ShownExceedance
    from latentwatch.watchlist.file import Watchlist

HELP = "Find, show and delete the evidence that a collector wrote down."
EPILOG = "example:  latentwatch evidence query --dir /var/lib/latentwatch/evidence --since 2h"

_Actions: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_DIR: Final = Path("/var/lib/latentwatch/evidence")
_ID_HELP: Final = "response id, engine request id, trace id, or the client's X-Request-Id; exactly"
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the actions."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for add in (_add_query, _add_show, _add_delete, _add_export, _add_audit, _add_repair, _add_key):
        add(actions)


def _action(actions: _Actions, name: str, help: str, description: str, example: str) -> argparse.ArgumentParser:
    """An action on a folder of evidence."""
    made = actions.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"example:  latentwatch evidence {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--dir",
        type=Path,
        default=_DIR,
        metavar="DIR",
        help="the collector's --evidence folder (default: %(default)s)",
    )
    return made


def _add_query(actions: _Actions) -> None:
    query = _action(
        actions,
        "query",
        "list exceedances",
        "List exceedances, the latest first, one a line. Every reading is noted in the folder's audit log.",
        "query --feature p.deception --since 2h",
    )
    query.add_argument("--feature", type=options.text, metavar="ID", help="only this feature")
    query.add_argument(
        "--severity", choices=("critical", "warning", "info", "none"), help="only features of this severity"
    )
    query.add_argument("--model", metavar="NAME", help="only this served model name")
    query.add_argument("--since", metavar="AGE", help="not older than this, such as 90s, 30m, 2h or 7d")
    query.add_argument("--until", metavar="AGE", help="not younger than this")
    query.add_argument(
        "--limit", type=options.count, default=50, metavar="N", help="lines to print (default: %(default)s)"
    )
    query.add_argument("--json", action="store_true", help="print them as JSON instead")


def _add_show(actions: _Actions) -> None:
    show = _action(
        actions,
        "show",
        "show one request",
        "Show a request: how it went, what it exceeded and where, token by token. Exit code 1 when it is not there.",
        "show chatcmpl-7f3a --html request.html",
    )
    show.add_argument("id", type=options.text, metavar="ID", help=_ID_HELP)
    show.add_argument(
        "--feature",
        type=options.text,
        metavar="ID",
        help="only this feature (default: those that exceeded their limit)",
    )
    show.add_argument(
        "--key", type=Path, metavar="FILE", help="show the tokens too, where a gateway left them, with this key"
    )
    show.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="the model's tokenizer.json, where only token ids were left"
    )
    show.add_argument(
        "--watchlist",
        type=Path,
        metavar="FILE",
        help="the watchlist of that time, which tells which tokens a limit counts and over what window",
    )
    show.add_argument("--html", type=Path, metavar="PATH", help="write HTML to PATH instead")
    show.add_argument("--json", action="store_true", help="print everything as JSON instead")


def _add_delete(actions: _Actions) -> None:
    delete = _action(
        actions,
        "delete",
        "delete one request for good",
        "Delete everything about a request and leave no trace of it in the files. Works beside a running collector,\n"
        "once the request has ended. Lists each request that it deletes: those whose id this is exactly, no other.\n"
        "Exit code 1 when it is not there.",
        "delete chatcmpl-7f3a",
    )
    delete.add_argument("id", type=options.text, metavar="ID", help=_ID_HELP)
    delete.add_argument(
        "--by",
        choices=("response_id", "request_id", "trace_id", "client_id", "digest"),
        help="what the id is; needed where it is the response id of one request and, say, the engine's id of another",
    )
    delete.add_argument("--dry-run", action="store_true", help="only list what would be deleted")


def _add_export(actions: _Actions) -> None:
    export = _action(
        actions,
        "export",
        "write everything as Parquet files",
        "Write requests.parquet, exceedances.parquet and activations.parquet, for analysis elsewhere. What was said\n"
        "in requests is not exported; what is exported is out of reach of retention and deletion here.",
        "export --out evidence-2026-11",
    )
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder for the files")


def _add_audit(actions: _Actions) -> None:
    audit = _action(
        actions,
        "audit",
        "list who read or deleted what",
        "List readings and deletions, the latest first. Request ids are noted as SHA-256 only; give one to ask for it.",
        "audit --id chatcmpl-7f3a",
    )
    audit.add_argument("--id", type=options.text, default="", metavar="ID", help="only what was asked about this id")
    audit.add_argument(
        "--limit", type=options.count, default=50, metavar="N", help="lines to print (default: %(default)s)"
    )
    audit.add_argument("--json", action="store_true", help="print them as JSON instead")


def _add_repair(actions: _Actions) -> None:
    repair = _action(
        actions,
        "repair",
        "save what can be read of damaged files",
        "Save what can be read of the segments that a collector set aside as damaged, and say what is lost. Works\n"
        "beside a running collector; without one, every segment is read to its end first. Exit code 1 where nothing\n"
        "could be read of one.",
        "repair --remove",
    )
    repair.add_argument(
        "--remove", action="store_true", help="remove each damaged file once what can be read of it is saved"
    )


def _add_key(actions: _Actions) -> None:
    key = actions.add_parser(
        "key",
        help="make a key file",
        description="Write a new key file for the collector's --evidence-key. To change keys, put the new one on top.",
        epilog="example:  latentwatch evidence key evidence.key",
    )
    key.add_argument("path", type=Path, metavar="PATH", help="file to write; refuses to overwrite")


def run(args: argparse.Namespace) -> int:
    """Run one action."""
    actions = {
        "query": _query,
        "show": _show,
        "delete": _delete,
        "export": _export,
        "audit": _audit,
        "repair": _repair,
        "key": _key,
    }
    return actions[args.action](args)


def _query(args: argparse.Namespace) -> int:
    from latentwatch.evidence.archive import Wanted
    from latentwatch.evidence.known_names import check_wanted

    now = time.time()
    wanted = Wanted(args.feature, args.severity, args.model, _before(now, args.since), _before(now, args.until))
    with options.opened_evidence(args.dir) as (archive, audit):
        check_wanted(archive, wanted)
        found = archive.exceedances(wanted, args.limit)
        damaged = archive.damaged.names
        filters = ("feature", "severity", "model", "since", "until")
        subject = " ".join(f"{name}={value}" for name in filters if (value := getattr(args, name)) is not None)
        audit.add(now, options.actor(), "query", len(found), subject=subject)
    if args.json:
        terminal.print_json(found)
    else:
        _print_exceedances(found)
    _say_damaged(damaged)
    return 0


def _print_exceedances(found: Sequence[ShownExceedance]) -> None:
    from latentwatch.evidence.heatmap import printable

    for exceedance in found:
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(exceedance.seconds))
        print(
            f"{moment}  {exceedance.severity:<8}  {exceedance.feature}  {exceedance.value:.4g} over "
            f"{exceedance.limit:g}  {exceedance.phase} {exceedance.position}  {printable(exceedance.request_id)}"
        )
    if not found:
        print("no exceedance of this kind is kept", file=sys.stderr)


def _show(args: argparse.Namespace) -> int:
    import json

    from latentwatch.evidence import heatmap

    with options.opened_evidence(args.dir) as (archive, audit):
        found = archive.find(args.id)
        damaged = archive.damaged.names
        audit.add(time.time(), options.actor(), "show", len(found), request=args.id)
        if args.key:
            audit.add(time.time(), options.actor(), "content", len(found), request=args.id)
    _say_damaged(damaged)
    if not found:
        return _not_stored(args)
    tokens = _tokens(args, found[0].key) if args.key else ()
    watchlist = _watchlist(args.watchlist, found) if args.watchlist else None
    if args.json:
        print(json.dumps(found, default=vars, ensure_ascii=False, indent=1))
        return 0
    if args.html:
        if len(found) > 1:
            print(f"{len(found)} requests have this id; the HTML shows the latest", file=sys.stderr)
        options.write_page(args.html, heatmap.as_html(found[0], tokens, feature=args.feature, watchlist=watchlist))
        print(args.html)
        return 0
    for number, request in enumerate(found):
        print(
            heatmap.as_text(
                request,
                () if number else tokens,
                colour=terminal.wants_colour(sys.stdout),
                feature=args.feature,
                watchlist=watchlist,
            )
        )
    return 0


def _watchlist(path: Path, found: Sequence[StoredRequest]) -> Watchlist:
    """Raises: WatchlistRefused: it cannot be read, or is not what these requests were scored with."""
    from latentwatch.watchlist import file

    watchlist = file.read(path)
    others = sorted({request.watchlist_sha256 for request in found} - {watchlist.sha256})
    if others:
        raise WatchlistRefused(
            f"watchlist {path}",
            found=f"its sha256 is {watchlist.sha256}; the request was scored with {', '.join(others)}",
            instead="Give the watchlist file of that time, or leave out --watchlist.",
            reason=RefusalReason.WATCHLIST_MISMATCH,
        )
    return watchlist


def _tokens(args: argparse.Namespace, request: int) -> Sequence[str]:
    """The text of each token; empty where nothing was left."""
    from latentwatch.evidence import sealed_files
    from latentwatch.evidence.encryption import Vault

    sealed = sealed_files.get(args.dir, request)
    if sealed is None:
        print("nothing that was said in it is kept", file=sys.stderr)
        return ()
    content = Vault.read(args.key).open(request, sealed)
    if content.tokens:
        return content.tokens
    if args.tokenizer is None:
        return [f"[{id}]" for id in content.token_ids]
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigRefused(
            "--tokenizer",
            found="the package tokenizers is not installed",
            instead="Run: pip install tokenizers",
            reason=RefusalReason.PACKAGE_MISSING,
        ) from error
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    return [tokenizer.decode([id], skip_special_tokens=False) for id in content.token_ids]


def _key(args: argparse.Namespace) -> int:
    from latentwatch.evidence.encryption import write_key

    write_key(args.path)
    print(f"{args.path}: a new key; without it, what was sealed with it cannot be read again")
    return 0


def _delete(args: argparse.Namespace) -> int:
    from latentwatch.client_ids import IdKind, meanings
    from latentwatch.evidence import store
    from latentwatch.evidence.heatmap import printable

    meant = meanings(args.id)
    with options.opened_evidence(args.dir) as (archive, audit):
        found = store.find(args.dir, meant, archive.damaged)
        try:
            kind = store.one_kind(found, args.id, IdKind(args.by) if args.by else None)
        except ConfigRefused:
            # It names them.
            audit.add(time.time(), options.actor(), "show", len(found), request=args.id)
            raise
        found = [match for match in found if kind in match.kinds]
        if not found or args.dry_run:
            audit.add(time.time(), options.actor(), "show", len(found), request=args.id)
        if not found:
            _say_damaged(archive.damaged.names)
            return _not_stored(args)
        for match in found:
            print(f"{printable(match.request_id)}  {printable(match.response_id)}")
        if args.dry_run:
            print(f"{len(found)} requests would be deleted, by {kind}")
            return 0
        erased = store.erase(args.dir, {kind: meant[kind]}, archive.damaged)
        audit.add(time.time(), options.actor(), "delete", erased.requests, request=args.id)
    print(f"{erased.requests} requests deleted, {erased.rows} rows")
    if _say_damaged(erased.damaged):
        return 1
    if not erased.clean:
        print(
            "a reader kept an older state open: the rows are gone, but the write-ahead log could not be emptied. "
            "Close what reads the folder and delete the id again.",
            file=sys.stderr,
        )
    return 0 if erased.clean else 1


def _say_damaged(names: Sequence[str]) -> bool:
    """Whether there are files that an answer says nothing of."""
    if names:
        print(
            f"{len(names)} files cannot be used, and may hold rows of this or any request: {', '.join(names)}. "
            "'latentwatch evidence repair --remove' saves what it can of segments and removes them.",
            file=sys.stderr,
        )
    return bool(names)


def _repair(args: argparse.Namespace) -> int:
    from latentwatch.evidence import damage, repair, segment

    _set_damaged_aside(args.dir)
    done = [repair.repair(path) for path in repair.damaged_segments(args.dir)]
    for one in done:
        if one.into is None:
            print(f"{one.path.name}: nothing could be read: {one.why}", file=sys.stderr)
            continue
        saved = ", ".join(f"{count} {table}" for table, count in one.saved.items())
        lost = ", ".join(f"{'?' if count is None else count} {table}" for table, count in one.lost.items())
        print(f"{one.path.name}: saved {saved} as {one.into.name}; lost at most {lost}")
    if args.remove:
        for path in damage.aside(args.dir):
            if path.suffix == damage.SALVAGED or any(one.path == path for one in done):
                segment.remove(path)
                print(f"{path.name}: removed")
    if not done:
        print("no segment is damaged")
    return 0 if all(one.into for one in done) else 1


def _set_damaged_aside(folder: Path) -> None:
    """As the collector would, where none runs. Raises ConfigRefused where there is no such folder."""
    import sqlite3

    from latentwatch import storage
    from latentwatch.evidence import repair, store
    from latentwatch.evidence.archive import Archive

    store.check_folder(folder)
    damaged = Archive(folder).damaged
    lock = storage.lock_folder(folder, "evidence.lock")
    if lock is None:
        return
    try:
        for path in store.segments(folder):
            try:
                repair.check(path)
            except (sqlite3.Error, ConfigRefused, ValueError) as error:
                damaged.record(path, error)
        damaged.settle()
    finally:
        lock.release()


def _export(args: argparse.Namespace) -> int:
    from latentwatch.evidence import store

    try:
        from latentwatch.evidence import parquet
    except ImportError as error:
        raise ConfigRefused(
            "evidence export",
            found=f"{error.name} is not installed",
            instead="Run in a clone of the repository: pip install '.[parquet]'",
            reason=RefusalReason.PACKAGE_MISSING,
        ) from error
    store.check_folder(args.dir)
    try:
        args.out.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigRefused(
            f"--out {args.out}",
            found=error.strerror or str(error),
            instead="Name a new folder.",
            reason=RefusalReason.OUT_EXISTS,
        ) from error
    with options.opened_evidence(args.dir) as (archive, audit):
        audit.add(time.time(), options.actor(), "export", 0, subject=str(args.out))
        rows = parquet.export(archive.requests(), args.out)
        damaged = archive.damaged.names
    print(f"{args.out}: " + ", ".join(f"{count} {name}" for name, count in rows.items()))
    _say_damaged(damaged)
    return 0


def _audit(args: argparse.Namespace) -> int:
    import itertools

    from latentwatch.evidence.heatmap import printable

    with options.opened_evidence(args.dir) as (_, audit):
        entries = list(itertools.islice(audit.entries(request=args.id), args.limit))
    if args.json:
        terminal.print_json(entries)
        return 0
    for entry in entries:
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.seconds))
        subject = printable(entry.subject) or entry.subject_sha256[:16]
        print(f"{moment}  {entry.actor}  {entry.action}  {entry.found}  {subject}".rstrip())
    return 0


def _before(now: float, age: str | None) -> float | None:
    if age is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", age)
    if match is None:
        raise ConfigRefused(
            f"age {age!r}",
            found="it is no number with a unit",
            instead="Write 90s, 30m, 2h or 7d.",
            reason=RefusalReason.AGE_INVALID,
        )
    return now - float(match[1]) * _UNITS[match[2]]


def _not_stored(args: argparse.Namespace) -> int:
    print(
        f"latentwatch evidence: {args.id[:256]!r} is not kept in {args.dir}: it exceeded no limit, is too old, or was "
        "seen by another collector",
        file=sys.stderr,
    )
    return 1
