"""`latentwatch replay`: what a collector with this baseline would have said of recorded traffic."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from latentwatch.cli import options, terminal

if TYPE_CHECKING:
    from latentwatch.collector.core import Core
    from latentwatch.collector.replay import Replayed
    from latentwatch.collector.snapshot import Snapshot

HELP = "Run a recording through a collector's logic, in recorded time, and print what it would have alarmed on."
EPILOG = """exit code 0: no alarm; 1: at least one
example:  latentwatch replay monday.recording --watchlist prod.safetensors --baseline prod.baseline"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("recording", type=Path, metavar="FILE")
    parser.add_argument("--watchlist", type=Path, required=True, metavar="FILE", help="what the recording scored")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="measure drift against this baseline")
    parser.add_argument("--canary-key", type=Path, metavar="FILE", help="as for a collector")
    parser.add_argument("--json", action="store_true", help="print it as JSON instead")
    parser.add_argument("--route", type=options.route, metavar="REGEX", help="as for a collector")


def run(args: argparse.Namespace) -> int:
    """Replay and print."""
    import datetime

    from latentwatch.collector.core import Core
    from latentwatch.collector.replay import replay
    from latentwatch.transport import recording
    from latentwatch.watchlist import file as watchlist_file

    drift = options.drift_settings(args.baseline, args.canary_key, args.route)
    core = Core(watchlist_file.read(args.watchlist), drift=drift)
    done = replay(core, recording.read(args.recording))
    snapshot = core.lookup.snapshot(done.last_seconds)
    ended = sum(sum(engine.requests.values()) for engine in snapshot.engines)
    exceeded = _exceeded(core, snapshot)
    if args.json:
        terminal.print_json(_facts(done, ended, exceeded))
        return int(bool(done.alarms))
    print(
        f"{done.batches} batches, {ended} ended requests, {(done.last_seconds - done.first_seconds) / 60:.1f} minutes"
    )
    for feature, count in sorted(exceeded.items(), key=lambda item: -item[1]):
        print(f"  {count} requests above the limit of {feature}")
    for view in core.drift.views():
        print(f"{view.model_name}: {view.windows} windows compared" + (f", {view.reason}" if view.reason else ""))
    for seconds, model_name, alarm in done.alarms:
        at = datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        print(f"  {at} {model_name} [{alarm.kind}] {alarm.text}")
    return int(bool(done.alarms))


def _exceeded(core: Core, snapshot: Snapshot) -> dict[str, int]:
    """Requests above the limit of each feature that some exceeded."""
    counts = {
        feature.id: sum(int(model.exceedances_F[i]) for model in snapshot.models)
        for i, feature in enumerate(core.lookup.features)
    }
    return {feature: count for feature, count in counts.items() if count}


def _facts(done: Replayed, ended: int, exceeded: dict[str, int]) -> dict[str, object]:
    return {
        "batches": done.batches,
        "ended_requests": ended,
        "first_seconds": done.first_seconds,
        "last_seconds": done.last_seconds,
        "exceeded": exceeded,
        "alarms": [
            {"seconds": seconds, "model_name": model_name, **vars(alarm)} for seconds, model_name, alarm in done.alarms
        ],
    }
