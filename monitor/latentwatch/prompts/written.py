"""Our own contrast texts, written out from the templates in texts/: the same every time, in every Python.

A file of texts/ is a concern. Each of its families has templates whose slots are filled from the file's lists, or row
by row from a table of facts: then `{wrong_x}` is the x of another row, so that a false statement has the words of a
true one.
`=>` stands between what a user says and what the model answers.
"""

from __future__ import annotations

import string
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Final, NotRequired, TypedDict

import numpy as np
import yaml

from latentwatch.prompts.prompt import Kind, Part, Prompt

ORDINARY: Final = "ordinary"
_ANSWERS: Final = " => "
_WRONG: Final = "wrong_"
_SENTENCE_ENDS: Final = (". ", "! ", "? ", "\n")


class Facts(TypedDict):
    """A table of which each row is true."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Family(TypedDict):
    """Texts of one form."""

    family: str
    kind: str
    part: str
    limit: int
    user: Sequence[str]
    facts: NotRequired[str]


class Concern(TypedDict):
    """A file of texts/."""

    concern: str
    label: str
    severity: str
    families: Sequence[Family]
    code: NotRequired[bool]
    """The texts are of code, in which no sentence begins with a capital."""
    lists: NotRequired[Mapping[str, Sequence[str]]]
    facts: NotRequired[Mapping[str, Facts]]


@cache
def concerns() -> Mapping[str, Concern]:
    """Every file of texts/ by its concern, in the order of their names; ORDINARY is one of them."""
    folder = resources.files("latentwatch.prompts") / "texts"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    found: list[Concern] = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]
    return {one["concern"]: one for one in found}


def texts(concern: str) -> list[Prompt]:
    """Every text of a concern, at most `limit` for each family and none twice. Raises KeyError: an unknown concern."""
    file = concerns()[concern]
    found: dict[tuple[str, str | None], Prompt] = {}
    for family in file["families"]:
        filled = _from_facts(file, family) if "facts" in family else _from_lists(file, family)
        for form, values in filled:
            user, _, answer = form.partition(_ANSWERS)
            sentences = not file.get("code", False)
            prompt = Prompt(
                _written(user, values, sentences=sentences),
                concern,
                family["family"],
                Kind(family["kind"]),
                Part(family["part"]),
                _written(answer, values, sentences=sentences) if answer else None,
                form,
            )
            found.setdefault((prompt.text, prompt.answer), prompt)
    return list(found.values())


def _written(template: str, values: Mapping[str, str], *, sentences: bool) -> str:
    """The template with its slots filled; what begins a sentence with a capital."""
    text = ""
    for literal, slot, _, _ in string.Formatter().parse(template):
        text += literal
        if slot:
            value = str(values[slot])
            begins = sentences and (not text or text.endswith(_SENTENCE_ENDS))
            text += value[:1].upper() + value[1:] if begins else value
    return text.strip()


def _from_lists(file: Concern, family: Family) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The templates in turn, each with other words from its lists than before, until the family's limit."""
    lists = file.get("lists", {})
    # Not `hash`, which differs from process to process.
    rng = np.random.default_rng(zlib.crc32(f"{file['concern']}/{family['family']}".encode()))
    forms = family["user"]
    order = [{name: rng.permutation(len(words)).tolist() for name, words in sorted(lists.items())} for _ in forms]
    for number in range(family["limit"]):
        turn, at = divmod(number, len(forms))
        values = {}
        for place, slot in enumerate(_slots(forms[at])):
            words = lists[slot]
            # A slot behind the first moves on by one more after each full turn, so that pairs do not come again.
            values[slot] = words[order[at][slot][(turn + place * (turn // len(words))) % len(words)]]
        yield forms[at], values


def _from_facts(file: Concern, family: Family) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Every row through every template, so that a family of true texts and one of false ones hold the same words."""
    table = file["facts"][family["facts"]]
    rows, columns = table["rows"], table["columns"]
    written = 0
    for form in family["user"]:
        for number, row in enumerate(rows):
            if written == family["limit"]:
                return
            values = dict(zip(columns, row, strict=True))
            wrong = {f"{_WRONG}{name}": _other(rows, number, at) for at, name in enumerate(columns)}
            written += 1
            yield form, values | wrong


def _other(rows: Sequence[Sequence[str]], number: int, column: int) -> str:
    """The next row's value that is another one."""
    own = rows[number][column]
    return next(row[column] for row in [*rows[number + 1 :], *rows[:number]] if row[column] != own)


def _slots(template: str) -> list[str]:
    return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name))
