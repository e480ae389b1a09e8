"""One architecture, with and without the monitor, and what came of it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from latentwatch.names import Reason, TokenState
from latentwatch.watchlist import file as watchlist_file

from tests.bench.architectures.catalogue import Row
from tests.bench.architectures.compare import TOLERANCE, Comparison, compare
from tests.support import tiny
from tests.support.engines import ROOT, cache_root, random_prompts
from tests.support.recording import RecordingCollector, RecordingSink, Scores

LAYERS: Final = (1, tiny.LAYERS - 1)
"""Of the watchlist: one in the middle, and the last, behind which there is only the final norm."""
MAX_TOKENS: Final = 6
PROMPTS: Final = [item["prompt"] for item in random_prompts(6, vocabulary=tiny.VOCABULARY, longest=60, seed=3)]
ENGINE: Final = {
    "max_model_len": 256,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 8,
    "dtype": "float32",
    # The streams that the engine itself reads are taken from the same sequences a second time.
    "enable_prefix_caching": False,
}
"""Prompts are chunked, and batches mix prefill and decode."""


class Failed(Exception):
    """What was to be done in a fork has no result. The text: its log's last error."""


class Forks:
    """The process that does the work, started anew where it had to be ended."""

    def __init__(self, seconds: float) -> None:
        """Args: seconds: the limit of one piece of work."""
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None

    def do(self, what: str, job: dict[str, Any], folder: Path, name: str) -> Path:
        """Returns the result's path. Raises Failed."""
        job_path, log = folder / f"{name}.job", folder / f"{name}.log"
        result = folder / f"{name}.result"
        result.unlink(missing_ok=True)
        job_path.write_text(json.dumps(job))
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{what} {job_path} {result} {log}\n")
        process.stdin.flush()
        limit = threading.Timer(self._seconds, self._end)
        limit.start()
        while (line := process.stdout.readline()) not in ("done\n", ""):
            pass
        limit.cancel()
        if not line:
            raise Failed(f"ended after {self._seconds:.0f} s")
        if not result.exists():
            raise Failed(error_of(log.read_text(errors="replace")))
        return result

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.architectures.forks"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()


def error_of(log: str) -> str:
    """The last exception of a log, with the line below where it goes on, or the code above where it says nothing."""
    lines = [line for line in log.splitlines() if line.strip(" ^~")]
    named = [i for i, line in enumerate(lines) if re.match(r"[A-Za-z_.]*(Error|Exception|Refused)\b", line)]
    if not named:
        return log.strip()[-300:]
    last = named[-1]
    text = lines[last]
    if ":" not in text and last:
        text = f"{text}: {lines[last - 1].strip()}"
    elif lines[last + 1 : last + 2] and lines[last + 1].startswith("  "):
        text = f"{text} {lines[last + 1].strip()}"
    return text[:300]


def walk(row: Row, folder: Path, forks: Forks) -> dict[str, Any]:
    """The row of the result, `seconds` included. Raises nothing that a model's failure could cause."""
    began = time.monotonic()
    found = _walk(row, folder, forks)
    if found["outcome"] == "engine_cannot" and "dtype" not in row.engine:
        # Some of vLLM's CPU kernels know nothing else.
        row = dataclasses.replace(row, engine={**row.engine, "dtype": "bfloat16"})
        again = _walk(row, folder, forks)
        found = again if again["outcome"] != "engine_cannot" else found
    otherwise = not found.get("same_answers_alone", True)
    if found["outcome"] == "wrong" and (otherwise or found.get("dtype") == "bfloat16"):
        # What a request's stream is then depends on the others in its batch, so only a batch of one can be compared.
        alone = _walk(dataclasses.replace(row, engine={**row.engine, "max_num_seqs": 1}), folder, forks)
        if alone["outcome"] == "exact":
            why = (
                "without the monitor vLLM answers some otherwise in a batch"
                if otherwise
                else "a batch rounds otherwise"
            )
            reason = f"one request at a time, for {why}; {alone['reason']}".removesuffix("; ")
            found = {**alone, "reason": reason, "same_answers_alone": not otherwise}
    return {"architecture": row.architecture, "mode": row.mode, **found, "seconds": round(time.monotonic() - began, 1)}


