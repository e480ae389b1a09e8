"""One text, and what it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a detector of the text's concern should say to it."""

    POSITIVE = "positive"
    ORDINARY = "ordinary"
    HARD = "hard"
    """Harmless, with the words or in the form of a positive text."""


class Part(StrEnum):
    """What a family is for. A whole family is in one part: how a detector does on a form of text that it never saw is
    what its users meet.
    """

    TRAIN = "train"
    SELECTION = "selection"
    """Layers, penalties and limits are chosen by it."""
    TEST = "test"
    """Nothing is chosen by it."""


@dataclass(frozen=True)
class Prompt:
    """A user's message, and where the concern lies in the model's answer, that answer."""

    text: str
    concern: str
    """"ordinary" where the text is of no concern."""
    family: str
    """Texts of one form or one data set. Unique within a concern."""
    kind: Kind
    part: Part = Part.TRAIN
    answer: str | None = None
    form: str = ""
    """The template that it was written from: texts of one form are alike, and no independent draws. Of a public set
    each text is a form of its own, and this is empty.
    """

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        """As a chat template takes them."""
        asked = {"role": "user", "content": self.text}
        return (asked,) if self.answer is None else (asked, {"role": "assistant", "content": self.answer})

    @property
    def whole(self) -> str:
        """Everything that is said, as a reader without the model sees it."""
        return self.text if self.answer is None else f"{self.text}\n{self.answer}"
