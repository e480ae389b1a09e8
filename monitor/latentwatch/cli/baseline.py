"""`latentwatch baseline show`: what a baseline says of each feature."""

from __future__ import annotations

import argparse
from pathlib import Path

from latentwatch.cli import options, terminal

HELP = "Show a baseline: what it is of, and each feature's rate, tolerance, dispersion and limit."
EPILOG = """example:  latentwatch baseline show prod.baseline --html prod.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The `show` action."""
    actions = parser.add_subparsers(dest="action", metavar="show", required=True)
    show = actions.add_parser("show", help="print a baseline, or write it as HTML with plots", epilog=EPILOG)
    show.add_argument("baseline", type=Path, metavar="FILE")
    show.add_argument("--json", action="store_true", help="print what it is of, and a row for each feature, as JSON")
    show.add_argument("--html", type=Path, metavar="FILE", help="write HTML with a plot for each feature instead")


def run(args: argparse.Namespace) -> int:
    """Print, or write HTML."""
    from latentwatch.drift import baseline, show

    read = baseline.read(args.baseline)
    if args.json:
        terminal.print_json(show.facts(read))
        return 0
    if args.html is None:
        print(show.table(read))
        return 0
    options.write_page(args.html, show.page(read))
    print(f"wrote {args.html}")
    return 0