def _walk(row: Row, folder: Path, forks: Forks) -> dict[str, Any]:
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    try:
        forks.do("checkpoint", {"row": dataclasses.asdict(row), "path": str(model)}, folder, "checkpoint")
    except Failed as error:
        return {"outcome": "no_checkpoint", "reason": str(error)}
    job = {
        "engine": {**ENGINE, "enforce_eager": row.mode != "compiled", **row.engine, "model": str(model)},
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "layers": [],
        "layer_count": tiny.LAYERS,
        "returned": row.returned,
        "env": {"VLLM_CACHE_ROOT": str(cache_root())},
    }
    try:
        plain = {
            **job,
            "env": {**job["env"], "LATENTWATCH_DISABLE": "1"},
            "layers": [] if row.mode == "compiled" else LAYERS,
        }
        off = json.loads(forks.do("engine", plain, folder, "off").read_text())
        _check_finite(folder / "streams.npz")
    except Failed as error:
        return {"outcome": "engine_cannot", "reason": str(error)}
    said = json.loads((model / "config.json").read_text()).get("num_hidden_layers", tiny.LAYERS)
    rows: Any = {"layers": LAYERS, "sparse": 2, "dense": 6, "threshold": 0.0}
    card: Any = {"architecture": row.architecture, "num_layers": said}
    watchlist = tiny.watchlist(folder / "w.safetensors", **rows, **card)
    with tempfile.TemporaryDirectory(prefix="lw") as short, RecordingCollector(Path(short) / "c.sock") as collector:
        env = {"LATENTWATCH_WATCHLIST": str(folder / "w.safetensors"), "LATENTWATCH_COLLECTOR": collector.target}
        try:
            watched = {**job, "env": {**job["env"], **env}}
            on = json.loads(forks.do("engine", watched, folder, "on").read_text())
        except Failed as error:
            return {"outcome": "harmed", "reason": str(error)}
        collector.wait_closed(len(PROMPTS), seconds=60.0)
        sink = collector.sink
    if on["outputs"] != off["outputs"]:
        return {"outcome": "harmed", "reason": "answers differ from those without the monitor"}
    return _judged(row, folder, forks, watchlist, off, sink)


def _check_finite(streams: Path) -> None:
    """Raises Failed: without the monitor the engine computes nothing that can be scored."""
    if streams.exists() and not all(np.isfinite(x_TD).all() for x_TD in np.load(streams).values()):
        raise Failed("without the monitor its streams are not finite")


def _judged(
    row: Row, folder: Path, forks: Forks, watchlist: watchlist_file.Watchlist, off: Any, sink: RecordingSink
) -> dict[str, Any]:
    """What the collector was told, against Hugging Face and against what the engine's own modules read."""
    fed = [(prompt + output)[:-1] for prompt, output in zip(PROMPTS, off["outputs"], strict=True)]
    scores = sink.requests(watchlist)
    told = [scores[key] for key in sorted(scores, key=lambda request_id: int(request_id.partition("-")[0]))]
    unbooked = len(told) != len(fed) or [sum(one.tokens.values()) for one in told] != [len(tokens) for tokens in fed]
    if unbooked:
        return {"outcome": "wrong", "reason": f"tokens booked {sum(sum(one.tokens.values()) for one in told)}"}
    states = _states(told)
    refused = {hello.not_armed_text for hello in sink.hellos if not hello.armed}
    if refused:
        reason = sink.hellos[-1].not_armed_reason
        if set(states) != {(TokenState.UNSEEN, Reason.NOT_ARMED)}:
            return {"outcome": "wrong", "reason": f"refused ({reason}), and booked as {dict(states)}"}
        return {"outcome": "refused", "reason": f"{reason}: {' '.join(sorted(refused))}", "positions": 0}
    if set(states) != {(TokenState.SCORED, Reason.NONE)}:
        return {"outcome": "wrong", "reason": f"armed, and booked as {_named(states)}"}
    return _compared(row, folder, forks, watchlist, told, fed, off)


def _states(told: list[Scores]) -> Counter[tuple[TokenState, Reason]]:
    states: Counter[tuple[TokenState, Reason]] = Counter()
    for scores in told:
        for (state, reason, _), count in scores.tokens.items():
            states[state, reason] += count
    return states


