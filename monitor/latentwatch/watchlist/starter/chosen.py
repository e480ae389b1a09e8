"""Which texts a run uses, and how many of a family."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from latentwatch.prompts import public_sets, written
from latentwatch.prompts.prompt import Part, Prompt
from latentwatch.prompts.public_sets import Missing

FITTED_PER_FAMILY: Final = 20
TESTED_PER_FAMILY: Final = 40
"""More, since intervals are of these."""


def prompts(concerns: Sequence[str]) -> tuple[list[Prompt], list[Missing]]:
    """The texts of these concerns and the ordinary ones, and the public sets that are missing."""
    wanted = [*concerns, written.ORDINARY]
    public, missing = [], []
    for concern in wanted:
        found, absent = public_sets.read(concern, limit=TESTED_PER_FAMILY)
        public += found
        missing += absent
    count: dict[tuple[str, str], int] = defaultdict(int)
    chosen = []
    for prompt in [*(p for concern in wanted for p in written.texts(concern)), *public]:
        name = prompt.concern, prompt.family
        count[name] += 1
        if count[name] <= (TESTED_PER_FAMILY if prompt.part is Part.TEST else FITTED_PER_FAMILY):
            chosen.append(prompt)
    return chosen, missing
