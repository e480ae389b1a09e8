"""The residual stream of a model over pieces of chats, written to a file as it comes, so that a stop loses nothing.

Shape legend: P pieces, C tokens of a piece that are stored, N tokens of all pieces together, D d_model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from latentwatch import storage
from latentwatch.arrays import F32, Bool
from latentwatch.demo.build.chat_sae.chats import Piece
from latentwatch.names import HookPoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_PIECES: Final = 8
SINK_NORM: Final = 5.0
"""A token whose norm is above this many times the median is an attention sink: it carries no text and would be most of
the loss. In SmolLM2 1 in 10,000, at 170 times the median; nothing lies between 2 and 100 times."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Harvest:
    """Where the stream of some pieces is written: `acts.npy`, float16 [P, C, D], and how many are done."""

    folder: Path
    first: int
    """Tokens at the beginning of each piece that are not stored: the template's own."""

    @property
    def done(self) -> int:
        """Pieces that are written."""
        path = self.folder / "done.json"
        return int(json.loads(path.read_text("utf-8"))["pieces"]) if path.exists() else 0

    def acts_PCD(self) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
        """What is written so far."""
        whole: np.ndarray[tuple[int, ...], np.dtype[np.float16]] = np.load(self.folder / "acts.npy", mmap_mode="r")
        return whole[: self.done]


def cut_model(model: PreTrainedModel, hook_point: HookPoint) -> torch.nn.Module:
    """The layers up to the hook point, and nothing behind it: what it returns is the stream there."""
    inner: torch.nn.Module = model.model
    inner.layers = inner.layers[: hook_point.layer + 1]  # type: ignore[index]  # a ModuleList
    inner.norm = torch.nn.Identity()
    return inner


@torch.inference_mode()
def harvest(inner: torch.nn.Module, todo: Sequence[Piece], folder: Path, *, width: int, progress: Progress) -> Harvest:
    """Write the stream of each piece behind the template's prefix, going on where an earlier run was stopped.

    Raises: ValueError: a stream that does not fit float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = Harvest(folder, todo[0].first)
    shape = (len(todo), len(todo[0].ids) - written.first, width)
    path = folder / "acts.npy"
    acts_PCD = np.lib.format.open_memmap(
        path, "r+" if path.exists() else "w+", np.float16, None if path.exists() else shape
    )
    if acts_PCD.shape != shape:
        raise ValueError(f"{path} holds {acts_PCD.shape}, and {shape} was asked; remove it")
    began, cpu, start = time.monotonic(), time.process_time(), written.done
    for cut in range(start, len(todo), BATCH_PIECES):
        batch = todo[cut : cut + BATCH_PIECES]
        ids_PC = torch.tensor([piece.ids for piece in batch])
        states = inner(input_ids=ids_PC, use_cache=False).last_hidden_state[:, written.first :].float().numpy()
        stored = states.astype(np.float16)
        if not np.isfinite(stored).all():
            raise ValueError("a stream does not fit float16")
        acts_PCD[cut : cut + len(batch)] = stored
        if (cut // BATCH_PIECES) % 10 == 9 or cut + len(batch) == len(todo):
            with storage.atomic_write(folder / "done.json") as file:
                file.write(json.dumps({"pieces": cut + len(batch)}).encode())
            tokens = (cut + len(batch) - start) * shape[1]
            progress(
                f"stream: {cut + len(batch)} of {len(todo)} pieces, {tokens / (time.monotonic() - began):.0f} tokens/s, "
                f"{tokens / (time.process_time() - cpu):.0f} per CPU second"
            )
    return written


def sinks(norm_N: F32) -> Bool:
    """bool [N]: the tokens that are attention sinks, by SINK_NORM."""
    return norm_N > SINK_NORM * float(np.median(norm_N))
