"""What a watchlist states of its model, beyond the sizes; `checkpoint.py` reads it off a folder and compares it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

Config = Mapping[str, Any]
"""Plain values by their path in config.json: `rope_scaling.factor`."""

_SAMPLE: Final = re.compile(r"F32:([0-9a-f]{8})+|B?F16:([0-9a-f]{4})+")


@dataclass(frozen=True)
class ModelIdentity:
    """What a checkpoint's folder says of its model. What it does not have is empty."""

    config: Config = field(default_factory=dict)
    tokenizer: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 by what was hashed: `vocabulary`, and the file's bytes by its name."""
    tensors: int = 0
    tensors_sha256: str = ""
    samples: Mapping[str, str] = field(default_factory=dict)
    """`BF16:` and the values' bytes in hexadecimal, by the tensor's name without its layout."""

    def __post_init__(self) -> None:
        """Raises ValueError: it is not what a checkpoint's folder says, and nothing could be compared with it."""
        if not all(isinstance(table, Mapping) for table in (self.config, self.tokenizer, self.samples)):
            raise ValueError("the model's identity is not made of tables")
        texts = (self.tensors_sha256, *self.tokenizer.values(), *self.samples.values())
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("the tables of the model's identity do not hold texts")
        for name, sample in self.samples.items():
            if not _SAMPLE.fullmatch(sample):
                raise ValueError(f"the values of {name[:80]!r} in the model's identity are not values")

    @property
    def is_stated(self) -> bool:
        """Whether there is anything to compare."""
        return bool(self.config or self.tokenizer or self.samples)

    def summary(self) -> str:
        """One line for people."""
        told = next(iter(self.tokenizer.values()), "")[:12]
        return (
            f"config of {len(self.config)} values, tokenizer {told or 'not stated'}, {self.tensors} tensors"
            f" ({self.tensors_sha256[:12] or 'not stated'}), values of {len(self.samples)} of them"
        )
