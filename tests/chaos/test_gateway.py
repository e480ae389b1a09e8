"""Three sidecars of two engines each, and a gateway that is killed: afterwards it shows the sum of what they show."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from latentwatch.transport.sender import Sender

from tests.chaos.world import FEATURES, Totals, until, world
from tests.support.streams import Schedule, hello, tokens

pytestmark = pytest.mark.e2e

ENGINES, REQUESTS = 2, 40


def test_a_gateway_that_is_killed_shows_in_the_end_the_sum_of_its_sidecars():
    rng = np.random.default_rng(0)
    with world() as made:
        gateway = made.collector("gateway")
        gateway.start()
        forward = [["--forward-to", f"unix://{gateway.socket}", "--forward-name", f"pod-{i}"] for i in range(3)]
        sidecars = [made.collector(f"sidecar-{i}", more=options) for i, options in enumerate(forward)]
        for sidecar in sidecars:
            sidecar.start()
        senders, work, sent = [], [], 0
        for i, sidecar in enumerate(sidecars):
            for j in range(ENGINES):
                who = hello(
                    replica=f"pod-{i}/{j}", boot_id=rng.bytes(16).hex(), engine=str(j), watchlist_sha256=made.sha256
                )
                senders.append(Sender(f"unix://{sidecar.socket}", who))
                senders[-1].start()
                requests = [
                    replace(
                        tokens(rng, FEATURES, handle=n, total=int(rng.integers(5, 60)), prompt_tokens=4),
                        request_id=f"chatcmpl-{i}-{j}-{n}-0123abcd",
                    )
                    for n in range(1, REQUESTS + 1)
                ]
                sent += sum(request.total for request in requests)
                work.append(Schedule.random(rng, requests, 9).batches(FEATURES))
        rounds = max(len(batches) for batches in work)
        for step in range(rounds):
            for sender, batches in zip(senders, work, strict=True):
                if step < len(batches):
                    sender.offer(replace(batches[step], time_unix_nano=time.time_ns()))
            time.sleep(0.1)
            if step == rounds // 4:
                gateway.kill()
            if step == rounds // 2:
                gateway.start()
        gateway.kill()
        sidecars[0].kill()
        sidecars[0].start()
        gateway.start()
        assert not any(sender.close(20).dropped_batches for sender in senders)

        def shown() -> Totals:
            return gateway.totals()

        until(lambda: sum(shown().tokens.values()) >= sent, "everything to reach the gateway")
        counted = [sidecar.totals() for sidecar in sidecars]
        totals = shown()
        for key in set(totals.tokens) | {key for part in counted for key in part.tokens}:
            assert totals.tokens[key] == sum(part.tokens.get(key, 0) for part in counted), key
        assert sum(totals.tokens.values()) == sent
        assert totals.fires == sum(part.fires for part in counted) > 0
        assert totals.finished == sum(part.finished for part in counted) == 3 * ENGINES * REQUESTS
        assert totals.gaps == totals.excess == 0
