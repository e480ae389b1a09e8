"""Content of requests, encrypted: tokens as text or as ids. AES-256-GCM, a key file, and a key id on every record.

A record is bound to its request: moved to another one it does not open. The key file holds one key a line, the first
seals, all of them open: put a new key on top to change it. Without the file the content is gone, whatever was copied.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from latentwatch import secrets
from latentwatch.errors import ConfigRefused, RefusalReason

KEY_BYTES: Final = 32
MAX_TOKENS: Final = 1 << 20
_KEY_ID_BYTES: Final = 8
_NONCE_BYTES: Final = 12
_WHAT: Final = "evidence key"


@dataclass(frozen=True)
class Content:
    """What a request said, from its first prompt token to its last output token."""

    tokens: tuple[str, ...] = ()
    """Text of each token; empty where only ids are known."""
    token_ids: tuple[int, ...] = ()
    """Empty where only text is known."""

    def __post_init__(self) -> None:
        lengths = {len(column) for column in (self.tokens, self.token_ids) if column}
        if len(lengths) != 1 or max(lengths) > MAX_TOKENS:
            raise ConfigRefused(
                "content of a request",
                found=f"{len(self.tokens)} tokens and {len(self.token_ids)} token ids",
                instead=f"Give tokens, token_ids or both of equal length, 1 to {MAX_TOKENS}.",
                reason=RefusalReason.CONTENT_LENGTH,
            )


class Vault:
    """Seals and opens content."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        """Args: keys: KEY_BYTES each, the one that seals first."""
        self._ciphers = {_key_id(key): AESGCM(key) for key in keys}
        self._sealing = _key_id(keys[0])

    @classmethod
    def read(cls, path: Path) -> Vault:
        """Raises: ConfigRefused "evidence_key": the file is missing, open to others, or holds no key."""
        lines = secrets.read(path, _WHAT, RefusalReason.EVIDENCE_KEY).split()
        try:
            keys = [base64.b64decode(line, validate=True) for line in lines]
        except binascii.Error:
            keys = []
        if not keys or {len(key) for key in keys} != {KEY_BYTES}:
            raise secrets.refuse(
                path,
                _WHAT,
                f"it does not hold base64 keys of {KEY_BYTES} bytes, one a line",
                "Make one with 'latentwatch evidence key PATH'.",
                RefusalReason.EVIDENCE_KEY,
            )
        return cls(keys)

    def seal(self, request: int, content: Content) -> bytes:
        """Content of the request with this key, for `open`."""
        nonce = os.urandom(_NONCE_BYTES)
        plain = zlib.compress(json.dumps(vars(content), separators=(",", ":")).encode(), 6)
        return self._sealing + nonce + self._ciphers[self._sealing].encrypt(nonce, plain, _bound_to(request))

    def open(self, request: int, sealed: bytes) -> Content:
        """What was sealed for this request. Raises: ConfigRefused "evidence_key", "evidence_damaged"."""
        key_id, nonce = sealed[:_KEY_ID_BYTES], sealed[_KEY_ID_BYTES : _KEY_ID_BYTES + _NONCE_BYTES]
        if key_id not in self._ciphers:
            raise ConfigRefused(
                "content of a request",
                found=f"it was sealed with key {key_id.hex()}, which the key file does not hold",
                instead="Give the key file that the collector had then.",
                reason=RefusalReason.EVIDENCE_KEY,
            )
        try:
            plain = self._ciphers[key_id].decrypt(nonce, sealed[_KEY_ID_BYTES + _NONCE_BYTES :], _bound_to(request))
        except InvalidTag as error:
            raise ConfigRefused(
                "content of a request",
                found="it was changed after it was sealed, or belongs to another request",
                instead="Treat the folder as tampered with.",
                reason=RefusalReason.EVIDENCE_DAMAGED,
            ) from error
        fields = json.loads(zlib.decompress(plain))
        return Content(tuple(fields["tokens"]), tuple(fields["token_ids"]))


def write_key(path: Path) -> None:
    """A new key file. Raises: ConfigRefused "out_exists": it is there already."""
    try:
        secrets.write(path, base64.b64encode(os.urandom(KEY_BYTES)) + b"\n")
    except FileExistsError as error:
        raise secrets.refuse(path, _WHAT, "the file exists", "Give another path.", RefusalReason.OUT_EXISTS) from error


def _key_id(key: bytes) -> bytes:
    return hashlib.sha256(b"latentwatch evidence key id" + key).digest()[:_KEY_ID_BYTES]


def _bound_to(request: int) -> bytes:
    return b"latentwatch evidence content/1 %d" % request
