"""The receiver against a peer that writes messages by hand."""

from __future__ import annotations

import socket
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from queue import Queue
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from latentwatch.errors import ConfigRefused, StreamRefused
from latentwatch.transport import codec, servicer

from tests.support.wire import FakeSink, ServerThread, batch, eventually, hello, same

HELLO = codec.encode_hello(hello(), last_acked_sequence=0, time_unix_nano=0)


def messages_of(*sequences: int) -> Iterable[bytes]:
    return [codec.encode_batch(i, batch(i)) for i in sequences]


class Peer:
    """One stream, written and read message by message."""

    def __init__(self, target: str, *messages: bytes) -> None:
        self.channel = grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])
        self.outbox: Queue[bytes | None] = Queue()
        self.call = self.channel.stream_stream(codec.METHOD)(iter(self.outbox.get, None))
        for message in messages:
            self.outbox.put(message)

    def send(self, *messages: bytes) -> None:
        for message in messages:
            self.outbox.put(message)

    def read(self) -> codec.Reply:
        return codec.decode_reply(next(self.call))

    def finish(self) -> list[codec.Reply]:
        """Half-close, and read to the end."""
        self.outbox.put(None)
        return [codec.decode_reply(data) for data in self.call]

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.outbox.put(None)
        self.call.cancel()
        self.channel.close()


@pytest.fixture
def sink() -> FakeSink:
    return FakeSink()


@pytest.fixture
def server(sink: FakeSink, address: str) -> Iterator[ServerThread]:
    with ServerThread(sink, address) as server:
        yield server


def test_batches_reach_the_sink_in_order_and_are_acknowledged_up_to_the_last(server, sink, address):
    messages = [codec.encode_batch(i, batch(i)) for i in range(1, 101)]
    with Peer(address, HELLO, *messages) as peer:
        assert peer.read() == codec.Welcome(0, server.receiver.collector_id)
        acks = peer.finish()
    assert sink.sequences == list(range(1, 101))
    assert all(same(got, batch(i)) for i, got in sink.batches)
    assert [ack.sequence for ack in acks] == sorted({ack.sequence for ack in acks})
    assert acks[-1] == codec.Ack(100)
    assert len(acks) < 30, "an ack for every batch would cost as much as the batches"
    eventually(lambda: sink.calls == ["hello", "goodbye"])


def test_a_lone_batch_is_acknowledged_while_the_stream_stays_open(server, address):
    with Peer(address, HELLO, codec.encode_batch(1, batch(1))) as peer:
        peer.read()
        begin = time.monotonic()
        assert peer.read() == codec.Ack(1)
        assert time.monotonic() - begin < 1


def test_what_the_sink_holds_already_is_told_in_the_welcome_and_refused_as_replayed_when_it_comes_again(
    server, sink, address
):
    sink.held["pod-0/0", "0" * 32] = 5
    with Peer(address, HELLO) as peer:
        assert peer.read() == codec.Welcome(5, server.receiver.collector_id)
        peer.send(*messages_of(6, 4))
        (ack, refused) = peer.finish()
    assert ack == codec.Ack(6) and isinstance(refused, StreamRefused) and refused.reason == "replayed"
    assert sink.sequences == [6]


class OrderedSink(FakeSink):
    """Looks whether an ack left before observe returned."""

    def __init__(self) -> None:
        super().__init__()
        self.leave = threading.Event()

    def observe(self, *arguments: Any) -> None:
        self.leave.wait(5)
        super().observe(*arguments)


def test_no_ack_leaves_before_observe_returned(socket_path):
    sink = OrderedSink()
    with ServerThread(sink, f"unix://{socket_path}"), Peer(f"unix://{socket_path}", HELLO) as peer:
        peer.read()
        peer.send(codec.encode_batch(1, batch(1)))
        got = Queue()
        reader = threading.Thread(target=lambda: got.put(peer.read()), daemon=True)
        reader.start()
        time.sleep(0.15)
        assert got.empty()
        sink.leave.set()
        assert got.get(timeout=5) == codec.Ack(1)


class DurableSink(FakeSink):
    """Looks whether an ack left before what it acknowledges was committed."""

    def __init__(self) -> None:
        super().__init__()
        self.leave = threading.Event()
        self.committed: list[list[int]] = []

    def commit(self) -> None:
        if self.batches:
            self.leave.wait(5)
        self.committed.append(self.sequences)


