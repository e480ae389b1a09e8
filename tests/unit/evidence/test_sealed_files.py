"""What was said in a request: sealed, bound to its request, gone after hours, gone with the key."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from latentwatch.cli import main
from latentwatch.errors import ConfigRefused
from latentwatch.evidence import sealed_files
from latentwatch.evidence.encryption import Content, Vault, write_key
from latentwatch.evidence.store import Retention

from tests.support.evidence import NOW, one_request, store

SAID = Content(("Hello", " wörld", "\x00\ud83d"), (1, 2, 3))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    write_key(tmp_path / "key")
    return tmp_path / "key"


def test_what_was_sealed_opens_for_its_request_only(key):
    vault = Vault.read(key)
    sealed = vault.seal(7, SAID)
    assert vault.open(7, sealed) == SAID and b"Hello" not in sealed
    for request, damaged in ((8, sealed), (7, sealed[:-1] + bytes([sealed[-1] ^ 1]))):
        with pytest.raises(ConfigRefused) as refused:
            vault.open(request, damaged)
        assert refused.value.reason == "evidence_damaged"


def test_a_new_key_on_top_seals_and_the_old_one_still_opens(key, tmp_path):
    old = Vault.read(key).seal(7, SAID)
    write_key(tmp_path / "new")
    both = tmp_path / "both"
    both.write_bytes((tmp_path / "new").read_bytes() + key.read_bytes())
    both.chmod(0o600)
    vault = Vault.read(both)
    assert vault.open(7, old) == vault.open(7, vault.seal(7, SAID)) == SAID
    with pytest.raises(ConfigRefused) as refused:
        Vault.read(key).open(7, vault.seal(7, SAID))
    assert refused.value.reason == "evidence_key"


@pytest.mark.parametrize(
    ("content", "mode"),
    [(b"", 0o600), (b"not base64!", 0o600), (base64.b64encode(b"short"), 0o600), (base64.b64encode(b"k" * 32), 0o640)],
)
def test_a_file_that_holds_no_key_or_that_others_may_read_is_refused(tmp_path, content, mode):
    path = tmp_path / "k"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ConfigRefused) as refused:
        Vault.read(path)
    assert refused.value.reason == "evidence_key"


def test_the_verb_makes_a_key_that_only_its_owner_reads_and_overwrites_none(tmp_path, capsys):
    assert main(["evidence", "key", str(tmp_path / "k")]) == 0
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    Vault.read(tmp_path / "k")
    assert main(["evidence", "key", str(tmp_path / "k")]) == 2


def test_content_goes_before_it_is_so_old_while_the_rest_stays(tmp_path, key):
    vault, folder = Vault.read(key), tmp_path / "e"
    with store(folder, Retention(content_hours=3)) as written:
        for hour in range(8):
            now = NOW + 3600 * hour
            written.write(one_request(hour + 1, seconds=now), now)
            name = f"chatcmpl-made-{hour + 1:012d}"
            assert written.attach(name, lambda request: vault.seal(request, SAID), now) == 1
            written.prune(now)
            kept = [number for number in range(1, 9) if sealed_files.get(folder, number)]
            assert hour + 1 in kept and min(kept) >= hour - 1
            assert len(sealed_files.files(folder)) <= 3
        assert written.attach("chatcmpl-nobody", lambda request: b"", NOW) == 0
