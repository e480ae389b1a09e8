"""Prompts as the served model reads them: through its chat template, with the prompt for its answer, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentwatch.errors import RefusalReason, WatchlistRefused
from latentwatch.prompts.prompt import Prompt
from latentwatch.watchlist.activations import MOST_SKIPPED, Request, shared_start, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """The prompts that fit, and what the template does to each of them."""

    prompts: Sequence[Prompt]
    ids: Sequence[tuple[int, ...]]
    """Of the prompts, then of an operator's own requests."""
    skip_first: int
    """Tokens that every prompt begins with, at most MOST_SKIPPED and at least one: the first token is an attention
    sink in most models."""
    shared_prefix: int
    """As many as there are."""
    generation_prompt: str
    """The text that every prompt without an answer ends with."""
    too_long: int
    """Prompts that were left out."""

    def last(self, at: int) -> int:
        """The last token of a prompt, counted from the first that is not skipped."""
        return len(self.ids[at]) - self.skip_first - 1


def load(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises WatchlistRefused: it cannot be loaded, or transformers is missing."""
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model)
    except ImportError as error:
        raise _refuse(model, f"package {error.name!r} is missing", "Install vLLM, which brings it.") from error
    except (OSError, ValueError) as error:
        found = f"no tokenizer can be loaded ({' '.join(str(error).split())[:200]})"
        instead = "Give a model's folder, or a name in the Hugging Face hub that is in the cache or can be reached."
        raise _refuse(model, found, instead) from error


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    requests: Sequence[Request] = (),
    *,
    plain: bool,
    max_tokens: int,
    model: str,
) -> Encoded:
    """Every prompt and request as token ids, those longer than `max_tokens` left out.

    Args:   requests: an operator's own.   plain: without a chat template, as text that a base model goes on with.
    Raises: WatchlistRefused: the model has no chat template and `plain` is not set, or an answer is not in what the
            template writes.
    """
    if not plain and not tokenizer.chat_template:
        raise _refuse(
            model,
            "it has no chat template, so it is a base model, or its tokenizer's files are incomplete",
            "For a base model, add --plain-text: prompts are then text. Else add the template to the tokenizer.",
        )
    encoded = [_plain(tokenizer, p) if plain else _chat(tokenizer, p, model) for p in prompts]
    fitting = [at for at, ids in enumerate(encoded) if len(ids) <= max_tokens]
    own = [tuple(token_ids(tokenizer, request)) for request in requests]
    ids = [*(encoded[at] for at in fitting), *(one for one in own if len(one) <= max_tokens)]
    chosen = [prompts[at] for at in fitting]
    prefix = shared_start(ids)
    asked = [ids[at][::-1] for at, prompt in enumerate(chosen) if prompt.answer is None]
    ending = tokenizer.decode(list(asked[0][: shared_start(asked)][::-1])) if asked and not plain else ""
    skip = min(max(prefix, 1), MOST_SKIPPED)
    return Encoded(chosen, ids, skip, prefix, ending, len(prompts) + len(own) - len(ids))


def _chat(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, model: str) -> tuple[int, ...]:
    text = str(
        tokenizer.apply_chat_template(
            list(prompt.messages), add_generation_prompt=prompt.answer is None, tokenize=False
        )
    )
    if prompt.answer is not None:
        # In serving the mark that ends an answer is sampled and never run.
        end = text.rfind(prompt.answer.strip())
        if end < 0:
            found = f"its chat template does not write an answer as it is ({prompt.answer[:40]!r} is not there)"
            raise _refuse(model, found, "Report it with the model's name.")
        text = text[: end + len(prompt.answer.strip())]
    # The template writes the special tokens itself; the tokenizer would add them a second time.
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _plain(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[int, ...]:
    return tuple(tokenizer(prompt.whole)["input_ids"])


def _refuse(model: str, found: str, instead: str) -> WatchlistRefused:
    return WatchlistRefused(f"model {model}", found=found, instead=instead, reason=RefusalReason.RECORDING)
