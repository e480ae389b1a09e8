"""Query parameters: what a route does not know, or is given twice, is refused and not ignored."""

from __future__ import annotations

import difflib
from collections import Counter

from fastapi import HTTPException, Request
from fastapi.dependencies.utils import get_flat_dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

_SHOWN_CHARACTERS = 64


def check_query(request: Request) -> None:
    """A dependency of every route of the API; its own files, such as the page, may be asked with anything.

    Raises RequestValidationError, which is 422.
    """
    route = request.scope.get("route")
    if not isinstance(route, APIRoute) or not route.include_in_schema:
        return
    known = sorted(parameter.alias for parameter in get_flat_dependant(route.dependant).query_params)
    given = Counter(name for name, _ in request.query_params.multi_items())
    wrong = [_wrong(name, _of(name, known)) for name in given if name not in known]
    wrong += [
        _wrong(name, "it is given more than once") for name, times in given.items() if name in known and times > 1
    ]
    if wrong:
        raise RequestValidationError(wrong)


def unknown_name(name: str, value: str, known: list[str]) -> HTTPException:
    """For a parameter that names something that there is not: 404, with the nearest name that there is."""
    return HTTPException(404, f"{name} {_of(value, known)}")


def _of(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    said = f"Did you mean {close[0]}?" if close else f"There is {', '.join(known[:8]) or 'none'}."
    return f"{name[:_SHOWN_CHARACTERS]!r} is not known here. {said}"


def _wrong(name: str, text: str) -> dict[str, object]:
    return {"type": "value_error", "loc": ("query", name[:_SHOWN_CHARACTERS]), "msg": text}
