"""Time and memory to build and read a large watchlist: `make bench-watchlist` writes results/watchlist-build.json.

256 features at 4 hook points, out of four synthetic SAELens folders of 65,536 features at d_model 4096: 2 GiB of
weights each, 8 GiB in all. Building reads every encoder once and hashes every file whole. It runs in a process of its
own, whose peak memory is the figure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from latentwatch import __version__
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.build import build

RESULT = Path(__file__).parent / "results" / "watchlist-build.json"
WIDTH, D_MODEL, HOOK_POINTS, FEATURES = 65536, 4096, 4, 256


def make_sae(folder: Path, layer: int, width: int, d_model: int) -> None:
    """A JumpReLU SAE of random numbers, written block by block in the layout of a .safetensors file."""
    folder.mkdir()
    shapes = {
        "W_dec": (width, d_model),
        "W_enc": (d_model, width),
        "b_dec": (d_model,),
        "b_enc": (width,),
        "threshold": (width,),
    }
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(layer)
    with (folder / "sae_weights.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = int(np.prod(shape))
            while left:
                block = rng.standard_normal(min(left, 1 << 24), np.float32) / 64
                file.write(np.abs(block).tobytes())
                left -= block.size
    cfg = {
        "architecture": "jumprelu",
        "d_in": d_model,
        "d_sae": width,
        "normalize_activations": "none",
        "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post", "sae_lens_version": "6.54.12"},
    }
    (folder / "cfg.json").write_text(json.dumps(cfg))


def make_yaml(folder: Path, width: int, d_model: int) -> Path:
    """The YAML that picks the features, spread over each SAE."""
    per_hook = FEATURES // HOOK_POINTS
    hooks = []
    for layer in range(HOOK_POINTS):
        index = np.linspace(0, width - 1, per_hook).astype(int).tolist()
        features = [{"index": i, "id": f"l{layer}.{i}", "label": f"feature {i}", "severity": "info"} for i in index]
        hooks.append(
            {
                "hook_point": f"resid_post.{layer}",
                "sources": [{"format": "saelens", "path": f"sae{layer}", "features": features}],
            }
        )
    model = {
        "name": "synthetic",
        "architecture": "LlamaForCausalLM",
        "d_model": d_model,
        "layers": 32,
        "vocab_size": 128256,
        "dtypes": ["bfloat16"],
    }
    path = folder / "watchlist.yaml"
    path.write_text(yaml.safe_dump({"name": "synthetic", "model": model, "hook_points": hooks}))
    return path


def child(folder: Path) -> None:
    """Build, and print seconds and the peak memory of this process."""
    began = time.perf_counter()
    build(folder / "watchlist.yaml", folder / "out.safetensors")
    seconds = time.perf_counter() - began
    print(json.dumps({"build_seconds": seconds, "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))


def read_seconds(path: Path) -> float:
    """The median of nine reads of the built file."""
    times = []
    for _ in range(9):
        began = time.perf_counter()
        watchlist_file.read(path)
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, default=WIDTH)
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    with tempfile.TemporaryDirectory(prefix="latentwatch-bench-") as name:
        folder = Path(name)
        for layer in range(HOOK_POINTS):
            print(f"writing SAE {layer + 1} of {HOOK_POINTS}", flush=True)
            make_sae(folder / f"sae{layer}", layer, args.width, D_MODEL)
        make_yaml(folder, args.width, D_MODEL)
        print("building", flush=True)
        command = [sys.executable, "-m", "tests.bench.watchlist_build", "--child", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        measured = json.loads(done.stdout)
        row = {
            "features": FEATURES,
            "hook_points": HOOK_POINTS,
            "width": args.width,
            "d_model": D_MODEL,
            "source_gib": round(sum(path.stat().st_size for path in folder.glob("sae*/*")) / 2**30, 2),
            "build_seconds": round(measured["build_seconds"], 1),
            "build_peak_gib": round(measured["peak_kib"] / 2**20, 3),
            "file_mib": round((folder / "out.safetensors").stat().st_size / 2**20, 1),
            "read_seconds": round(read_seconds(folder / "out.safetensors"), 4),
        }
    report = {
        "what": "time and memory to build and read a watchlist from four 65k-wide SAEs",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"latentwatch": __version__, "python": platform.python_version(), "numpy": np.__version__},
        "rows": [row],
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(row))
    return None


if __name__ == "__main__":
    main()
