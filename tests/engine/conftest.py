"""A tiny model, its watchlist, and one place where an engine run is set up with or without the monitor."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from latentwatch.watchlist import file as watchlist_file

from tests.support import tiny
from tests.support.engines import ROOT, EngineResult, run_engine
from tests.support.recording import RecordingCollector, RecordingSink

RUNNERS = {
    "v1": {},
    "v2": {"VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": str(ROOT / "tests/support/triton_on_cpu")},
}
"""Environment per model runner; V2 needs Triton, which runs interpreted here."""

SMALL = {"max_model_len": 256, "max_num_batched_tokens": 48, "max_num_seqs": 8, "block_size": 32}
"""An engine in which prompts are chunked, batches mix prefill and decode, and 8 requests run at once."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def watchlist_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("watchlist") / "tiny.watchlist.safetensors"
    tiny.watchlist(path)
    return path


@pytest.fixture(scope="session")
def watchlist(watchlist_path: Path) -> watchlist_file.Watchlist:
    return watchlist_file.read(watchlist_path)


class Monitored:
    """Runs engines that report to one recording collector."""

    def __init__(self, folder: Path, collector: RecordingCollector) -> None:
        self._folder = folder
        self._collector = collector

    @property
    def sink(self) -> RecordingSink:
        return self._collector.sink

    def run(
        self,
        watchlist: Path | str,
        *,
        waves: list[list[dict[str, Any]]],
        env: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> EngineResult:
        monitored = {**self.environment(watchlist), **(env or {})}
        result = run_engine(self._folder, waves=waves, env=monitored, **kwargs)
        if "LATENTWATCH_DISABLE" not in monitored:
            # On a busy machine the exporter may connect only after the engine has ended; it then drains the ring.
            self.wait_closed(sum(len(wave) for wave in waves))
        return result

    def environment(self, watchlist: Path | str) -> dict[str, str]:
        """What makes an engine report here."""
        return {"LATENTWATCH_WATCHLIST": str(watchlist), "LATENTWATCH_COLLECTOR": self._collector.target}

    def wait_closed(self, requests: int) -> None:
        self._collector.wait_closed(requests, seconds=90.0)


@contextmanager
def monitored(folder: Path) -> Iterator[Monitored]:
    # A Unix socket's path is short; pytest's folders are not.
    with tempfile.TemporaryDirectory(prefix="lw") as short, RecordingCollector(Path(short) / "c.sock") as collector:
        yield Monitored(folder, collector)
