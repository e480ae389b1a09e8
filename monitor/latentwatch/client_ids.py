"""The ids that a client may hold of its request, and what each of them is compared with: exactly, never by a pattern.

The engine's own id of a request is made of what the server called it, and cannot be taken apart again: `a_1` may be the
client's id, or the second of two parts of `a`. So what the server called it travels beside it, and whoever asks with an
id asks with what it is, or with what the server makes of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Final

MAX_ID_CHARACTERS: Final = 256
"""Of an id as it is carried and kept. A longer one is carried as its digest."""
MAX_ASKED_CHARACTERS: Final = 1 << 16
"""Of an id that somebody asks with: more than a server takes in a header."""
_DIGEST: Final = "sha256:"
_SERVED_AS: Final = ("chatcmpl-", "cmpl-", "generate-tokens-", "transcribe-", "translate-", "decision-")
"""What vLLM's servers put before X-Request-Id to make the id of the response."""


class IdKind(StrEnum):
    """What an id is of a request."""

    RESPONSE = "response_id"
    """The id that the client was answered with; all requests of the engine that served it together have it."""
    REQUEST = "request_id"
    """The engine's own id of one request."""
    TRACE = "trace_id"
    CLIENT = "client_id"
    """The X-Request-Id that the client sent, of which the server made the response id."""
    DIGEST = "digest"
    """What is shown for an id that is too long to be kept."""


def bounded_id(text: str) -> str:
    """An id as it is carried: itself, or a digest of one that is long, looks like a digest, or is no text for a wire.

    Two ids never become one. For an id that some server gave; what was carried already stays as it is: see `carried`.
    """
    fits = len(text) <= MAX_ID_CHARACTERS and not text.startswith(_DIGEST) and _is_text(text)
    return text if fits else digest(text)


def digest(text: str) -> str:
    """What stands for an id where it is not carried itself."""
    return _DIGEST + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def briefly(text: str) -> str:
    """An id that was carried here, in no more than eighty characters: itself, or its digest."""
    return text if len(text) <= len(digest("")) else digest(text)


def carried(text: str) -> str:
    """An id that was carried here: as it is, and bounded where whoever sent it kept no bound."""
    return text if len(text) <= MAX_ID_CHARACTERS and _is_text(text) else bounded_id(text)


Asked = str | Mapping["IdKind", Sequence[str]]
"""An id that somebody asks with, or its meanings."""


def meanings_of(asked: Asked) -> Mapping[IdKind, Sequence[str]]:
    """See meanings."""
    return meanings(asked) if isinstance(asked, str) else asked


def meanings(name: str) -> Mapping[IdKind, tuple[str, ...]]:
    """What may be meant by an id that somebody asks with: by kind, the carried ids that are equal to it."""
    if not name:
        return {}
    # Some are carried as their digest although they are short; see briefly.
    own = tuple(dict.fromkeys((bounded_id(name), digest(name))))
    # A header's bytes are read as Latin-1, whatever they were for its sender.
    sent = dict.fromkeys((name, name.encode("utf-8", "surrogatepass").decode("latin-1")))
    meant = {
        IdKind.RESPONSE: own,
        IdKind.REQUEST: own,
        IdKind.TRACE: own[:1],
        IdKind.CLIENT: tuple(bounded_id(prefix + each) for prefix in _SERVED_AS for each in sent),
    }
    return {**meant, IdKind.DIGEST: (name,)} if name.startswith(_DIGEST) else meant


def hashed(meant: Mapping[IdKind, tuple[str, ...]], of: Callable[[str], str]) -> dict[IdKind, tuple[str, ...]]:
    """Meanings where requests are kept under keyed hashes of their ids, but for trace ids; `of` gives the hash.

    The hash itself is a name too, and ids that stay clear (those of canaries) are found under themselves.
    """
    return {
        kind: ids if kind == IdKind.TRACE else tuple(dict.fromkeys((*map(of, ids), *(ids if kind in _OWN else ()))))
        for kind, ids in meant.items()
    }


_OWN: Final = (IdKind.RESPONSE, IdKind.REQUEST)


def kinds_of(meant: Mapping[IdKind, Sequence[str]], *, response: str, request: str, trace: str) -> set[IdKind]:
    """As what an id that is asked with is that of a request; empty where it is not its."""
    held = {
        IdKind.RESPONSE: (response,),
        IdKind.REQUEST: (request,),
        IdKind.TRACE: (trace,),
        IdKind.CLIENT: (response,),
        IdKind.DIGEST: (response, request),
    }
    return {kind for kind, ids in meant.items() if any(each and each in ids for each in held[kind])}


def _is_text(text: str) -> bool:
    """Whether it can be written in UTF-8; a lone surrogate cannot."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def meant_kind(found: Iterable[tuple[Collection[IdKind], str]]) -> IdKind | None:
    """As what a name is meant that was given without its kind: the first kind, where every reading of it reaches the
    same requests, and these are of one response. None where it could be meant otherwise: to act on it would be a guess.

    Args: found: of each request with that id, as what it is the id's, and its response id.
    """
    kinds: set[frozenset[IdKind]] = set()
    responses: set[str] = set()
    for of_request, response in found:
        kinds.add(frozenset(of_request))
        responses.add(response)
    if len(kinds) > 1 or len(responses) > 1:
        return None
    (only,) = kinds or {frozenset((IdKind.RESPONSE,))}
    return next(kind for kind in IdKind if kind in only)
