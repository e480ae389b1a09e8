"""Whose file with a secret is read with which mode."""

from __future__ import annotations

import os

import pytest
from latentwatch import secrets
from latentwatch.errors import ConfigRefused


@pytest.mark.parametrize(
    ("own", "mode", "instead"),
    [
        (True, 0o600, None),
        (True, 0o640, "chmod 600"),
        (True, 0o604, "chmod 600"),
        (False, 0o440, None),
        (False, 0o444, "chmod 440"),
        (False, 0o460, "chmod 440"),
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
