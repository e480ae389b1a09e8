"""Public names say what they mean to someone who never saw this tree. Words and rule: tests/support/vocabulary.py."""

from __future__ import annotations

import pytest

from tests.bench.house import PACKAGE
from tests.support import house
from tests.support.vocabulary import ALLOWED, DIALECT, public_names, words


def test_no_public_name_speaks_a_private_dialect():
    found = house.dialect(house.read(PACKAGE))
    told = [f"{n.module}:{n.line} {n.kind} {n.name}; say {' / '.join(DIALECT[w] for w in n.dialect)}" for n in found]
    assert not told, "\n".join(told)


@pytest.mark.parametrize("allowed", ALLOWED)
def test_what_is_allowed_still_exists(allowed):
    """Red: take it from the list."""
    assert any(name.name == allowed for m in house.read(PACKAGE) for name in public_names(m.name, m.source))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("class KeptScores: ...", ["KeptScores"]),
        ("def take(x): ...", ["take"]),
        ("async def take_one(x): ...", ["take_one"]),
        ("class A:\n    def greet(self): ...", ["A.greet"]),
        ("class A:\n    open_afar: int = 0", ["A.open_afar"]),
        ("class A:\n    def __init__(self, held): ...", ["A.__init__(held)"]),
        ("class A:\n    def f(self):\n        self.held = 1", ["A.held"]),
        ("def f(*, stakes=None): ...", ["f(stakes)"]),
        ("ROLE_NOTE = 0.3", ["ROLE_NOTE"]),
        ("if x:\n    HELD: int = 1", ["HELD"]),
    ],
)
def test_a_word_of_the_dialect_is_found_in_every_public_place(source, found):
    assert [name.name for name in public_names("p.m", source) if name.dialect] == found


@pytest.mark.parametrize(
    "source",
    [
        "def _take(held): ...",
        "_HELD = 1",
        "def f():\n    kept = 1\n    def keep(x): ...",
        "class A:\n    def f(self):\n        self._held = 1",
        "def threshold(upheld, mistaken, notes): ...",
        "import held\nfrom numpy import take",
    ],
)
def test_private_names_other_words_and_names_of_others_are_left_alone(source):
    assert not [name.name for name in public_names("p.m", source) if name.dialect]


def test_a_module_may_not_be_named_so_either():
    assert [name.dialect for name in public_names("p.kept", "")] == [["kept"]]
    assert not list(public_names("p._kept", ""))


def test_names_are_cut_into_words_in_every_style():
    assert words("KeptScores") == words("kept_scores") == words("KEPT_SCORES") == ["kept", "scores"]
    assert words("KVCacheKept") == ["kv", "cache", "kept"]
