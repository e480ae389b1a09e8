"""The command line: `latentwatch VERB`. One file per verb; only main() turns errors into exit codes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final, Protocol, cast

from latentwatch import __version__, host
from latentwatch.cli import missing_packages
from latentwatch.cli.output import Descriptor, lenient_streams
from latentwatch.errors import Refusal

VERBS: Final = {
    "demo": "latentwatch.cli.demo",
    "collector": "latentwatch.cli.collector",
    "doctor": "latentwatch.cli.doctor",
    "rules": "latentwatch.cli.rules",
    "evidence": "latentwatch.cli.evidence",
    "watchlist": "latentwatch.cli.watchlist",
    "calibrate": "latentwatch.cli.calibrate",
    "baseline": "latentwatch.cli.baseline",
    "canary": "latentwatch.cli.canary",
    "record": "latentwatch.cli.record",
    "replay": "latentwatch.cli.replay",
}
"""Verb to module. A verb is asked for its arguments only when it was named, and imports heavy libraries in run()."""


SERVING: Final = ("demo", "collector", "canary", "record")
"""Verbs whose work is not what they print: without a reader they go on, and end as if there had been one."""


class Verb(Protocol):
    """What a verb's module offers at its top level."""

    HELP: str
    """One line for the list of verbs."""
    EPILOG: str
    """A line to paste, shown at the end of the verb's help."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


class _VerbParser(argparse.ArgumentParser):
    """Has its verb's arguments from the first parsing on: what other verbs' options need is not imported."""

    verb: Verb | None = None

    # argparse's stubs overload it; both forms are passed on as they came.
    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        if self.verb is not None:
            verb, self.verb = self.verb, None
            verb.add_arguments(self)
        return super().parse_known_args(args, namespace)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; a test renders every verb's help from it."""
    parser = argparse.ArgumentParser(
        prog="latentwatch",
        description="See what a served model is thinking, while it serves.",
        epilog="""Colour is off where NO_COLOR is set. Completion in bash or zsh: install latentwatch[completion], then
eval "$(register-python-argcomplete latentwatch)".
example:  latentwatch demo""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"latentwatch {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_VerbParser)
    for name, module in VERBS.items():
        verb = cast(Verb, importlib.import_module(module))
        child = verbs.add_parser(
            name,
            help=verb.HELP,
            description=verb.HELP,
            epilog=verb.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        child.verb = verb
        child.set_defaults(run=verb.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit code 0 done, 1 the verb found something wrong or what it printed did not arrive, 2 refused
    input or something that the system refused, 130 interrupted, 141 nobody read on.
    """
    host.prepare_process()
    with lenient_streams() as out:
        verb = next((word for word in sys.argv[1:] if argv is None and word in VERBS), "")
        try:
            parser = build_parser()
            _complete(parser)
            args = parser.parse_args(argv)
        except ImportError as error:
            return _lacks(verb or str(next(iter(argv or ()), "")), error)
        try:
            code = int(args.run(args))
        except ImportError as error:
            return _lacks(args.verb, error)
        except (Refusal, OSError) as refusal:
            print(f"latentwatch {args.verb}: {refusal}", file=sys.stderr)
            return 2
        except UnicodeEncodeError as error:
            # A word of the command line, or a file's name, that is not in the encoding of this process's locale.
            print(f"latentwatch {args.verb}: {error.object[:80]!r} is no text in UTF-8", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
        serves = args.verb in SERVING and not getattr(args, "config_schema", False)
        return code if serves else _printed(args.verb, code, out)


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks how a line may go on, where argcomplete is installed."""
    if "_ARGCOMPLETE" in os.environ:
        with contextlib.suppress(ModuleNotFoundError):
            argcomplete = importlib.import_module("argcomplete")
            argcomplete.autocomplete(parser)


def _lacks(verb: str, error: ImportError) -> int:
    """Say which package a verb lacks. Raises `error` where it is a bug of our own."""
    refusal = missing_packages.refusal(verb, error)
    if refusal is None:
        raise error
    print(refusal, file=sys.stderr)
    return 2


def _printed(verb: str, code: int, out: Descriptor) -> int:
    """The exit code of a verb whose work is what it prints."""
    sys.stdout.flush()
    if not out.lost or out.error is None:
        return code
    if out.error.errno == errno.EPIPE:
        return 128 + signal.SIGPIPE
    print(f"latentwatch {verb}: standard output: {out.error.strerror}", file=sys.stderr)
    return code or 1
