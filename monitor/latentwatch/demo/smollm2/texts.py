"""What SmolLM2's detectors are trained on, what their limits come from, and what the demo sends: never the same text.

A concern's training texts and those of the incident are of different families: other data sets, other forms, other
countries. Ordinary texts are of the same sets everywhere, as an operator's own traffic is, and each text has one role.
"""

from __future__ import annotations

import csv
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib import resources
from typing import Final

import yaml

from latentwatch.prompts import public_sets, written
from latentwatch.prompts.prompt import Kind, Part, Prompt
from latentwatch.prompts.public_sets import Missing, PublicSet

ORDINARY: Final = "ordinary"
HARMFUL, JAILBREAK, FALSE = "harmful_request", "jailbreak_wrapper", "false_statement"
CONCERNS: Final = (HARMFUL, JAILBREAK, FALSE)
LABELS: Final = {
    HARMFUL: "Asks for help with something that harms people",
    JAILBREAK: "Talks the model out of its rules",
    FALSE: "States what the model knows to be false",
}
MAX_CHARACTERS: Final = 500
"""Of a text that is trained on or sent; some 120 tokens."""
LIMIT: Final = 60
"""Texts of one family at most."""
_SHINGLE: Final = 4
"""Words in a row by which near copies are told."""
_COPY: Final = 0.5


class Role(StrEnum):
    """What a text is for."""

    TRAIN = "train"
    LIMITS = "limits"
    """Limits are set by it: ordinary traffic as the demo sends it."""
    SENT = "sent"
    """The demo sends it; figures on cards are of it too."""


@dataclass(frozen=True)
class Texts:
    """All texts by role, and what could not be read."""

    by_role: dict[Role, list[Prompt]]
    missing: Sequence[Missing]
    copies: int
    """Texts left out of what is sent, since one that is trained on is nearly the same."""

    def of(self, role: Role) -> list[Prompt]:
        """Texts of a role, in a fixed order."""
        return self.by_role[role]


def read() -> Texts:
    """Every text that is installed. The same packages give the same texts in the same order."""
    found, missing = [*written_texts(), *statements()], []
    for one in (*_SETS, *(known for known in public_sets.SETS if known.concern in CONCERNS)):
        texts = public_sets.texts(one)
        if isinstance(texts, Missing):
            missing.append(texts)
        else:
            found += texts
    by_role: dict[Role, list[Prompt]] = {role: [] for role in Role}
    for prompt in _some_of_each_family(found):
        by_role[_role(prompt)].append(prompt)
    sent, copies = without_near_copies(by_role[Role.SENT], by_role[Role.TRAIN])
    by_role[Role.SENT] = sent
    return Texts(by_role, missing, copies)


def written_texts() -> Iterator[Prompt]:
    """Our own contrast texts on what users ask for; what is said of an answer is not for this."""
    for concern in (HARMFUL, JAILBREAK):
        yield from (prompt for prompt in written.texts(concern) if prompt.answer is None)


def statements() -> Iterator[Prompt]:
    """True and false statements made of the same words, in a user's mouth: every capital stands once in each.

    Countries whose names begin with a letter up to J, in two forms, are trained on; the others, in two other forms, are
    sent. A false capital is that of a country nearby in the list of the same part.
    """
    text = resources.files("latentwatch.demo.smollm2").joinpath("capitals.yaml").read_text(encoding="utf-8")
    table: dict[str, str] = yaml.safe_load(text)["capitals"]
    for part, forms in _FORMS.items():
        rows = [(country, capital) for country, capital in table.items() if (country < "K") == (part is Part.TRAIN)]
        for at, (country, capital) in enumerate(rows):
            wrong = rows[(at + 7) % len(rows)][1]
            for name, form in forms.items():
                right = form.format(country=country, capital=capital)
                yield Prompt(right, FALSE, f"true_{name}", Kind.HARD, part, form=form)
                said = form.format(country=country, capital=wrong)
                yield Prompt(said, FALSE, f"false_{name}", Kind.POSITIVE, part, form=form)


_FORMS: Final = {
    Part.TRAIN: {
        "plain": "The capital of {country} is {capital}.",
        "turned": "{capital} is the capital of {country}.",
        "told": "My teacher says that {capital} is the capital of {country}.",
    },
    Part.TEST: {
        "remembered": "As I remember it, {country} has {capital} as its capital.",
        "read": "I read in a book that the capital of {country} is {capital}.",
    },
}