def _named(states: Counter[tuple[TokenState, Reason]]) -> dict[str, int]:
    return {f"{state.name.lower()} {reason.name.lower()}": count for (state, reason), count in states.items()}


def _compared(
    row: Row,
    folder: Path,
    forks: Forks,
    watchlist: watchlist_file.Watchlist,
    told: list[Scores],
    fed: list[list[int]],
    off: Any,
) -> dict[str, Any]:
    dtype = row.engine.get("dtype", "float32")
    job = {
        "path": str(folder / "model"),
        "made_by": row.made_by or row.architecture,
        "dtype": dtype,
        "layers": LAYERS,
        "layer_count": tiny.LAYERS,
        "fed": fed,
    }
    reference: dict[str, Any] = {}
    by_hf, agree, why = None, None, ""
    try:
        if not row.reference:
            raise Failed("no such architecture")
        reference = dict(np.load(forks.do("hugging_face", job, folder, "hf")))
        by_hf = compare(watchlist, told, fed, reference, TOLERANCE[dtype])
        agree = _agree(reference, off["outputs"])
        why = "Hugging Face's layers return streams of another shape" if by_hf is None else ""
    except Failed as error:
        why = f"Hugging Face: {error}"
    streams = folder / "streams.npz"
    by_engine = compare(watchlist, told, fed, dict(np.load(streams)), TOLERANCE[dtype]) if streams.exists() else None
    alone = {} if "alone" not in off else {"same_answers_alone": off["alone"] == off["outputs"]}
    return {
        "dtype": dtype,
        **alone,
        **verdict(by_hf, by_engine, agree, why, off.get("readers", []), TOLERANCE[dtype], row.returned),
    }


def _agree(reference: dict[str, Any], outputs: list[list[int]]) -> float:
    """Share of the engine's tokens that Hugging Face's model finds most likely there too."""
    same = [reference[f"{i}-next"][-len(output) :] == np.array(output) for i, output in enumerate(outputs)]
    return round(float(np.concatenate(same).mean()), 3)


def verdict(
    by_hf: Comparison | None,
    by_engine: Comparison | None,
    agree: float | None,
    why: str,
    readers: list[str],
    tolerance: float,
    returned: bool = False,
) -> dict[str, Any]:
    """Hugging Face's word is taken where it confirms; the engine's own where vLLM's model is seen to be another."""
    told: dict[str, Any] = {}
    if by_hf is not None:
        told |= {"error_hugging_face": _short(by_hf.worst), "same_answers_as_hugging_face": agree}
        why = f"vLLM's arithmetic differs from Hugging Face's by itself, by up to {by_hf.worst:.2g} of a score"
        if not by_hf.same_place:
            why = f"vLLM's model differs from Hugging Face's by itself, it answers alike in {agree:.0%}"
    if by_engine is not None:
        told |= {"error_engine": _short(by_engine.worst), "read_by": sorted(set(readers))}
    if by_hf is not None and by_hf.exact:
        return {"outcome": "exact", "reason": "", **_figures("hugging_face", by_hf), **told}
    # Where both models answer alike from different streams, what the engine's modules are given is no excuse.
    if by_engine is not None and by_engine.exact and (by_hf is None or by_hf.same_place or (agree or 0.0) < 1.0):
        given = "what the engine's layers return" if returned else "what the engine's own modules are given"
        reason = f"compared with {given}: {why}"
        return {"outcome": "exact", "reason": reason, **_figures("engine", by_engine), **told}
    found = by_hf or by_engine
    if found is None:
        return {"outcome": "not_compared", "reason": f"nothing to compare with: {why}"}
    reason = f"{found.beyond} of {found.positions} positions beyond {tolerance:g}, the median is {found.median:.2g}"
    return {"outcome": "wrong", "reason": reason, "positions": found.positions, **told}


def _figures(oracle: str, found: Comparison) -> dict[str, Any]:
    return {
        "oracle": oracle,
        "positions": found.positions,
        "worst_score_error": _short(found.worst),
        "neighbour_error": _short(found.neighbour),
    }


def _short(value: float) -> float:
    return float(f"{value:.2g}")
