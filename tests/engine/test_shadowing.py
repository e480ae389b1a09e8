"""`python -m vllm...` puts the folder that it is started in before everything installed: nothing there shadows us."""

from __future__ import annotations

from pathlib import Path

import pytest
from latentwatch.names import TokenState

from tests.engine.conftest import SMALL, monitored
from tests.support import server, tiny
from tests.support.engines import cache_root, random_prompts

pytestmark = pytest.mark.engine

DECOYS = ("monitor.py", "proto/__init__.py", "tests/__init__.py", "dashboards/__init__.py", "engine.py")
"""Names of this project's own folders, old and new, as a user's project may have them too."""


def test_a_server_started_in_a_folder_of_decoys_is_watched(tmp_path: Path, watchlist_path: Path):
    crowded = tmp_path / "crowded"
    for decoy in DECOYS:
        path = crowded / decoy
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"raise ImportError('the decoy {decoy} was imported')\n")
    # A checkout of this project, or a folder of notes on it: no package, so the installed one is found.
    (crowded / "latentwatch").mkdir()
    (crowded / "latentwatch" / "README.md").write_text("notes")
    model = tiny.llama(tmp_path / "model")
    tiny.save_tokenizer(model)
    engine = {"model": str(model), **SMALL, "dtype": "float32", "enforce_eager": True}
    (prompt,) = random_prompts(1, vocabulary=tiny.VOCABULARY, longest=40, seed=5)
    request = {"prompt": prompt["prompt"], "max_tokens": 4, "stop": [], "abort_after_outputs": None}
    with monitored(tmp_path) as collected:
        env = {**collected.environment(watchlist_path), "VLLM_CACHE_ROOT": str(cache_root())}
        with server.Server(engine, env, tmp_path / "server.log", 300.0, cwd=crowded) as served:
            served.ask(0, request)
            collected.wait_closed(1)
        sink = collected.sink
    log = (tmp_path / "server.log").read_text(errors="replace")
    assert "decoy" not in log
    assert [hello.armed for hello in sink.hellos] == [True]
    scored = sum(int(s["count"]) for b in sink.batches for s in b.segments_S if s["state"] == TokenState.SCORED)
    assert scored == len(request["prompt"]) + request["max_tokens"] - 1
