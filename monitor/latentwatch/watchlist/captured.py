"""What an engine is asked to capture, and the streams that it captured: files that a run begins, ends and resumes with.

A job is cut into parts, each a file that appears whole or not at all, so that a run that was ended goes on with the
first part that is missing. A token's stream is stored in float16 relative to its own largest element, which is exact
to 5e-4 of it whatever the norm, and takes half of float32.

Legend: R requests, T tokens, D d_model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
import safetensors.numpy

from latentwatch import storage
from latentwatch.arrays import F16, F32, I64
from latentwatch.errors import RefusalReason, WatchlistRefused

REQUESTS_PER_PART: Final = 128
_JOB: Final = "job.json"


@dataclass(frozen=True)
class CaptureJob:
    """Prompts as token ids, and the layers whose stream is wanted."""

    model: str
    dtype: str
    """As vLLM's --dtype."""
    layers: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    decode_tokens: tuple[int, ...]
    """For each prompt, how many tokens the model goes on with."""
    skip_first: int
    """Positions at each start that are not stored."""
    max_model_len: int

    @property
    def parts(self) -> list[range]:
        """The requests of each part."""
        return [
            range(start, min(start + REQUESTS_PER_PART, len(self.prompts)))
            for start in range(0, len(self.prompts), REQUESTS_PER_PART)
        ]

    @property
    def fingerprint(self) -> str:
        """Of everything that decides what is captured."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> bool:
        """Begin the job in `folder`, or go on with the same one that lies there; returns whether it goes on.

        Of another job nothing is used: its parts are removed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / _JOB).exists() and CaptureJob.read(folder).fingerprint == self.fingerprint:
            return any(folder.glob("part-*.safetensors"))
        for old in folder.glob("part-*.safetensors"):
            old.unlink()
        with storage.atomic_write(folder / _JOB) as file:
            file.write(json.dumps(asdict(self)).encode())
        return False

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises: WatchlistRefused: the job is missing or damaged."""
        try:
            fields = json.loads((folder / _JOB).read_text("utf-8"))
            return cls(
                **fields
                | {
                    "layers": tuple(fields["layers"]),
                    "prompts": tuple(map(tuple, fields["prompts"])),
                    "decode_tokens": tuple(fields["decode_tokens"]),
                }
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WatchlistRefused(
                f"captured streams in {folder}",
                found=f"the job cannot be read ({error!r:.100})",
                instead="Remove the folder and start again.",
                reason=RefusalReason.RECORDING,
            ) from error


@dataclass(frozen=True)
class CapturedRequest:
    """The stream of one request, first positions left out: its prompt's tokens, then those that the model said."""

    x_LTD: F16
    """Relative to `largest_LT`; L are the job's layers in their order."""
    largest_LT: F32
    said: tuple[int, ...]
    """Ids of the tokens that the model said, the last of which was never run."""


def part_path(folder: Path, number: int) -> Path:
    """Where part `number` of a job lies."""
    return folder / f"part-{number:05d}.safetensors"


def missing_parts(folder: Path, job: CaptureJob) -> list[int]:
    """The parts that a run has to capture yet."""
    return [number for number in range(len(job.parts)) if not part_path(folder, number).exists()]


def write_part(folder: Path, number: int, requests: Sequence[CapturedRequest]) -> None:
    """Write one part whole."""
    tensors = {
        "x": np.concatenate([r.x_LTD for r in requests], axis=1),
        "largest": np.concatenate([r.largest_LT for r in requests], axis=1),
        "tokens": np.array([r.x_LTD.shape[1] for r in requests], np.int64),
        "said": np.array([token for r in requests for token in r.said], np.int64),
        "said_tokens": np.array([len(r.said) for r in requests], np.int64),
    }
    with storage.atomic_write(part_path(folder, number)) as file:
        file.write(safetensors.numpy.save(tensors))


@dataclass(frozen=True)
class CapturedLayer:
    """The stream of one layer over all requests, first positions left out."""

    x_TD: F32
    length_R: I64
    """Tokens of each request; they follow one another."""

    @property
    def bounds_S(self) -> I64:
        """Where each request begins, and at last where the last one ends: S is R + 1."""
        return np.concatenate([[0], np.cumsum(self.length_R)])


def layer(folder: Path, job: CaptureJob, index: int) -> CapturedLayer:
    """The stream of the job's layer at `index`, one layer in memory at a time.

    Raises: WatchlistRefused: a part is missing or damaged.
    """
    pieces, lengths = [], []
    for number in range(len(job.parts)):
        try:
            with safetensors.safe_open(part_path(folder, number), framework="numpy") as tensors:
                x_TD = tensors.get_slice("x")[index : index + 1][0].astype(np.float32)
                pieces.append(x_TD * tensors.get_slice("largest")[index : index + 1][0][:, None])
                lengths.append(tensors.get_tensor("tokens"))
        except (OSError, safetensors.SafetensorError) as error:
            raise WatchlistRefused(
                f"part {number} of the captured streams in {folder}",
                found=f"it cannot be read ({error})",
                instead="Run the same command again: it captures what is missing.",
                reason=RefusalReason.RECORDING,
            ) from error
    return CapturedLayer(np.concatenate(pieces), np.concatenate(lengths))


def said(folder: Path, job: CaptureJob) -> Iterator[tuple[int, ...]]:
    """The tokens that the model said, of each request."""
    for number in range(len(job.parts)):
        tensors = safetensors.numpy.load_file(part_path(folder, number))
        ends = np.cumsum(tensors["said_tokens"])
        for start, end in zip(ends - tensors["said_tokens"], ends, strict=True):
            yield tuple(int(token) for token in tensors["said"][start:end])