def test_no_ack_leaves_before_its_batch_was_committed(socket_path):
    """A crash between the two would lose for good what the engine has let go."""
    sink = DurableSink()
    with ServerThread(sink, f"unix://{socket_path}"), Peer(f"unix://{socket_path}", HELLO) as peer:
        peer.read()
        assert sink.committed == [[]], "a welcome says what is stored, so the hello is committed before it"
        peer.send(codec.encode_batch(1, batch(1)))
        got = Queue()
        reader = threading.Thread(target=lambda: got.put((peer.read(), list(sink.committed))), daemon=True)
        reader.start()
        eventually(lambda: sink.batches)
        time.sleep(0.15)
        assert got.empty()
        sink.leave.set()
        ack, committed = got.get(timeout=5)
    assert ack == codec.Ack(1) and [1] in committed


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([codec.encode_batch(1, batch(1))], "hello_missing"),
        ([b"\xff\xff\xff"], "malformed_batch"),
        ([HELLO, b"\xff\xff\xff"], "malformed_batch"),
        ([HELLO, HELLO], "hello_repeated"),
        ([HELLO.replace(b"\x08\x01", b"\x08\x02", 1)], "protocol_version"),
        ([b"\x0a\x02\x08\x01"], "malformed_hello"),
    ],
)
def test_a_message_out_of_order_or_out_of_shape_ends_the_stream_with_a_reason(server, sink, address, messages, reason):
    with Peer(address, *messages) as peer:
        replies = peer.finish()
    assert isinstance(replies[-1], StreamRefused)
    assert replies[-1].reason == reason
    assert replies[-1].found
    assert replies[-1].instead
    eventually(lambda: sink.calls.count("hello") == sink.calls.count("goodbye"))
    assert server.receiver.live_streams == 0


def test_a_peer_that_says_nothing_is_let_go(monkeypatch, socket_path):
    monkeypatch.setattr(servicer, "_HELLO_SECONDS", 0.05)
    with ServerThread(FakeSink(), f"unix://{socket_path}"), Peer(f"unix://{socket_path}") as peer:
        refusal = peer.read()
    assert isinstance(refusal, StreamRefused)
    assert refusal.reason == "hello_missing"


def test_what_was_taken_is_acknowledged_before_the_refusal_of_the_next(server, sink, address):
    """The sender blames the first batch after the last ack."""
    sink.refuse_sequences = {4}
    with Peer(address, HELLO, *(codec.encode_batch(i, batch(i)) for i in range(1, 9))) as peer:
        replies = peer.finish()
    assert replies[-2] == codec.Ack(3)
    assert isinstance(replies[-1], StreamRefused)
    assert str(replies[-1]) == "batch 4: the test. None."
    assert sink.sequences == [1, 2, 3]


def test_a_refused_hello_tells_the_sinks_own_words(server, sink, address):
    sink.refuse_hello = StreamRefused("watchlist", found="found", instead="instead", reason="watchlist_mismatch")
    with Peer(address, HELLO) as peer:
        (refusal,) = peer.finish()
    assert vars(refusal) == vars(sink.refuse_hello)
    assert sink.calls == ["hello"]


class BrokenSink(FakeSink):
    def observe(self, *_: Any) -> None:
        raise ZeroDivisionError("a bug")


def test_a_bug_in_the_sink_is_told_as_one_and_the_server_goes_on(socket_path):
    with ServerThread(BrokenSink(), f"unix://{socket_path}"):
        for _ in range(2):
            with Peer(f"unix://{socket_path}", HELLO, codec.encode_batch(1, batch(1))) as peer:
                replies = peer.finish()
            assert replies[-1].reason == "collector_error"
            assert "ZeroDivisionError" in replies[-1].found
            assert "a bug" not in replies[-1].found, "what a bug's text holds is for the collector's log"


