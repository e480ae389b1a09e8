"""Whose file with a secret is read with which mode, and what a token and a key have to be."""

from __future__ import annotations

import os

import pytest
from latentwatch import secrets
from latentwatch.errors import ConfigRefused


@pytest.mark.parametrize(
    ("own", "mode", "instead"),
    [
        (True, 0o600, None),
        (True, 0o400, None),
        (True, 0o700, None),
        (True, 0o640, "chmod 600"),
        (True, 0o604, "chmod 600"),
        (True, 0o444, "chmod 600"),
        (False, 0o440, None),
        (False, 0o640, None),
        (False, 0o444, "chmod 440"),
        (False, 0o460, "chmod 440"),
        (False, 0o450, "chmod 440"),
    ],
)
def test_only_a_file_of_another_user_may_be_read_by_a_group(tmp_path, monkeypatch, own, mode, instead):
    path = tmp_path / "secret"
    path.write_text(" words \n")
    owner = path.stat().st_uid
    path.chmod(mode)
    monkeypatch.setattr(os, "geteuid", lambda: owner if own else owner + 1)
    if instead is None:
        assert secrets.read(path, "key", "evidence_key") == b"words"
    else:
        with pytest.raises(ConfigRefused, match=instead):
            secrets.read(path, "key", "evidence_key")


@pytest.mark.parametrize(
    ("owner", "group", "user", "mode"),
    [
        (1000, 1000, 1000, 0o600),
        (1000, 27, 1000, 0o600),  # a group that a person shares with others
        (0, 0, 0, 0o600),
        (0, 2000, 0, 0o440),  # a Secret in a pod with an fsGroup, in a container that runs as root
        (0, 2000, 10001, 0o440),  # and in one that does not
        (0, 0, 10001, 0o440),
        (1000, 1000, 1001, 0o440),
    ],
)
@pytest.mark.parametrize("user_group", [0, 2000])  # whether runAsGroup is the pod's fsGroup says nothing
def test_the_mode_that_is_asked_for(tmp_path, monkeypatch, owner, group, user, user_group, mode):
    assert secrets.right_mode(owner, group, user) == mode
    path = tmp_path / "secret"
    path.write_bytes(b"words")
    given = os.stat_result((0o100440, 1, 1, 1, owner, group, 5, 0, 0, 0))
    monkeypatch.setattr(os, "fstat", lambda _: given)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(os, "getegid", lambda: user_group)
    if mode == 0o440:
        assert secrets.read(path, "key", "canary_key") == b"words"
    else:
        with pytest.raises(ConfigRefused, match="chmod 600"):
            secrets.read(path, "key", "canary_key")


def test_a_secret_of_kubernetes_lies_behind_links(tmp_path):
    (tmp_path / "..2026").mkdir()
    secrets.write(tmp_path / "..2026" / "token", b"correct-horse-battery\n")
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "token").symlink_to("..data/token")
    assert secrets.read_token(tmp_path / "token") == "correct-horse-battery"
    (tmp_path / "..2026" / "token").chmod(0o644)
    with pytest.raises(ConfigRefused, match=r"others may read it \(mode 644\)"):
        secrets.read_token(tmp_path / "token")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "its 0 bytes are no token"),
        (b"short", "its 5 bytes are no token"),
        (b"two words of a length that would do", "are no token"),
        ("ü".encode() * 20, "are no token"),
        (b"a" * 70_000, "more than 65536 bytes"),
    ],
)
def test_a_file_that_holds_no_token_is_refused_without_showing_it(tmp_path, content, found):
    secrets.write(tmp_path / "token", content)
    with pytest.raises(ConfigRefused, match=found) as refused:
        secrets.read_token(tmp_path / "token", "--evidence-token", "evidence_token")
    assert refused.value.reason == "evidence_token"
    assert str(refused.value).startswith(f"--evidence-token {tmp_path / 'token'}: ")
    assert not content or content.decode() not in str(refused.value)


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigRefused, match="Give a file that this user can read"):
            secrets.read(path, "key", "canary_key")


def test_a_key_has_a_length_and_may_be_of_any_bytes(tmp_path):
    secrets.write(tmp_path / "key", bytes(range(128, 160)))
    assert secrets.read_key(tmp_path / "key", "key", "canary_key", "Make one.") == bytes(range(128, 160))
    secrets.write(tmp_path / "short", b"0123456789abcde")
    with pytest.raises(ConfigRefused, match=r"its 15 bytes are no key\. Make one\."):
        secrets.read_key(tmp_path / "short", "key", "canary_key", "Make one.")


def test_what_is_written_is_for_its_user_alone_whatever_the_umask_and_never_over_something(tmp_path):
    before = os.umask(0)
    try:
        secrets.write(tmp_path / "key", b"words")
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        secrets.write(tmp_path / "key", b"others")
    assert (tmp_path / "key").read_bytes() == b"words"
