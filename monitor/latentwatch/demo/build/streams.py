"""Residual streams of chat requests of a model that is not ours: at several layers in one pass, in batches.

What every request begins with, the template's own system prompt, is found by comparing token ids, computed once, and
left out of what is returned. Shape legend: T tokens of a request behind that prefix, L layers, D d_model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from latentwatch.arrays import F16

BATCH_TOKENS: Final = 1024
CHUNK: Final = 32
"""Requests that are stored together: what a build that is killed has to do again."""

Messages = Sequence[Mapping[str, str]]


class Streams:
    """A model that is run up to the deepest of the layers that are asked for, in float32."""

    def __init__(self, folder: Path, layers: Sequence[int], progress: Callable[[int, int], None]) -> None:
        """Args: progress: is told how many requests were run, and of how many."""
        self.layers = tuple(layers)
        self._progress = progress
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().model
        self._name = folder.name
        self._found: dict[int, torch.Tensor] = {}
        self._model.layers = self._model.layers[: max(layers) + 1]
        for layer in layers:
            self._model.layers[layer].register_forward_hook(
                lambda _module, _args, out, layer=layer: self._found.__setitem__(
                    layer, out[0] if isinstance(out, tuple) else out
                )
            )

    def ids(self, messages: Messages) -> list[int]:
        """The tokens of a request as the server feeds them, the generation prompt included."""
        encoded = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    def shared(self) -> tuple[list[int], int]:
        """The token ids that every request begins with, and how many every one ends with."""
        some = [self.ids([{"role": "user", "content": text}]) for text in ("Hello there!", "7 birds", '"why" (not)?')]
        return shared_start(some), len(shared_start([ids[::-1] for ids in some]))

    def capture(self, requests: Sequence[Messages], cache: Path) -> Iterator[F16]:
        """The stream of each request at the layers, [T, L, D] without the shared beginning; what `cache` has is read.

        Raises OSError: the cache cannot be written.
        """
        prefix, _ = self.shared()
        cache.mkdir(parents=True, exist_ok=True)
        ids = [self.ids(request)[len(prefix) :] for request in requests]
        keys = [hashlib.sha256(repr((self._name, self.layers, one)).encode()).hexdigest()[:24] for one in ids]
        stored = {key: path for path in cache.glob("*.npz") for key in np.load(path).files}
        missing = {key: one for key, one in zip(keys, ids, strict=True) if key not in stored}
        for at in range(0, len(missing), CHUNK):
            some = dict(list(missing.items())[at : at + CHUNK])
            path = cache / f"{next(iter(some))}.npz"
            partial = path.with_suffix(".partial")
            streams: Mapping[str, Any] = dict(zip(some, self._run(list(some.values()), prefix), strict=True))
            with partial.open("wb") as file:
                np.savez(file, **streams)
            partial.replace(path)
            stored |= dict.fromkeys(some, path)
            self._progress(min(at + CHUNK, len(missing)), len(missing))
        opened = {path: np.load(path) for path in set(stored.values())}
        for key in keys:
            yield opened[stored[key]][key]

    @torch.no_grad()
    def _run(self, ids: Sequence[Sequence[int]], prefix: Sequence[int]) -> list[F16]:
        out: list[F16 | None] = [None] * len(ids)
        by_length = sorted(range(len(ids)), key=lambda at: len(ids[at]))
        while by_length:
            longest = len(ids[by_length[-1]])
            batch = [by_length.pop() for _ in range(min(len(by_length), max(1, BATCH_TOKENS // longest)))]
            tokens = torch.zeros(len(batch), longest, dtype=torch.long)
            for row, at in enumerate(batch):
                tokens[row, : len(ids[at])] = torch.tensor(ids[at])
            start = self._model(input_ids=torch.tensor([list(prefix)]), use_cache=True).past_key_values
            start.batch_repeat_interleave(len(batch))
            # Behind a request there is padding, which nothing before it looks at.
            self._model(input_ids=tokens, past_key_values=start, use_cache=True)
            stacked = torch.stack([self._found[layer] for layer in self.layers], 2).to(torch.float16).numpy()
            for row, at in enumerate(batch):
                out[at] = stacked[row, : len(ids[at])].copy()
        return [stream for stream in out if stream is not None]


def shared_start(ids: Sequence[Sequence[int]]) -> list[int]:
    """The longest beginning that all of them have."""
    length = 0
    for tokens in zip(*ids, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return list(ids[0][:length])
