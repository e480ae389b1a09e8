"""Mutation testing of the pure core and of what stores and sends: `make bench-mutants` writes results/mutants.json.

mutmut plants one fault at a time (a changed operator, constant, argument, ...) and runs the unit tests that execute the
changed function. A mutant is killed where a test fails or runs into mutmut's limit of time; a mutant that no test
executes counts as a survivor. All mutants of a room are drawn from (`--each 0`: all of them) by a fixed seed, so that
two runs plant the same faults in the same code. Results of an interrupted run are used again, unless the sources
changed (`--fresh` begins anew).
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import platform
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from latentwatch import __version__

from tests.support.engines import ROOT

RESULT = ROOT / "tests/bench/results/mutants.json"
WORK = ROOT / ".cache/mutants"
CHUNK = 2000
"""mutants in one call of mutmut: names are arguments"""

ROOMS = {
    "facts and storage": ("facts", "storage", "secrets", "names"),
    "step": ("step.*",),
    "aggregate": ("aggregate.*",),
    "exporter": (
        "exporter.ledger",
        "exporter.attribution",
        "exporter.pending_steps",
        "exporter.score_cache",
        "exporter.backlog",
        "exporter.inheritance",
    ),
    "transport": (
        "transport.codec.*",
        "transport.send_buffer",
        "transport.spool*",
        "transport.stream_state",
        "transport.shed_priority",
        "transport.credentials",
        "transport.fair_queue",
        "transport.hello",
    ),
    "drift": ("drift.*",),
    "evidence": (
        "evidence.segment",
        "evidence.archive",
        "evidence.records",
        "evidence.encryption",
        "evidence.sealed_files",
    ),
    "collector": (
        "collector.requests",
        "collector.ingest",
        "collector.closing",
        "collector.lookup",
        "collector.erase",
        "collector.exceedances",
        "collector.pseudonyms",
        "collector.replicas",
    ),
    "durability": ("collector.durability.*", "collector.federation.outbox"),
    "watchlist": ("watchlist.file", "watchlist.document", "watchlist.selection", "watchlist.sources.*"),
}
TESTS = (
    *("tests/unit/" + room for room in ("step", "handover", "transport", "aggregate", "drift", "evidence", "exporter")),
    *("tests/unit/" + room for room in ("collector", "export", "watchlist", "test_storage.py", "test_secrets.py")),
)
NOT_RUN = (
    "tests/unit/collector/test_service.py",  # whole processes, in which mutmut does not see what is executed
)
KILLED = {"killed", "timeout", "suspicious", "segfault"}


@dataclass(slots=True)
class Outcome:
    """What became of the mutants of one room that were planted."""

    made: int = 0
    statuses: Counter[str] = field(default_factory=Counter)

    @property
    def killed(self) -> int:
        return sum(count for status, count in self.statuses.items() if status in KILLED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--each", type=int, default=250, help="mutants drawn in each room, 0: all (default: %(default)s)"
    )
    parser.add_argument("--rooms", nargs="*", default=list(ROOMS), choices=list(ROOMS), help="only these rooms")
    parser.add_argument("--seed", type=int, default=14)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="forget the results of an interrupted run")
    parser.add_argument("--print-only", action="store_true", help="write no result file")
    args = parser.parse_args()
    prepare(fresh=args.fresh)
    mutants_by_room = {room: drawn(room, args.each, args.seed) for room in args.rooms}
    before = read_statuses()
    wanted = [mutant for mutants in mutants_by_room.values() for mutant in mutants]
    waiting = [mutant for mutant in wanted if before[mutant] == "not checked"]
    for start in range(0, len(waiting), CHUNK):
        print(f"{start:,} of {len(waiting):,} mutants planted ({len(wanted):,} drawn)", flush=True)
        mutmut("run", "--max-children", str(args.workers), *waiting[start : start + CHUNK], progress=True)
    statuses = read_statuses()
    outcomes = {room: _outcome(mutants, statuses) for room, mutants in mutants_by_room.items()}
    for room, outcome in outcomes.items():
        print(f"{room:20} {outcome.made:6,} made {outcome.killed:6,} killed  {dict(outcome.statuses)}")
    survivors = [m for mutants in mutants_by_room.values() for m in mutants if statuses.get(m) not in KILLED]
    (WORK / "survivors.txt").write_text("".join(f"{statuses.get(m, 'not checked')}\t{m}\n" for m in survivors))
    print(
        f"survivors by name: {WORK.relative_to(ROOT)}/survivors.txt; `mutmut show NAME` in that folder shows a change"
    )
    if not args.print_only:
        write(outcomes, args.each, args.seed)
    return 0


def prepare(*, fresh: bool) -> None:
    """A copy of the tree in the layout that mutmut knows (`src/`), with every mutant of every room generated in it."""
    if fresh:
        shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    for source, target in (("monitor", "src"), ("tests", "tests"), ("proto", "proto"), ("dashboards", "dashboards")):
        ignored = shutil.ignore_patterns("node_modules", "__pycache__", "results")
        shutil.rmtree(WORK / target, ignore_errors=True)
        shutil.copytree(ROOT / source, WORK / target, ignore=ignored)
    globs = [f"src/latentwatch/{glob.replace('.', '/')}.py" for globs in ROOMS.values() for glob in globs]
    settings = {
        "source_paths": ["src"],
        "only_mutate": globs,
        "pytest_add_cli_args_test_selection": list(TESTS),
        "pytest_add_cli_args": [f"--ignore={path}" for path in NOT_RUN],
        "also_copy": ["proto", "dashboards"],
        # The tests start threads, gRPC among them: a worker forked from a process that ran them would inherit locks.
        "process_isolation": "forkserver",
    }
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in settings.items()]
    (WORK / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + "\n[tool.mutmut]\n" + "".join(lines))
    # No mutant has this name: mutmut generates all, measures which test executes which function, and stops there.
    output = mutmut("run", "none.such", expect_failure=True)
    if "nothing matches" not in output:
        raise SystemExit(f"mutmut generated no mutants:\n{output[-3000:]}")


def drawn(room: str, each: int, seed: int) -> list[str]:
    """The mutants of a room that are planted, in a fixed order."""
    names = sorted(name for name in read_statuses() if any(_is_of(name, glob) for glob in ROOMS[room]))
    if not each or each >= len(names):
        return names
    return sorted(random.Random(f"{seed}/{room}").sample(names, each))


def _is_of(mutant: str, glob: str) -> bool:
    module = mutant.removeprefix("latentwatch.").rpartition(".")[0]
    return fnmatch.fnmatchcase(module, glob) or module == glob.removesuffix(".*")


def read_statuses() -> dict[str, str]:
    """The state of every mutant that was generated, by name."""
    lines = mutmut("results", "--all", "true").splitlines()
    pairs = (line.strip().rpartition(": ") for line in lines if "__mutmut_" in line)
    return {name: status for name, _, status in pairs}


def mutmut(*arguments: str, expect_failure: bool = False, progress: bool = False) -> str:
    """One call of mutmut; its output, or where `progress` is asked for its own display and nothing returned."""
    run = subprocess.run(
        [Path(sys.executable).parent / "mutmut", *arguments],
        cwd=WORK,
        stdout=None if progress else subprocess.PIPE,
        stderr=None if progress else subprocess.STDOUT,
        text=True,
        check=False,
    )
    output = run.stdout or ""
    if run.returncode and not expect_failure:
        raise SystemExit(f"mutmut {arguments[0]} ended with {run.returncode}:\n{output[-3000:]}")
    return output


def _outcome(mutants: list[str], statuses: dict[str, str]) -> Outcome:
    return Outcome(len(mutants), Counter(statuses.get(mutant, "not checked") for mutant in mutants))


def write(outcomes: dict[str, Outcome], each: int, seed: int) -> None:
    result = {
        "what": "faults planted by mutmut and killed by the unit tests, a room at a time",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()}, CPU only",
        "versions": {"latentwatch": __version__, "python": platform.python_version(), "mutmut": version("mutmut")},
        "drawn_each": each,
        "seed": seed,
        "rows": [
            {"room": room, "made": o.made, "killed": o.killed, "not_executed": o.statuses["no tests"]}
            for room, o in outcomes.items()
        ],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    raise SystemExit(main())
