"""The process: what it binds, what it refuses to start on, and how it stops."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from latentwatch import secrets
from latentwatch.cli import main
from latentwatch.collector.service import CollectorSettings, Service
from latentwatch.errors import ConfigRefused, WatchlistRefused
from latentwatch.transport import codec
from latentwatch.watchlist import file as watchlist_file

from tests.support.streams import hello, sparse, watchlist
from tests.support.wire import in_loop


@pytest.fixture
def built(tmp_path: Path) -> Path:
    watchlist_file.write(watchlist([sparse("f")]), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def settings(built: Path, http: str = "127.0.0.1:0") -> CollectorSettings:
    return CollectorSettings(built, (f"unix://{built.parent}/c.sock",), http)


def test_a_service_serves_both_sides_and_leaves_nothing_bound(built):
    async def scenario() -> str:
        service = Service(settings(built))
        await service.start()
        body = await asyncio.to_thread(lambda: urllib.request.urlopen(service.http_url + "/metrics").read().decode())
        assert (built.parent / "c.sock").exists()
        port = service.http_url.rsplit(":", 1)[1]
        await service.stop()
        again = Service(settings(built, f"127.0.0.1:{port}"))
        await again.start()
        await again.stop()
        return body

    assert "latentwatch_watchlist_info" in in_loop(scenario())
    assert not (built.parent / "c.sock").exists()


def test_a_port_in_use_is_one_clear_refusal_and_frees_what_was_bound(built):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigRefused, match="in use") as refused:
            in_loop(Service(settings(built, f"127.0.0.1:{taken.getsockname()[1]}")).start())
    assert refused.value.reason == "port_in_use" and "--http" in refused.value.instead
    assert not (built.parent / "c.sock").exists()


def test_an_engine_address_in_use_frees_the_http_port_again(built):
    async def scenario() -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        first, second = Service(settings(built)), Service(settings(built, f"127.0.0.1:{port}"))
        await first.start()
        with pytest.raises(ConfigRefused) as refused:
            await second.start()
        assert refused.value.reason == "socket_in_use"
        with socket.socket() as again:
            again.bind(("127.0.0.1", port))
        await first.stop()

    in_loop(scenario())


@pytest.mark.parametrize(
    ("http", "reason"),
    [("unix:///tmp/x.sock", "target_invalid"), ("nonsense", "target_invalid"), ("192.0.2.1:0", "address_unusable")],
)
def test_an_address_that_cannot_be_served_is_refused(built, http, reason):
    async def scenario() -> None:
        await Service(replace(settings(built, http), insecure=True)).start()

    with pytest.raises(ConfigRefused) as refused:
        in_loop(scenario())
    assert refused.value.reason == reason


def test_a_missing_or_truncated_watchlist_is_refused(built):
    with pytest.raises(WatchlistRefused) as refused:
        Service(settings(built.parent / "none.safetensors"))
    assert refused.value.reason == "watchlist_missing"
    built.write_bytes(built.read_bytes()[:-20])
    with pytest.raises(WatchlistRefused) as refused:
        Service(settings(built))
    assert refused.value.reason == "watchlist_format"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_verb_says_where_it_listens_and_stops_on_a_signal(built, number):
    argv = [sys.executable, "-m", "latentwatch", "collector", "--watchlist", str(built)]
    argv += ["--listen", f"unix://{built.parent}/c.sock", "--http", "127.0.0.1:0"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        url = next(line.split()[1] for line in lines if "page" in line)
        with urllib.request.urlopen(url + "healthz", timeout=10) as answer:
            assert answer.status == 200
        started = time.monotonic()
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert time.monotonic() - started < 10 and "Traceback" not in errors


def test_the_verb_refuses_a_missing_watchlist_in_one_line_with_exit_code_2(tmp_path):
    argv = [sys.executable, "-m", "latentwatch", "collector", "--watchlist", str(tmp_path / "none")]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert len(ran.stderr.strip().splitlines()) == 1 and "watchlist build" in ran.stderr


def test_the_help_of_the_verb_ends_with_a_line_to_paste():
    ran = subprocess.run(
        [sys.executable, "-m", "latentwatch", "collector", "--help"], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0 and "example:  latentwatch collector --watchlist" in ran.stdout


def test_every_refused_stream_is_counted_once_whoever_refused_it(built):
    """A sender with another watchlist (the core refuses) and one that sends no hello (the receiver does)."""

    async def scenario() -> dict[str, int]:
        service = Service(settings(built))
        await service.start()
        async with grpc.aio.insecure_channel(f"unix://{built.parent}/c.sock") as channel:
            for first in (codec.encode_hello(hello(), last_acked_sequence=0, time_unix_nano=0), b"\xff nonsense"):
                stream = channel.stream_stream(codec.METHOD)()
                await stream.write(first)
                await stream.done_writing()
                await stream.read()
                stream.cancel()
        refused = service.core.lookup.snapshot(0).collector.streams_refused
        await service.stop()
        return dict(refused)

    refused = in_loop(scenario())
    assert refused.pop("watchlist_mismatch") == 1 and sum(refused.values()) == 1


PUBLIC = ("0.0.0.0:0", "[::]:0", "192.0.2.1:4319")


@pytest.mark.parametrize("address", PUBLIC)
@pytest.mark.parametrize("option", ["--listen", "--http"])
def test_an_address_that_other_hosts_reach_is_refused_without_tls_token_or_a_word(built, option, address):
    plain = settings(built)
    open_to_all = (
        replace(plain, listen=(*plain.listen, address)) if option == "--listen" else replace(plain, http=address)
    )
    with pytest.raises(ConfigRefused) as refused:
        Service(open_to_all)
    assert refused.value.reason == "plain_address" and refused.value.what == f"{option} {address}"
    assert "--insecure" in refused.value.instead and "token-file" in refused.value.instead
    Service(replace(open_to_all, insecure=True))
    token = built.parent / "token"
    secrets.write(token, b"correct-horse-battery")
    guards = {"--listen": {"token_files": (token,)}, "--http": {"http_token_files": (token,)}}
    Service(replace(open_to_all, **guards[option]))


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.0.0.53:0", "localhost:0", "[::1]:0"])
def test_this_host_alone_needs_neither(built, address):
    Service(replace(settings(built, address), listen=(address,)))


def test_a_recording_listens_to_other_hosts_only_when_told_to(tmp_path, capsys):
    out = tmp_path / "r"
    assert main(["record", "--listen", "0.0.0.0:0", "--out", str(out)]) == 2
    assert "--insecure" in capsys.readouterr().err and not out.exists()
