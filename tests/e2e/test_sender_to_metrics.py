"""Sender, gRPC, receiver, core and /metrics together: what was sent is what is shown."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from latentwatch.collector.service import CollectorSettings, Service
from latentwatch.names import TokenState
from latentwatch.transport.sender import Sender
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist.file import Limit

from tests.support.streams import Schedule, hello, probe, sparse, tokens, watchlist
from tests.support.wire import in_loop

FEATURES = (sparse("a", limit=Limit("max", 3.0)), sparse("b"), probe("p", limit=Limit("rolling_mean", 0.5, 4)))


@pytest.mark.e2e
def test_every_token_that_a_sender_was_given_is_counted_across_a_restart_of_the_collector(tmp_path: Path) -> None:
    """Two collectors in turn on one socket: together they hold each token once."""
    watched = watchlist_file.write(watchlist(FEATURES), tmp_path / "w.safetensors")
    address = f"unix://{tmp_path}/c.sock"
    settings = CollectorSettings(tmp_path / "w.safetensors", (address,), "127.0.0.1:0")
    rng = np.random.default_rng(0)
    requests = [tokens(rng, FEATURES, handle=h, total=60, prompt_tokens=20) for h in range(1, 21)]
    batches = Schedule.random(rng, requests, 9).batches(FEATURES)
    sender = Sender(address, hello(watchlist_sha256=watched.sha256))
    sender.start()
    counted = []
    for part in np.array_split(np.arange(len(batches)), 2):
        service = Service(settings)
        in_loop(service.start())
        for i in part:
            sender.offer(batches[i])
        deadline = time.monotonic() + 60
        while sender.stats().acked < part[-1] + 1:
            assert time.monotonic() < deadline, sender.stats()
            time.sleep(0.02)
        counted.append(service.core.lookup.snapshot(time.time()))
        in_loop(service.stop())
    sender.close()
    totals = sum(int(s.engines[0].tokens.sum()) for s in counted)
    assert totals == sum(r.total for r in requests)
    assert all(s.collector.duplicates == s.collector.accounting_excess_tokens == 0 for s in counted)
    scored = sum(int(s.engines[0].tokens[[TokenState.SCORED, TokenState.INHERITED]].sum()) for s in counted)
    assert scored == sum(int(r.seen_T.sum()) for r in requests)
