"""How the collector knows a canary request: its id is signed with a key that its users do not have.

Without the signature anyone could give a request such an id, and so keep it out of what drift is seen in.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from pathlib import Path
from typing import Final

from latentwatch import secrets
from latentwatch.drift.sums import CANARIES
from latentwatch.errors import RefusalReason

_ID: Final = re.compile(r"lwcanary-(\d{1,3})-([0-9a-f]{16})-([0-9a-f]{16})")


def make_key(path: Path) -> bytes:
    """Write a new key, readable by its owner only. Raises OSError; FileExistsError where there is one already."""
    key = os.urandom(32).hex().encode()
    secrets.write(path, key + b"\n")
    return key


def read_key(path: Path) -> bytes:
    """The key in a file. Raises ConfigRefused "canary_key" where there is none."""
    instead = "Give the file that 'latentwatch canary --make-key' wrote."
    return secrets.read_key(path, "canary key", RefusalReason.CANARY_KEY, instead)


def canary_id(key: bytes, prompt: int, nonce: str) -> str:
    """The X-Request-Id of one run of canary prompt 0..CANARIES-1; `nonce` is 16 hex digits, each time others."""
    return f"lwcanary-{prompt}-{nonce}-{_signature(key, prompt, nonce)}"


def canary_prompt(key: bytes, request_id: str) -> int | None:
    """The prompt that a request is a run of; None for every other request, one with a forged id included."""
    match = _ID.search(request_id)
    if match is None or not key:
        return None
    prompt, nonce = int(match[1]), match[2]
    if prompt >= CANARIES or not hmac.compare_digest(match[3], _signature(key, prompt, nonce)):
        return None
    return prompt


def _signature(key: bytes, prompt: int, nonce: str) -> str:
    return hmac.new(key, f"{prompt}-{nonce}".encode(), hashlib.sha256).hexdigest()[:16]
