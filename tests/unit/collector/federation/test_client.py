"""Reports reach a gateway once each, whatever its streams do."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from latentwatch import secrets
from latentwatch.collector.federation.client import ReportClient
from latentwatch.errors import ConfigRefused, StreamRefused
from latentwatch.step.batch import EngineCounters
from latentwatch.transport.channel import Backoff
from latentwatch.transport.credentials import Credentials, ServerTls, Tokens
from latentwatch.transport.receiver import Receiver
from latentwatch.transport.report import ReplicaState, Report

from tests.support.certificates import Authority
from tests.support.wire import FakeSink, hello, in_loop

WHO = hello(replica="pod-0", engine="", model_name="", engine_version="", forwards=True)
QUICK = Backoff(0.01, 0.05, refused_seconds=0.05)


class Outbox:
    """What a collector has to tell."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, Report]] = deque()
        self.cut = 0

    def add(self, client: ReportClient, count: int = 1) -> None:
        for _ in range(count):
            self.cut += 1
            self.waiting.append((self.cut, Report(self.cut)))
        client.news()

    def acknowledged(self, number: int) -> None:
        while self.waiting and self.waiting[0][0] <= number:
            self.waiting.popleft()


@contextlib.asynccontextmanager
async def forwarding(target: str, outbox: Outbox, **options: object) -> AsyncIterator[ReportClient]:
    client = ReportClient(target, WHO, lambda: outbox.waiting, outbox.acknowledged, backoff=QUICK, **options)
    task = asyncio.create_task(client.run())
    try:
        yield client
    finally:
        task.cancel()
        await asyncio.wait([task])


@contextlib.asynccontextmanager
async def serving(sink: FakeSink, address: str, **options: object) -> AsyncIterator[Receiver]:
    receiver = Receiver(sink, [address], clock=lambda: 1000.0, **options)
    await receiver.start()
    try:
        yield receiver
    finally:
        await receiver.stop(0.2)


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_reports_arrive_once_each_across_gateways_that_come_and_go(tmp_path: Path):
    async def run() -> None:
        sink, outbox, address = FakeSink(), Outbox(), f"unix://{tmp_path}/g.sock"
        async with forwarding(address, outbox) as client:
            outbox.add(client, 3)
            for _ in range(3):
                async with serving(sink, address):
                    outbox.add(client, 2)
                    assert await client.drain(20)
                outbox.add(client, 2)
            async with serving(sink, address):
                assert await client.drain(20)
                assert client.facts.connected and client.facts.reconnects == 3
            await until(lambda: not client.facts.connected)
        assert [number for number, _ in sink.reports] == list(range(1, 16))

    in_loop(run())


def test_what_the_gateway_holds_already_is_not_sent_again(tmp_path: Path):
    async def run() -> None:
        sink, outbox, address = FakeSink({(WHO.replica, WHO.boot_id): 4}), Outbox(), f"unix://{tmp_path}/g.sock"
        async with serving(sink, address), forwarding(address, outbox) as client:
            outbox.add(client, 6)
            assert await client.drain(20)
        assert [number for number, _ in sink.reports] == [5, 6]

    in_loop(run())


def test_a_gateway_that_refuses_is_asked_again_and_nothing_is_lost(tmp_path: Path, caplog):
    async def run() -> None:
        sink, outbox, address = FakeSink(), Outbox(), f"unix://{tmp_path}/g.sock"
        sink.refuse_hello = StreamRefused("watchlist", found="f", instead="i", reason="watchlist_mismatch")
        async with serving(sink, address), forwarding(address, outbox) as client:
            outbox.add(client, 2)
            await until(lambda: len(sink.calls) >= 2)
            assert not await client.drain(0.01)
            sink.refuse_hello = None
            assert await client.drain(20)

    in_loop(run())
    assert caplog.text.count("sock: watchlist: f. i.") == 1, "told once, not with each attempt"


def test_tls_a_certificate_and_a_token_open_the_gateway_and_bind_what_may_be_reported(tmp_path: Path, caplog):
    authority = Authority(tmp_path)
    server, sidecar = authority.issue("gateway"), authority.issue("pod-0", "pod-0")
    token = tmp_path / "token"
    secrets.write(token, b"0123456789abcdef")
    refused: list[str] = []

    async def run() -> None:
        sink, outbox = FakeSink(), Outbox()
        tls = ServerTls(*server, client_authority=authority.file)
        async with serving(sink, "127.0.0.1:0", tls=tls, tokens=Tokens([token]), on_refused=refused.append) as receiver:
            address = f"127.0.0.1:{receiver.bound_port}"
            shown = Credentials(authority.file, *sidecar, token_file=token)
            async with forwarding(address, outbox, credentials=shown) as client:
                outbox.waiting.append((1, Report(1, replicas=(of("pod-0/1"),))))
                client.news()
                assert await client.drain(20)
                outbox.waiting.append((2, Report(2, replicas=(of("pod-1/0"),))))
                client.news()
                await until(lambda: "replica_identity" in refused)
            async with forwarding(address, outbox, credentials=Credentials(authority.file, *sidecar)):
                await until(lambda: "unauthenticated" in refused)
        assert [number for number, _ in sink.reports] == [1]

    in_loop(run())
    assert "its certificate stands for pod-0" in caplog.text


def of(replica: str) -> ReplicaState:
    return ReplicaState(hello(replica=replica), True, 1000.0, 0, EngineCounters())


def test_an_address_or_name_that_no_gateway_takes_is_refused_at_once():
    with pytest.raises(ConfigRefused, match="neither unix"):
        ReportClient("nonsense", WHO, list, print)
    with pytest.raises(StreamRefused, match="replica is"):
        ReportClient("localhost:1", hello(replica="", forwards=True), list, print)