def test_the_newer_of_two_streams_of_one_boot_wins(server, sink, address):
    with Peer(address, HELLO, *messages_of(1)) as older, Peer(address) as newer:
        older.read()
        assert older.read() == codec.Ack(1)
        newer.send(HELLO)
        assert newer.read() == codec.Welcome(1, server.receiver.collector_id)
        refusal = older.read()
        assert isinstance(refusal, StreamRefused)
        assert refusal.reason == "superseded"
        older.send(codec.encode_batch(2, batch(2)))
        newer.send(codec.encode_batch(3, batch(3)))
        assert newer.read() == codec.Ack(3)
        assert sink.sequences == [1, 3]
        assert server.receiver.live_streams == 1
        assert sink.calls == ["hello", "goodbye", "hello"]
    eventually(lambda: sink.calls == ["hello", "goodbye", "hello", "goodbye"])


def test_streams_of_different_replicas_live_side_by_side(server, sink, address):
    hellos = [codec.encode_hello(hello(replica=f"pod-{i}/0"), last_acked_sequence=0, time_unix_nano=0) for i in (1, 2)]
    with Peer(address, hellos[0], codec.encode_batch(1, batch(1))) as one, Peer(address, hellos[1]) as two:
        two.send(codec.encode_batch(1, batch(2)))
        for peer in (one, two):
            peer.read()
            assert peer.read() == codec.Ack(1)
        assert server.receiver.live_streams == 2
    eventually(lambda: server.receiver.live_streams == 0)


def test_streams_beyond_the_bound_are_refused_and_a_known_one_may_return(socket_path):
    address = f"unix://{socket_path}"
    other = codec.encode_hello(hello(replica="other"), last_acked_sequence=0, time_unix_nano=0)
    with ServerThread(FakeSink(), address, max_streams=1), Peer(address, HELLO) as one:
        one.read()
        with Peer(address, other) as refused:
            assert refused.read().reason == "too_many_streams"
        with Peer(address, HELLO) as again:
            assert isinstance(again.read(), codec.Welcome)


def test_a_message_beyond_the_limit_ends_its_own_stream_only(server, sink, address):
    with Peer(address, HELLO) as other:
        other.read()
        with Peer(address, HELLO.replace(b"pod-0", b"pod-1")) as peer:
            peer.read()
            peer.send(b"\0" * (codec.MAX_MESSAGE_BYTES + 1))
            (refused,) = peer.finish()
            assert isinstance(refused, StreamRefused) and refused.reason == "message_too_large"
        with Peer(address, HELLO.replace(b"pod-0", b"pod-2")) as peer:
            peer.read()
            peer.send(b"\0" * (4 * codec.MAX_MESSAGE_BYTES + 1))
            with pytest.raises(grpc.RpcError) as ended:
                peer.finish()
            assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        other.send(codec.encode_batch(1, batch(1)))
        assert other.read() == codec.Ack(1)
    eventually(lambda: sink.calls.count("goodbye") == 3)


