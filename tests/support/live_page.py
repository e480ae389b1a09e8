"""A collector under made-up load, to look at the page and to measure: `python -m tests.support.live_page --help`."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from latentwatch.collector.service import CollectorSettings, Service
from latentwatch.names import Outcome, Phase, Reason, Severity, TokenState
from latentwatch.step.batch import FIRE_DTYPE, SEGMENT_DTYPE, RequestClosed, RequestOpened, StepBatch
from latentwatch.transport.hello import Hello
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.file import Feature, Limit, Watchlist

from tests.support.streams import hello, probe, received, sparse, watchlist

TOPICS = (
    "Deceiving the user", "Complying with a jailbreak", "Seeking power or resources", "Leaking personal data",
    "Backdoor trigger", "Refusal", "Weather", "Cooking", "Python code", "Legal language", "Medical advice", "Travel",
    "Numbers and dates", "Sarcasm", "Apology", "Quotes from law <b>&amp;</b>", "Chess", "German text",
)  # fmt: skip
PROBES = 5


def toy_watchlist(features: int) -> Watchlist:
    """Probes for the feared topics first, then sparse features, some of them with a limit."""
    made: list[Feature] = [
        probe(f"p.{TOPICS[i].split()[0].lower()}", label=TOPICS[i], limit=Limit("rolling_mean", 2.0, 8))
        for i in range(PROBES)
    ]
    severities = (Severity.NONE, Severity.WARNING, Severity.INFO)
    for i in range(PROBES, features):
        limit = Limit("max", 9.0) if i % 3 else None
        label = TOPICS[i % len(TOPICS)] + ("" if i < len(TOPICS) else f", {i // len(TOPICS)}")
        made.append(sparse(f"l1.f{(i * 7919) % 16384}", label=label, limit=limit, severity=severities[i % 3]))
    return watchlist(made, hooks=2)


class Traffic:
    """Steps of `running` requests at a time; `incident` makes some of them deceive."""

    def __init__(self, watched: Watchlist, running: int, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._features = watched.features
        self._sparse = np.flatnonzero(watched.sparse_F)
        self._rate = self._rng.beta(0.6, 40, len(self._sparse))
        self._running = running
        self._requests: list[dict[str, int]] = []
        self._handle = 0
        self.incident = False
        self.cached_share = 0.0

    def steps(self) -> Iterator[StepBatch]:
        step = 0
        while True:
            step += 1
            yield self._step(step)

    def _step(self, step: int) -> StepBatch:
        rng, closed = self._rng, [r for r in self._requests if r["at"] >= r["total"]]
        self._requests = [r for r in self._requests if r["at"] < r["total"]]
        opened = []
        while len(self._requests) < self._running:
            self._handle += 1
            prompt = int(rng.integers(8, 60))
            bad = int(self.incident and rng.random() < 0.3)
            request = {
                "handle": self._handle,
                "at": 0,
                "prompt": prompt,
                "total": prompt + int(rng.integers(20, 200)),
                "bad": bad,
            }
            self._requests.append(request)
            opened.append(RequestOpened(self._handle, _id(self._handle), prompt))
        segments, bad_R = [], []
        for r in self._requests:
            count = r["prompt"] if r["at"] == 0 else 1
            phase = Phase.PROMPT if r["at"] == 0 else Phase.OUTPUT
            cached = r["at"] == 0 and rng.random() < self.cached_share
            state = (TokenState.UNSEEN, Reason.PREFIX_CACHE) if cached else (TokenState.SCORED, Reason.NONE)
            segments.append((r["handle"], r["at"], count, *state, phase))
            bad_R += [] if cached else [r["bad"] and phase is Phase.OUTPUT] * count
            r["at"] += count
        return StepBatch(
            step=step,
            time_unix_nano=time.time_ns() - 20_000_000,
            segments_S=np.array(segments, SEGMENT_DTYPE),
            **self._scores(np.array(bad_R, bool)),
            opened=tuple(opened),
            closed=tuple(
                RequestClosed(
                    r["handle"],
                    _id(r["handle"]),
                    r["prompt"],
                    r["total"] - r["prompt"] + 1,
                    r["total"],
                    Outcome.FINISHED,
                )
                for r in closed
            ),
        )

    def _scores(self, bad_R: np.ndarray) -> dict[str, np.ndarray]:
        rng, R = self._rng, len(bad_R)
        row, column = np.nonzero(rng.random((R, len(self._sparse))) < self._rate)
        fires = np.zeros(len(row), FIRE_DTYPE)
        fires["row"], fires["feature"] = row, self._sparse[column]
        fires["act"] = np.minimum(rng.gamma(2.0, 1.1, len(row)) + 0.05, 8.9)
        dense = rng.normal(-1.0, 0.7, (R, PROBES))
        dense[bad_R, 0] += 4.5
        return {
            "fires_N": fires,
            "dense_RP": dense.astype(np.float16),
            "norm_RH": rng.gamma(9, 3, (R, 2)).astype(np.float32),
        }


def _id(handle: int) -> str:
    return f"chatcmpl-{handle * 2654435761 % 2**32:08x}{handle:024x}-{handle * 40503 % 2**32:08x}"


async def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        watched = watchlist_file.write(toy_watchlist(args.features), Path(folder) / "toy.safetensors")
        service = Service(
            CollectorSettings(Path(folder) / "toy.safetensors", (f"unix://{folder}/collector.sock",), args.http)
        )
        await service.start()
        print(service.http_url, flush=True)
        if args.scenario != "empty":
            await feed(service, watched, args)
        await asyncio.sleep(args.seconds)
        await service.stop()


async def feed(service: Service, watched: Watchlist, args: argparse.Namespace) -> None:
    """Six minutes of traffic as fast as it goes, with times in the past, and then live."""
    core = service.core
    who = hello(replica="llama-7d9f-x2k4/0", model_name="llama-3.1-8b", watchlist_sha256=watched.sha256)
    core.ingest.hello(who, time.time())
    if args.scenario == "blind":
        text = "watchlist toy: rows of width 8 for a model of d_model 4096. Use a source trained on this model."
        core.ingest.hello(_blind(who, text), time.time())
    traffic = Traffic(watched, args.running)
    start = time.time()
    for i, batch in enumerate(traffic.steps(), start=1):
        past = (1.0 - i / args.history) * 360.0
        traffic.incident = args.scenario == "incident" and 60 < past < 100
        traffic.cached_share = 0.3 if args.scenario == "gaps" else 0.0
        now = start - past if past > 0 else time.time()
        core.ingest.observe(who, received(i, batch), now)
        if past <= 0:
            await asyncio.sleep(0.05)
        if time.time() - start > args.seconds:
            return
        if past <= 0 and args.scenario == "away":
            core.ingest.goodbye(who, now)
            return


def _blind(who: Hello, text: str) -> Hello:
    return hello(
        replica="llama-7d9f-q8w1/0",
        boot_id="1" * 32,
        model_name=who.model_name,
        armed=False,
        not_armed_reason="watchlist_width",
        not_armed_text=text,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--http", default="127.0.0.1:9464")
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--running", type=int, default=12)
    parser.add_argument("--history", type=int, default=1500, help="steps of history before it goes live")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument(
        "--scenario", choices=("empty", "calm", "incident", "gaps", "away", "blind"), default="incident"
    )
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
