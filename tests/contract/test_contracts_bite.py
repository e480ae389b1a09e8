"""Every import contract of pyproject.toml is kept by the package and broken by a planted import, it and no other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.engines import ROOT

CONFIG = ROOT / "pyproject.toml"
CONTRACTS = [contract["name"] for contract in tomllib.loads(CONFIG.read_text())["tool"]["importlinter"]["contracts"]]
TYPES_ONLY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "

# Contract, and what is appended to which files: imports that no other contract forbids.
BREACHES = [
    ("the tree is the data path", {"exporter/__init__.py": "import latentwatch.demo"}),
    ("the tree is the data path", {"kernels/__init__.py": "import latentwatch.demo"}),
    ("the tree is the data path", {"in_no_layer.py": ""}),
    (
        "no circles, at any depth, imports for types included",
        {
            "watchlist/planted_a.py": "import latentwatch.watchlist.planted_b",
            "watchlist/planted_b.py": TYPES_ONLY + "import latentwatch.watchlist.planted_a",
        },
    ),
    ("a verb imports no other verb", {"cli/baseline.py": "import latentwatch.cli.canary"}),
    ("a verb imports no other verb", {"cli/planted.py": "def run():\n    import latentwatch.cli.doctor"}),
    ("generated protobuf is touched by codec only", {"collector/__init__.py": "import latentwatch.transport._pb"}),
    ("the engine side never imports the collector side", {"engines/__init__.py": "import latentwatch.aggregate"}),
    ("the engine process holds no grpc", {"handover/__init__.py": "import grpc"}),
    ("the engine process holds no grpc", {"engines/__init__.py": "import latentwatch.transport"}),
    ("torch is imported where tensors are made, nowhere else", {"cli/__init__.py": "import torch.nn"}),
    ("triton is imported by the kernels only", {"demo/build/__init__.py": "import triton.language"}),
    ("an engine is imported by its own folder only", {"kernels/__init__.py": "import vllm"}),
    (
        "exporter and collector load neither torch nor an engine, by no detour",
        {"collector/__init__.py": "def f():\n    import latentwatch.kernels.reference"},
    ),
    ("the numbers are pure: no thread, socket or clock behind them", {"drift/__init__.py": "import time"}),
]


def lint(source_root: Path) -> dict[str, bool]:
    """By contract: whether it is kept by the package in this folder."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo", "--config", CONFIG],
        cwd=source_root,
        # Before the installed package, and wide enough that no contract's name is wrapped.
        env={**os.environ, "PYTHONPATH": str(source_root), "COLUMNS": "250"},
        capture_output=True,
        text=True,
    )
    found = re.findall(r"^(.+?) (KEPT|BROKEN)\b", done.stdout, re.MULTILINE)
    assert [name for name, _ in found] == CONTRACTS, done.stdout + done.stderr
    return {name: verdict == "KEPT" for name, verdict in found}


@pytest.fixture
def source_root(tmp_path):
    """A copy of the package's Python that a test may spoil."""
    shutil.copytree(
        ROOT / "monitor",
        tmp_path / "monitor",
        ignore=lambda folder, names: [n for n in names if not (n.endswith(".py") or Path(folder, n).is_dir())],
    )
    return tmp_path / "monitor"


def test_the_package_keeps_every_contract(source_root):
    assert [name for name, kept in lint(source_root).items() if not kept] == []


@pytest.mark.parametrize(("contract", "planted"), BREACHES)
def test_a_planted_import_breaks_this_contract_and_no_other(contract, planted, source_root):
    for file, text in planted.items():
        path = source_root / "latentwatch" / file
        assert path.parent.is_dir(), "the folder was moved: plant in another"
        with path.open("a") as code:
            code.write(f"\n{text}\n")
    assert [name for name, kept in lint(source_root).items() if not kept] == [contract]


def test_every_contract_has_a_breach_planted():
    assert {contract for contract, _ in BREACHES} == set(CONTRACTS)