def test_a_compressed_message_is_not_unpacked(server, sink, address):
    """Its true size is known too late."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options=options, compression=grpc.Compression.Gzip) as channel:
        big = codec.encode_hello(hello(model_name="m" * 4000), last_acked_sequence=0, time_unix_nano=0)
        with pytest.raises(grpc.RpcError) as ended:
            list(channel.stream_stream(codec.METHOD)(iter([big])))
    assert ended.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert sink.calls == []


def health(address: str, service: str) -> Any:
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status


@pytest.mark.parametrize("service", ["", "latentwatch.v1.Monitor"])
def test_the_health_service_says_serving(server, address, service):
    assert health(address, service) == health_pb2.HealthCheckResponse.SERVING


def test_the_health_service_does_not_know_other_services(server, address):
    with pytest.raises(grpc.RpcError) as unknown:
        health(address, "latentwatch.v1.Other")
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def test_health_is_answered_while_many_streams_are_open(server, address):
    """A server with a thread for each stream stopped answering at its eighth."""
    peers = [Peer(address, HELLO.replace(b"pod-0", b"pod-%c" % (65 + i))) for i in range(20)]
    for peer in peers:
        assert isinstance(peer.read(), codec.Welcome)
    assert health(address, "") == health_pb2.HealthCheckResponse.SERVING
    for peer in peers:
        peer.__exit__()


def test_stopping_acknowledges_what_is_held_and_ends_the_streams_within_the_grace(sink, address):
    server = ServerThread(sink, address, ack_seconds=60.0, ack_batches=1000)
    with Peer(address, HELLO, codec.encode_batch(1, batch(1))) as peer:
        peer.read()
        eventually(lambda: sink.sequences == [1])
        begin = time.monotonic()
        server.stop(grace=5)
        assert time.monotonic() - begin < 2
        assert [codec.decode_reply(data) for data in peer.call] == [codec.Ack(1)]
    assert sink.calls == ["hello", "goodbye"]


def start(*listen: str) -> None:
    """Start and stop a receiver."""
    ServerThread(FakeSink(), *listen).stop()


def test_a_port_in_use_is_refused_by_name():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigRefused, match=rf"127.0.0.1:{port}: Address already in use\. Stop") as refused:
            start(f"127.0.0.1:{port}")
    assert refused.value.reason == "port_in_use"


def test_two_collectors_cannot_share_a_port():
    """With SO_REUSEPORT both would start, and each would get half of the streams."""
    with ServerThread(FakeSink(), "127.0.0.1:0") as first, pytest.raises(ConfigRefused) as refused:
        start(f"127.0.0.1:{first.receiver.bound_port}")
    assert refused.value.reason == "port_in_use"


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid"])
def test_an_address_that_is_not_ours_is_refused(host):
    with pytest.raises(ConfigRefused) as refused:
        start(f"{host}:4319")
    assert refused.value.reason == "address_unusable"
    assert refused.value.found


def test_a_socket_on_which_another_collector_listens_is_left_alone(socket_path):
    with ServerThread(FakeSink(), f"unix://{socket_path}"):
        with pytest.raises(ConfigRefused, match="another process listens there") as refused:
            start(f"unix://{socket_path}")
        assert health(f"unix://{socket_path}", "") == health_pb2.HealthCheckResponse.SERVING
    assert refused.value.reason == "socket_in_use"


def test_a_socket_that_a_killed_collector_left_is_replaced(socket_path):
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(socket_path))
        killed.listen()
    assert socket_path.is_socket()
    start(f"unix://{socket_path}")
    assert not socket_path.exists()


def test_a_file_that_is_no_socket_is_not_removed(socket_path):
    socket_path.write_text("precious")
    with pytest.raises(ConfigRefused, match="a file that is no socket is there") as refused:
        start(f"unix://{socket_path}")
    assert refused.value.reason == "socket_in_use"
    assert socket_path.read_text() == "precious"


def test_a_symlink_to_a_socket_is_not_followed(socket_path):
    socket_path.symlink_to(socket_path.with_name("elsewhere.sock"))
    with pytest.raises(ConfigRefused, match="no socket"):
        start(f"unix://{socket_path}")


def test_the_folder_of_a_socket_is_made_and_where_it_cannot_be_that_is_said(socket_path):
    folder = socket_path.parent / "missing"
    with ServerThread(FakeSink(), f"unix://{folder}/c.sock"):
        assert (folder / "c.sock").exists()
    (socket_path.parent / "file").touch()
    with pytest.raises(ConfigRefused) as refused:
        start(f"unix://{socket_path.parent}/file/c.sock")
    assert refused.value.reason == "address_unusable"


def test_the_socket_is_for_its_owner_only_and_goes_with_the_receiver(socket_path):
    with ServerThread(FakeSink(), f"unix://{socket_path}"):
        assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    assert not socket_path.exists()


def test_a_failed_start_leaves_nothing_bound(socket_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigRefused):
            start(f"unix://{socket_path}", f"127.0.0.1:{taken.getsockname()[1]}")
    assert not socket_path.exists()
    start(f"unix://{socket_path}")


def test_both_addresses_serve_and_the_port_is_told(sink, socket_path):
    with ServerThread(sink, f"unix://{socket_path}", "127.0.0.1:0") as server:
        for target in (f"unix://{socket_path}", f"127.0.0.1:{server.receiver.bound_port}"):
            with Peer(target, HELLO) as peer:
                assert isinstance(peer.read(), codec.Welcome)


def test_a_client_that_vanishes_is_said_goodbye_to(server, sink, address):
    peer = Peer(address, HELLO, *messages_of(1, 2))
    peer.read()
    peer.call.cancel()
    peer.channel.close()
    eventually(lambda: sink.calls == ["hello", "goodbye"])
    assert server.receiver.live_streams == 0
    peer.outbox.put(None)
