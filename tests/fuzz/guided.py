"""One target for a while, guided by coverage: `python -m tests.fuzz.guided TARGET --folder F --seconds N`.

atheris is libFuzzer for Python: of the package each branch is counted, and an input that takes a new one is kept and
changed further. What is found, by where it was raised, is in F/crashes; the numbers are in F/stats.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import time
import traceback
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["latentwatch"]):
    from tests.fuzz.targets import TARGETS

from tests.fuzz.mutate import MAX_BYTES
from tests.fuzz.targets.target import MIB, SECONDS, Target

_WRITE_SECONDS = 1.0


class Run:
    """Counts what a target makes of inputs."""

    def __init__(self, target: Target, folder: Path) -> None:
        self._target = target
        self._folder = folder
        self._began = self._written = time.monotonic()
        self.inputs = self.taken = 0
        self.unexpected: dict[str, int] = {}

    def one(self, data: bytes) -> None:
        """An input; nothing that it raises gets out, so that the run goes on."""
        began = time.process_time()
        self.inputs += 1
        try:
            self.taken += self._target.accepts(data)
        except Exception as error:
            # Whatever it is, it is what is looked for.
            self._found(error, data)
        if time.process_time() - began > SECONDS:
            self._note("took too long", data)
        if time.monotonic() > self._written + _WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """The numbers so far."""
        self._written = time.monotonic()
        stats = {
            "inputs": self.inputs,
            "taken": self.taken,
            "seconds": round(self._written - self._began, 1),
            "unexpected": self.unexpected,
        }
        partial = self._folder / "stats.json.partial"
        partial.write_text(json.dumps(stats))
        partial.replace(self._folder / "stats.json")

    def _found(self, error: Exception, data: bytes) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/latentwatch/" in frame.filename or "/tests/" in frame.filename]
        self._note(f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}", data)

    def _note(self, what: str, data: bytes) -> None:
        self.unexpected[what] = self.unexpected.get(what, 0) + 1
        if self.unexpected[what] == 1:
            name = hashlib.sha256(what.encode()).hexdigest()[:12]
            (self._folder / "crashes" / name).write_bytes(data)
            (self._folder / "crashes" / f"{name}.txt").write_text(
                f"{what}\n{traceback.format_exc()}", errors="backslashreplace"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--inputs", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    target, corpus = TARGETS[args.target], args.folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    (args.folder / "crashes").mkdir(exist_ok=True)
    for number, seed in enumerate(target.corpus()):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = args.folder / "words"
    escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in target.words)
    words.write_text("".join(f'"{word}"\n' for word in escaped))
    run = Run(target, args.folder)
    run.write()
    options = [
        f"-max_total_time={args.seconds}",
        f"-runs={args.inputs}",
        f"-seed={args.seed + 1}",
        f"-max_len={MAX_BYTES}",
        *([f"-dict={words}"] if target.words else []),
        f"-rss_limit_mb={2 * MIB}",
        f"-timeout={4 * SECONDS:.0f}",
        f"-artifact_prefix={args.folder}/crashes/",
        "-len_control=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], run.one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
