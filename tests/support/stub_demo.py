"""The demo's runner with stand-ins for the collector and vLLM: `python -m tests.support.stub_demo FOLDER`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from latentwatch.demo.run import commands, runner
from latentwatch.demo.run.terminal import Terminal
from latentwatch.names import HookPoint
from latentwatch.watchlist import file as watchlist_file

from tests.support.demo_run import features

D_MODEL = 8


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--prometheus", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    use_stubs(args.folder / "assets")
    options = runner.DemoOptions(args.folder / "out", args.keep, args.prometheus, args.seconds)
    return runner.run(options, Terminal(sys.stdout))


def use_stubs(assets: Path) -> None:
    """Write assets and replace what the services module starts."""
    write_assets(assets)
    commands.ASSETS = assets
    runner.SETTLE_SECONDS = 1.0
    collector_url = ""

    def collector(_watchlist: Path, _socket: Path, port: int, _evidence: Path | None = None) -> commands.Command:
        nonlocal collector_url
        collector_url = f"http://127.0.0.1:{port}"
        return stub("collector", "--port", str(port))

    def engine(_serving: commands.Serving, _socket: Path, port: int) -> commands.Command:
        return stub("engine", "--port", str(port), "--collector-url", collector_url)

    commands.collector, commands.engine = collector, engine


def stub(*args: str) -> commands.Command:
    return commands.Command((sys.executable, "-P", "-m", "tests.support.stub_servers", *args), {})


def write_assets(folder: Path) -> None:
    (folder / "model").mkdir(parents=True)
    for name, words in (("ordinary", "an ordinary question"), ("incidents", "a feared question")):
        row = {"topic": name, "messages": [{"role": "user", "content": words}]}
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    probe = features()[0]
    scale = np.zeros((len(watchlist_file.SCALE_ROWS), 1), np.float32)
    scale[watchlist_file.SCALE_ROWS.index("tau")] = scale[watchlist_file.SCALE_ROWS.index("lo")] = -np.inf
    zeros = np.zeros((1, D_MODEL), np.uint16)
    rows = watchlist_file.HookRows(HookPoint(2), (probe,), zeros, zeros, scale)
    model = watchlist_file.ModelCard("stub", "StubForCausalLM", D_MODEL, 4, 100, ("float32",))
    watchlist_file.write(watchlist_file.Watchlist("stub", model, (rows,)), folder / "demo.watchlist.safetensors")


if __name__ == "__main__":
    raise SystemExit(main())
