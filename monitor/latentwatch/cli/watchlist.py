"""`latentwatch watchlist ...`: find what to watch, and make, read and check the file that says it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from latentwatch.cli import options, terminal, watchlist_discover, watchlist_start, watchlist_try
from latentwatch.errors import ConfigRefused, RefusalReason

if TYPE_CHECKING:
    from latentwatch.watchlist.file import Watchlist

HELP = "Find what to watch; build, show and verify the file that says it."
EPILOG = "example:  latentwatch watchlist build watchlist.yaml --out prod.safetensors"

_BUILD = """Compile a watchlist.yaml and the SAEs and probes that it names into one .safetensors file.
Where a source's own library is installed, it is asked whether the rows are right. The same input gives the same bytes
where the same libraries are: the engine and the collector know the file by its SHA-256."""
_SEARCH = """Search published labels, and print the features found as YAML to paste under a source's 'features'.
Labels say what somebody made of a feature; measure it on your own traffic before it pages anyone."""
_VERIFY = """Check that a built file is whole; with --model, that a checkpoint is its model; with --against, that its
rows are those of the sources today; with --activations too, that its scores are those of the source's own library and
that the SAE fits this stream, so that a wrong hook point or scale is found before serving. Exit code 1 when something
does not hold."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the actions."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    build = actions.add_parser(
        "build",
        help="compile a watchlist.yaml",
        description=_BUILD,
        epilog="example:  latentwatch watchlist build watchlist.yaml --out prod.safetensors --force",
        formatter_class=raw,
    )
    build.add_argument("yaml", type=Path, metavar="YAML", help="the watchlist.yaml")
    build.add_argument("--out", type=Path, required=True, metavar="PATH", help="file to write")
    build.add_argument("--force", action="store_true", help="replace PATH when it exists")
    show = actions.add_parser(
        "show",
        help="print what a built file watches",
        description="Print the model, the hook points and every feature of a built watchlist file.",
        epilog="example:  latentwatch watchlist show prod.safetensors --html prod.html",
        formatter_class=raw,
    )
    show.add_argument("file", type=Path, metavar="FILE", help="a built watchlist file")
    show.add_argument("--html", type=Path, metavar="PATH", help="write HTML with a card per feature to PATH instead")
    show.add_argument("--json", action="store_true", help="print it as JSON instead")
    search = actions.add_parser(
        "search",
        help="find features by what others say they mean",
        description=_SEARCH,
        epilog="example:  latentwatch watchlist search 20-gemmascope-res-16k 'deceive user' --format neuronpedia",
        formatter_class=raw,
    )
    search.add_argument(
        "labels", metavar="LABELS", help="a Neuronpedia export folder, or a .json or .csv list of labels"
    )
    search.add_argument("words", metavar="WORDS", help="words that a label must hold, in any order and case")
    search.add_argument(
        "--format",
        choices=("csv", "json", "neuronpedia"),
        default="neuronpedia",
        help="of LABELS (default: %(default)s)",
    )
    search.add_argument(
        "--limit", type=options.count, default=50, metavar="N", help="features to print (default: %(default)s)"
    )
    search.add_argument("--json", action="store_true", help="print them as JSON instead")
    watchlist_discover.add_arguments(actions)
    watchlist_start.add_arguments(actions)
    watchlist_try.add_arguments(actions)
    verify = actions.add_parser(
        "verify",
        help="check a built file",
        description=_VERIFY,
        epilog="example:  latentwatch watchlist verify prod.safetensors --against watchlist.yaml",
        formatter_class=raw,
    )
    verify.add_argument("file", type=Path, metavar="FILE", help="a built watchlist file")
    verify.add_argument(
        "--against", type=Path, metavar="YAML", help="the watchlist.yaml it should have been built from"
    )
    verify.add_argument(
        "--model", type=Path, metavar="FOLDER", help="say whether the checkpoint in FOLDER is the model of the file"
    )
    verify.add_argument(
        "--activations",
        type=Path,
        nargs="+",
        default=[],
        metavar="X",
        help="with --against: .safetensors files of recorded tokens, tensor x [tokens, d_model] and metadata "
        "hook_point; scores them with the source's own library where it is installed, and prints errors, gate flips, "
        "L0 and the fraction of variance unexplained",
    )


