"""What a run will take, and what is refused before it begins: sizes, layers, memory, disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from latentwatch.errors import RefusalReason, WatchlistRefused

DEPTHS: Final = (0.3, 0.45, 0.6, 0.75, 0.9)
"""Of the default layers. What a text is about stands in the middle; what the model is about to say, towards the end."""
DTYPES: Final = ("bfloat16", "float16", "float32")
_ELEMENT_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Sizes:
    """Of a model, as its own configuration says."""

    layers: int
    d_model: int
    positions: int
    dtype: str
    """That its weights are in."""


def sizes(model: str) -> Sizes:
    """Raises WatchlistRefused: the model's configuration cannot be loaded, or transformers is missing."""
    try:
        from transformers import AutoConfig

        text = AutoConfig.from_pretrained(model).get_text_config()
    except ImportError as error:
        raise _refuse(
            model,
            f"package {error.name!r} is missing",
            "Run it where vLLM is installed, in a clone of the repository: pip install '.[engine,start]'",
            RefusalReason.PACKAGE_MISSING,
        ) from error
    except (OSError, ValueError) as error:
        raise _refuse(
            model,
            f"no configuration can be loaded ({' '.join(str(error).split())[:200]})",
            "Give a model's folder, or a name in the Hugging Face hub. Without a network only what is in its cache is "
            "found.",
        ) from error
    dtype = str(getattr(text, "dtype", None)).removeprefix("torch.")
    return Sizes(
        int(text.num_hidden_layers),
        int(text.hidden_size),
        int(getattr(text, "max_position_embeddings", None) or 1 << 20),
        dtype if dtype in DTYPES else "bfloat16",
    )


def default_layers(count: int) -> tuple[int, ...]:
    """Layers to try, counted from 0."""
    return tuple(sorted({min(max(round(depth * count) - 1, 0), count - 1) for depth in DEPTHS}))


def check_layers(model: str, layers: Sequence[int], count: int) -> None:
    """Raises WatchlistRefused: a layer that the model does not have."""
    if wrong := [layer for layer in layers if not 0 <= layer < count]:
        raise _refuse(model, f"it has {count} layers, no layer {wrong[0]}", f"Use 0 to {count - 1}.")


def check_memory(model: str, dtype: str, weights_dtype: str, meminfo: str, *, has_gpu: bool) -> None:
    """Raises WatchlistRefused: the weights in `model`, a folder, are larger than the free memory of this host.

    On a GPU, whose memory vLLM looks at itself, and for a model that is not on disk yet nothing is said.

    Args: meminfo: the text of /proc/meminfo.
    """
    weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) if Path(model).is_dir() else 0
    needed = weights * _ELEMENT_BYTES[dtype] / _ELEMENT_BYTES[weights_dtype]
    free = meminfo_bytes(meminfo).get("MemAvailable", 0)
    if has_gpu or not needed or not free or needed < free:
        return
    raise _refuse(
        model,
        f"its weights take {needed / 1e9:.1f} GB in {dtype}, and {free / 1e9:.1f} GB of memory are free here",
        "Run it on a machine that serves the model, or with --dtype bfloat16 if the server uses that.",
    )


def meminfo_bytes(meminfo: str) -> Mapping[str, int]:
    """/proc/meminfo, in bytes."""
    fields = (line.split() for line in meminfo.splitlines())
    return {one[0].rstrip(":"): int(one[1]) * 1024 for one in fields if len(one) >= 2 and one[1].isdigit()}


def check_disk(folder: Path, tokens: int, layers: int, d_model: int) -> int:
    """The bytes that captured streams will take. Raises WatchlistRefused: there is less room than that."""
    needed = tokens * layers * (2 * d_model + 4)
    free = shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        raise WatchlistRefused(
            f"folder {folder}",
            found=f"captured streams would take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            instead="Give an --out on a larger disk, fewer --layers, or fewer --concerns.",
            reason=RefusalReason.RECORDING,
        )
    return needed


def _refuse(model: str, found: str, instead: str, reason: RefusalReason = RefusalReason.RECORDING) -> WatchlistRefused:
    return WatchlistRefused(f"model {model}", found=found, instead=instead, reason=reason)
