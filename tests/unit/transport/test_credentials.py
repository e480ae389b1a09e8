"""Who is let in and who is not: every class of refused connection, the reason it is counted under, and that the
engine's own way in works."""

from __future__ import annotations

import socket
import ssl
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from latentwatch import secrets
from latentwatch.errors import ConfigRefused
from latentwatch.transport import stream_state, tcp_listener
from latentwatch.transport.channel import Backoff
from latentwatch.transport.credentials import Credentials, ServerTls, Tokens, may_speak_for
from latentwatch.transport.sender import Sender

from tests.support.certificates import Authority
from tests.support.wire import FakeSink, ServerThread, batch, eventually, hello

TOKEN = "correct-horse-battery-staple"


class Fortress:
    """A receiver with mutual TLS and a token on TCP, and everything an engine needs to get in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refused: Counter[str] = Counter()
        self.sink = FakeSink()
        self.authority = Authority(folder)
        self.certificate, self.key = self.authority.issue("collector", "localhost")
        self.token_file = folder / "token"
        secrets.write(self.token_file, TOKEN.encode() + b"\n")
        self.server = ServerThread(
            self.sink,
            "127.0.0.1:0",
            tls=ServerTls(self.certificate, self.key, self.authority.file),
            tokens=Tokens([self.token_file]),
            on_refused=lambda reason: self.refused.update([reason]),
        )
        self.target = f"127.0.0.1:{self.server.receiver.bound_port}"

    def credentials(self, name: str = "pod-0", **changes: Path | None) -> Credentials:
        certificate, key = self.authority.issue(name, name)
        parts = {"certificate": certificate, "key": key, "token_file": self.token_file, **changes}
        return Credentials(authority=self.authority.file, **parts)

    def sender(self, credentials: Credentials) -> Sender:
        made = Sender(self.target, hello(), credentials=credentials, backoff=Backoff(0.05, 0.05, refused_seconds=0.1))
        made.start()
        return made

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", int(self.target.rpartition(":")[2])), timeout=5)

    def turned_away(self, credentials: Credentials, reason: str) -> Sender:
        """A sender with these credentials delivers nothing, and each attempt is counted."""
        sender = self.sender(credentials)
        sender.offer(batch(1))
        eventually(lambda: self.refused[reason] >= 2)
        stats = sender.close(0)
        assert not stats.acked and stats.last_error
        assert not self.sink.batches and set(self.refused) == {reason}
        return sender


@pytest.fixture
def fortress(tmp_path: Path) -> Iterator[Fortress]:
    made = Fortress(tmp_path)
    with made.server:
        yield made


def test_an_engine_with_certificate_and_token_gets_in(fortress):
    sender = fortress.sender(fortress.credentials())
    for i in range(1, 21):
        sender.offer(batch(i))
    eventually(lambda: sender.stats().acked == 20)
    sender.close()
    assert fortress.sink.sequences == list(range(1, 21)) and not fortress.refused


def test_no_token_and_a_wrong_token_are_unauthenticated(fortress, tmp_path):
    wrong = tmp_path / "wrong"
    secrets.write(wrong, b"wrong-horse-battery-staple")
    fortress.turned_away(fortress.credentials(token_file=None), "unauthenticated")
    fortress.refused.clear()
    fortress.turned_away(fortress.credentials(token_file=wrong), "unauthenticated")


def test_a_certificate_of_another_authority_is_refused(fortress, tmp_path):
    certificate, key = Authority(tmp_path, "stranger").issue("forged", "pod-0")
    fortress.turned_away(fortress.credentials(certificate=certificate, key=key), "certificate")


def test_no_certificate_is_refused(fortress):
    fortress.turned_away(fortress.credentials(certificate=None, key=None), "certificate")


def test_a_certificate_of_another_replica_is_refused(fortress):
    fortress.turned_away(fortress.credentials("pod-7"), "replica_identity")


def test_what_speaks_no_tls_is_refused(fortress):
    fortress.turned_away(Credentials(token_file=fortress.token_file), "tls_handshake")


def test_a_handshake_that_dribbles_is_cut_off(fortress, monkeypatch):
    monkeypatch.setattr(tcp_listener, "HANDSHAKE_SECONDS", 0.2)
    with fortress.connect() as peer:
        peer.sendall(b"\x16\x03\x01")
        assert peer.recv(1) == b""
    eventually(lambda: fortress.refused["slow_handshake"] == 1)


def test_a_connection_that_opens_no_stream_is_cut_off(fortress, monkeypatch):
    monkeypatch.setattr(tcp_listener, "WELCOME_SECONDS", 0.2)
    known = fortress.credentials()
    context = ssl.create_default_context(cafile=str(fortress.authority.file))
    context.load_cert_chain(known.certificate, known.key)
    context.set_alpn_protocols(["h2"])
    with fortress.connect() as plain, context.wrap_socket(plain, server_hostname="localhost") as peer:
        peer.sendall(b"PRI * HT")  # the beginning of what HTTP/2 opens with
        while peer.recv(1 << 16):
            pass
    eventually(lambda: fortress.refused["slow_connection"] == 1)


def test_connections_beyond_the_bound_are_turned_away(tmp_path):
    refused: Counter[str] = Counter()
    made = ServerThread(FakeSink(), "127.0.0.1:0", max_streams=2, on_refused=lambda reason: refused.update([reason]))
    with made:
        peers = [socket.create_connection(("127.0.0.1", made.receiver.bound_port), timeout=5) for _ in range(5)]
        eventually(lambda: refused["too_many_connections"] == 3)
        for peer in peers:
            peer.close()


def test_a_stream_that_falls_silent_is_ended(monkeypatch, socket_path):
    monkeypatch.setattr(stream_state, "IDLE_SECONDS", 0.2)
    refused: Counter[str] = Counter()
    target = f"unix://{socket_path}"
    with ServerThread(FakeSink(), target, on_refused=lambda reason: refused.update([reason])):
        sender = Sender(target, hello())
        sender.start()
        eventually(lambda: refused["stream_idle"] >= 1)
        eventually(lambda: "no whole message" in sender.stats().last_error)
        sender.close(0)


def test_a_rotated_certificate_and_token_count_from_the_next_connection_on(fortress):
    first = fortress.sender(fortress.credentials())
    first.offer(batch(1))
    eventually(lambda: first.stats().acked == 1)
    certificate, key = fortress.authority.issue("renewed", "localhost")
    fortress.certificate.write_bytes(certificate.read_bytes())
    fortress.key.write_bytes(key.read_bytes())
    fortress.token_file.write_text("another-horse-battery-staple")
    first.offer(batch(2))
    eventually(lambda: first.stats().acked == 2)
    first.close()
    context = ssl.create_default_context(cafile=str(fortress.authority.file))
    known = fortress.credentials()
    context.load_cert_chain(known.certificate, known.key)
    with fortress.connect() as plain, context.wrap_socket(plain, server_hostname="localhost") as peer:
        shown = peer.getpeercert(binary_form=True)
    assert ssl.DER_cert_to_PEM_cert(shown) == certificate.read_text()
    second = Sender(fortress.target, hello(boot_id="1" * 32), credentials=known)
    second.start()
    second.offer(batch(3))
    eventually(lambda: second.stats().acked == 1)
    second.close()


def test_a_sender_whose_files_are_missing_keeps_what_it_has_and_says_why(tmp_path):
    sender = Sender("127.0.0.1:1", hello(), credentials=Credentials(authority=tmp_path / "none.pem"))
    sender.start()
    sender.offer(batch(1))
    eventually(lambda: "none.pem" in sender.stats().last_error)
    assert sender.close(0).dropped_batches == 1


def test_a_private_key_that_others_may_read_is_refused_at_the_start(tmp_path):
    """Certificates and authorities may be for everyone, and are so here."""
    authority = Authority(tmp_path)
    certificate, key = authority.issue("collector", "localhost")
    assert certificate.stat().st_mode & 0o004 and authority.file.stat().st_mode & 0o004
    shown = Credentials(authority.file, certificate, key)
    shown.channel("localhost:1", ()).close()
    key.chmod(0o644)
    for use in (ServerTls(certificate, key).context, lambda: shown.channel("localhost:1", ())):
        with pytest.raises(ConfigRefused, match=r"collector\.key: others may read it .*chmod 600") as refused:
            use()
        assert refused.value.reason == "tls_unusable"


def test_a_private_key_that_others_come_to_read_lets_nobody_in_until_they_may_not(fortress):
    known = fortress.credentials()
    fortress.key.chmod(0o644)
    sender = fortress.sender(known)
    sender.offer(batch(1))
    eventually(lambda: fortress.refused["certificate"] >= 2)
    assert sender.stats().acked == 0
    fortress.key.chmod(0o600)
    eventually(lambda: sender.stats().acked == 1)
    sender.close()


@pytest.mark.parametrize("text", ["", "short", "ü" * 20])
def test_a_token_that_is_none_is_refused_at_the_start(tmp_path, text):
    secrets.write(tmp_path / "token", text.encode())
    with pytest.raises(ConfigRefused) as refused:
        Tokens([tmp_path / "token"])
    assert refused.value.reason == "token_unusable"


def test_files_that_are_no_certificate_are_refused_at_the_start(tmp_path):
    secrets.write(tmp_path / "c.pem", b"no certificate")
    with pytest.raises(ConfigRefused, match="SSLError") as refused:
        ServerThread(FakeSink(), "127.0.0.1:0", tls=ServerTls(tmp_path / "c.pem", tmp_path / "c.pem"))
    assert refused.value.reason == "tls_unusable"
    with pytest.raises(ConfigRefused):
        Credentials.from_env({"LATENTWATCH_COLLECTOR_CERT": "c.pem"})


@pytest.mark.parametrize(
    ("header", "let_in"),
    [
        (f"Bearer {TOKEN}", True),
        (f"bearer  {TOKEN} ", True),
        ("Basic YW55b25lOmNvcnJlY3QtaG9yc2UtYmF0dGVyeS1zdGFwbGU=", False),
        (TOKEN, False),
        ("Bearer", False),
        ("", False),
    ],
)
def test_a_stream_shows_its_token_as_bearer(tmp_path, header, let_in):
    secrets.write(tmp_path / "token", TOKEN.encode())
    assert Tokens([tmp_path / "token"]).accept(header) is let_in


@pytest.mark.parametrize(
    ("names", "replica", "may"),
    [
        ({"pod-0"}, "pod-0/0", True),
        ({"pod-0"}, "pod-0", True),
        ({"spiffe://fleet/pod-0"}, "spiffe://fleet/pod-0/1", True),
        ({"pod-0"}, "pod-01/0", False),
        ({"pod"}, "pod-0/0", False),
        ({""}, "pod-0", False),
        (set(), "pod-0/0", False),
    ],
)
def test_a_certificate_speaks_for_its_replica_only(names, replica, may):
    assert may_speak_for(frozenset(names), replica) is may


@pytest.mark.parametrize("at", range(len(TOKEN)))
def test_a_token_that_differs_in_one_character_is_no_token(tmp_path, at):
    secrets.write(tmp_path / "token", TOKEN.encode())
    tokens = Tokens([tmp_path / "token"])
    other = TOKEN[:at] + chr(ord(TOKEN[at]) ^ 1) + TOKEN[at + 1 :]
    assert TOKEN in tokens and tokens.accept(f"Bearer {TOKEN}")
    for wrong in (other, TOKEN[:at], TOKEN[at + 1 :], TOKEN + TOKEN[at], TOKEN[at] + TOKEN):
        assert wrong not in tokens and not tokens.accept(f"Bearer {wrong}")


def test_while_a_token_is_rotated_both_open_the_door_and_neither_half(tmp_path):
    old, new = "0123456789abcdef-old", "0123456789abcdef-new"
    for name in (old, new):
        secrets.write(tmp_path / name, name.encode())
    tokens = Tokens([tmp_path / old, tmp_path / new])
    assert old in tokens and new in tokens and old[:16] not in tokens and old + new not in tokens