def run(args: argparse.Namespace) -> int:
    """Run one action."""
    own = {"build": _build, "show": _show, "search": _search, "verify": _verify}
    own |= {"start": watchlist_start.run, "try": watchlist_try.run}
    return own.get(str(args.action), watchlist_discover.run)(args)


def _build(args: argparse.Namespace) -> int:
    from latentwatch.watchlist.build import build

    if args.out.exists() and not args.force:
        raise ConfigRefused(
            f"--out {args.out}",
            found="the file exists",
            instead="Add --force to replace it.",
            reason=RefusalReason.OUT_EXISTS,
        )
    built = build(args.yaml, args.out, lambda line: print(line, file=sys.stderr))
    print(f"{args.out}: {len(built.features)} features at {len(built.hooks)} hook points, sha256 {built.sha256}")
    return 0


def _show(args: argparse.Namespace) -> int:
    from latentwatch.watchlist import file as watchlist_file
    from latentwatch.watchlist import page, show

    watchlist = watchlist_file.read(args.file)
    if args.json:
        terminal.print_json(_facts(watchlist))
    elif args.html is None:
        print(show.as_text(watchlist), end="")
    else:
        options.write_page(args.html, page.as_html(watchlist))
        print(f"{args.html}: {len(watchlist.features)} cards")
    return 0


def _facts(watchlist: Watchlist) -> dict[str, object]:
    """What is in the file, but for the rows."""
    return {
        "name": watchlist.name,
        "sha256": watchlist.sha256,
        "notes": watchlist.notes,
        "model": watchlist.model,
        "features": [
            {"hook_point": str(point), **dataclasses.asdict(feature)}
            for feature, point in zip(watchlist.features, watchlist.hook_point_F, strict=True)
        ],
    }


def _search(args: argparse.Namespace) -> int:
    import json

    from latentwatch.watchlist import labels
    from latentwatch.watchlist.location import Location

    found = labels.search(labels.load(args.format, Location(args.labels, Path())), args.words)
    if args.json:
        terminal.print_json([{"index": i, **vars(label)} for i, label in found[: args.limit]])
        return 0 if found else 1
    for index, label in found[: args.limit]:
        evidence = {"label_source": label.source}
        fields = {"index": index, "id": f"f{index}", "label": label.text, "severity": "info", "evidence": evidence}
        print(f"- {json.dumps(fields, ensure_ascii=False)}")  # JSON on one line is YAML
    if len(found) > args.limit:
        print(f"{len(found) - args.limit} more; raise --limit to see them", file=sys.stderr)
    return 0 if found else 1


def _verify(args: argparse.Namespace) -> int:
    from latentwatch.names import ModelMatch
    from latentwatch.watchlist import checkpoint, show, verify
    from latentwatch.watchlist import file as watchlist_file

    watchlist = watchlist_file.read(args.file)
    print(f"{args.file}: whole, {len(watchlist.features)} features, sha256 {watchlist.sha256}")
    print(f"identity of its model: {show.identity_text(watchlist)}")
    problems = 0
    if args.model is not None:
        found = checkpoint.compare(watchlist.identity, args.model)
        print(f"{args.model}: {found.match.replace('_', ' ')}" + (f": {found.text}" if found.text else ""))
        problems += found.match is ModelMatch.DIFFERS
    if args.against is None:
        if args.activations:
            raise ConfigRefused(
                "--activations",
                found="--against is missing",
                instead="Give the YAML too.",
                reason=RefusalReason.AGAINST_MISSING,
            )
        return problems
    differences = verify.differences(watchlist, args.against)
    for line in differences:
        print(line)
    print("the rows are those of the sources" if not differences else f"{len(differences)} differences")
    problems += len(differences)
    for measured in verify.measure(watchlist, args.against, args.activations):
        print("\n".join(verify.report(measured)))
        problems += len(measured.problems)
    return 1 if problems else 0
