"""Peers of the receiver that say nothing, too much, or not who they are: others never wait for them."""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from latentwatch import secrets
from latentwatch.transport import codec
from latentwatch.transport.credentials import Tokens

from tests.support.wire import FakeSink, ServerThread, eventually, hello
from tests.unit.transport.test_receiver import Peer

TOKEN = "correct-horse-battery-staple"


def opening(number: int = 0) -> bytes:
    return codec.encode_hello(hello(replica=f"pod-{number}/0"), last_acked_sequence=0, time_unix_nano=0)


class Served:
    """A receiver on a free TCP port, with who was turned away."""

    def __init__(self, listen: str, **options: object) -> None:
        self.refused: Counter[str] = Counter()
        self.server = ServerThread(
            FakeSink(), listen, on_refused=lambda reason: self.refused.update([reason]), **options
        )
        port = self.server.receiver.bound_port
        self.target = f"127.0.0.1:{port}" if port else listen

    @property
    def unknown(self) -> int:
        return len(self.server.receiver.servicer._unknown)

    def is_welcome(self, number: int = 0) -> bool:
        with Peer(self.target, opening(number)) as peer:
            try:
                return isinstance(peer.read(), codec.Welcome)
            except grpc.RpcError:
                # Its connection came while the place was still another's.
                return False


@pytest.fixture(params=["tcp", "unix"])
def serve(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[type[Served]]:
    made: list[Served] = []

    def serve(**options: object) -> Served:
        listen = "127.0.0.1:0" if request.param == "tcp" else f"unix://{tmp_path}/{len(made)}.sock"
        made.append(Served(listen, **options))
        return made[-1]

    yield serve  # type: ignore[misc]  # called like the class
    for served in made:
        served.server.stop()


def test_streams_that_say_nothing_hold_up_nobody_and_are_bounded_for_each_peer(serve):
    served = serve(peer_streams=8)
    with contextlib.ExitStack() as silent:
        for _ in range(24):
            silent.enter_context(Peer(served.target))
        eventually(lambda: served.refused["too_many_streams"] + served.refused["too_many_connections"] >= 16)
        assert served.unknown <= 8
        assert all(served.is_welcome(number) for number in range(5))


def test_many_silent_streams_in_one_connection_are_bounded_too(serve):
    served = serve(peer_streams=8)
    with Peer(served.target) as first:
        method = first.channel.stream_stream(codec.METHOD)
        calls = [method(iter(first.outbox.get, None)) for _ in range(40)]
        eventually(lambda: served.refused["too_many_streams"] >= 32)
        assert served.unknown <= 8
        assert served.is_welcome()
        for call in calls:
            call.cancel()


def test_streams_of_one_peer_beyond_its_bound_are_refused_and_one_that_comes_back_is_not(serve):
    served = serve(peer_streams=2)
    with contextlib.ExitStack() as peers:
        one = peers.enter_context(Peer(served.target, opening(1)))
        # Of so small a bound one stream has a place before it said who it is: they come one after the other.
        assert isinstance(one.read(), codec.Welcome)
        two = peers.enter_context(Peer(served.target, opening(2)))
        assert isinstance(two.read(), codec.Welcome)
        with Peer(served.target, opening(3)) as three, contextlib.suppress(grpc.RpcError):
            refusal = three.read()
            assert refusal.reason == "too_many_streams" and "--peer-streams" in refusal.instead
        eventually(lambda: served.refused["too_many_streams"] + served.refused["too_many_connections"] == 1)
        one.__exit__()
        eventually(lambda: served.is_welcome(1))


def test_connections_that_say_nothing_lose_their_places_to_those_that_do(tmp_path):
    served = Served("127.0.0.1:0", max_streams=8)
    port = served.server.receiver.bound_port
    with served.server, contextlib.ExitStack() as silent:
        for _ in range(40):
            silent.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        for number in range(5):
            assert served.is_welcome(number)
        assert served.refused["too_many_connections"] >= 32


def test_a_token_is_asked_for_before_any_message_is_read(serve, tmp_path):
    secrets.write(tmp_path / "token", TOKEN.encode())
    served = serve(tokens=Tokens([tmp_path / "token"]))
    with Peer(served.target, b"x" * (4 << 20)) as peer, pytest.raises(grpc.RpcError) as refused:
        peer.read()
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert served.refused == {"unauthenticated": 1}
    (latest,) = served.server.receiver.servicer.facts.refusals
    assert latest.reason == "unauthenticated", "so that the doctor says what to set"
    assert "LATENTWATCH_COLLECTOR_TOKEN_FILE" in latest.text


@pytest.mark.parametrize("size", [20 << 10, 200 << 10])
def test_headers_that_are_too_large_are_refused(serve, size):
    served = serve()
    with grpc.insecure_channel(served.target) as channel:
        call = channel.stream_stream(codec.METHOD)(iter([opening()]), metadata=[("authorization", "B" * size)])
        with pytest.raises(grpc.RpcError):
            next(call)
    assert served.is_welcome()


@pytest.mark.parametrize(
    "method",
    [
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.channelz.v1.Channelz/GetServers",
        codec.METHOD + "2",
        "/",
    ],
)
def test_nothing_else_is_served(serve, method):
    served = serve()
    with grpc.insecure_channel(served.target) as channel, pytest.raises(grpc.RpcError) as refused:
        next(channel.stream_stream(method)(iter([b""])))
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    "token", ["täglich-grüßt-das-murmeltier", "\udcff" * 20, "", "x" * 100_000, TOKEN[:-1], TOKEN + " x"]
)
def test_any_text_may_be_compared_with_a_token_and_only_the_whole_one_is_it(tmp_path, token):
    secrets.write(tmp_path / "token", TOKEN.encode())
    tokens = Tokens([tmp_path / "token"])
    assert token not in tokens and TOKEN in tokens