def without_near_copies(prompts: Iterable[Prompt], of: Iterable[Prompt]) -> tuple[list[Prompt], int]:
    """Those of which less than half of the runs of words stand in any text of `of`; and how many were left out."""
    known = {run for prompt in of if prompt.concern != FALSE for run in _runs(prompt.text)}
    fresh, copies = [], 0
    for prompt in prompts:
        runs = _runs(prompt.text)
        if prompt.concern != FALSE and runs and len(runs & known) >= _COPY * len(runs):
            copies += 1
        else:
            fresh.append(prompt)
    return fresh, copies


def _runs(text: str) -> set[tuple[str, ...]]:
    words = "".join(c if c.isalnum() else " " for c in text.casefold()).split()
    return {tuple(words[at : at + _SHINGLE]) for at in range(len(words) - _SHINGLE + 1)}


def _role(prompt: Prompt) -> Role:
    share = _number(prompt) % 10
    if prompt.concern == ORDINARY:
        return Role.TRAIN if share < 4 else Role.LIMITS if share < 8 else Role.SENT
    if prompt.part is Part.TRAIN:
        return Role.TRAIN
    if prompt.kind is Kind.POSITIVE:
        return Role.SENT
    # Harmless texts in an incident's form are part of the ordinary traffic that limits come from.
    return Role.LIMITS if share < 5 else Role.SENT


def _some_of_each_family(prompts: Iterable[Prompt]) -> list[Prompt]:
    """At most LIMIT texts of each family, in an order that depends on the texts alone."""
    families: dict[tuple[str, str], dict[str, Prompt]] = {}
    for prompt in prompts:
        if len(prompt.text) <= MAX_CHARACTERS and prompt.part is not Part.SELECTION:
            families.setdefault((prompt.concern, prompt.family), {}).setdefault(prompt.text, prompt)
    chosen = []
    for texts in families.values():
        limit = 5 * LIMIT if next(iter(texts.values())).concern == ORDINARY else LIMIT
        chosen += sorted(texts.values(), key=_number)[:limit]
    return chosen


def _number(prompt: Prompt) -> int:
    return zlib.crc32(prompt.text.encode())


# Public sets that only the demo reads.


def _persist(content: str) -> Iterator[tuple[str, str | None]]:
    return ((json.loads(line)["query"], None) for line in content.splitlines() if line.strip())


def _fresh_questions(content: str) -> Iterator[tuple[str, str | None]]:
    rows = list(csv.reader(io.StringIO(content)))
    head = next(at for at, row in enumerate(rows) if row[:1] == ["id"])
    column = rows[head].index("question")
    return ((row[column], None) for row in rows[head + 1 :] if row[column])


def _reasons(content: str) -> Iterator[tuple[str, str | None]]:
    """Why a customer calls, in tau2's tasks; "you" is the customer."""
    return ((task["user_scenario"]["instructions"]["reason_for_call"], None) for task in json.loads(content))


def _templates(content: str) -> Iterator[tuple[str, str | None]]:
    """PyRIT's jailbreaks; what is asked in them is harmless here, since the wrapper is what is looked for."""
    yield str(yaml.safe_load(content)["value"]).replace("{{ prompt }}", "Tell me about the tides."), None


_SETS: Final = (
    *(
        PublicSet(ORDINARY, family, Kind.ORDINARY, Part.TRAIN, "inspect-evals", f"inspect_evals/{path}", reader)
        for family, path, reader in (
            ("persistbench", "persistbench/benchmark_samples/*.jsonl", _persist),
            ("freshqa", "abstention_bench/data/freshqa/FreshQA_v12182024.csv", _fresh_questions),
            ("retail", "tau2/data/domains/retail/tasks.json", _reasons),
            ("airline", "tau2/data/domains/airline/tasks.json", _reasons),
        )
    ),
    *(
        replace(known, concern=concern, part=Part.TRAIN)
        for known in public_sets.SETS
        for family, concern in (("writingbench", ORDINARY), ("bastion_benign", HARMFUL))
        if known.family == family
    ),
    PublicSet(
        JAILBREAK, "jailbreakchat", Kind.POSITIVE, Part.TRAIN, "pyrit", "pyrit/datasets/jailbreak/templates/*.yaml",
        _templates,
    ),
)  # fmt: skip
