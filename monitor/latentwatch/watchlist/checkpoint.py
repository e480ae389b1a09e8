"""Which model a checkpoint's folder holds, beyond its sizes, and whether it is the one that a watchlist states.

A direction found in one model's weights means nothing in another's of the same shape. What is compared is what stays
the same for one model however it is saved, sharded or renamed at the top, and no more:

config      every number, flag and word of config.json that shapes what is computed, by name, where both files have it
tokenizer   the vocabulary, the added tokens and the number of merges of tokenizer.json; or the bytes of another file
tensors     names and shapes of all tensors, without the parts of names that differ between layouts
samples     a few neighbouring values of up to SAMPLED tensors, at a place that the name decides

Of a quantised checkpoint, and of one without safetensors, the weights cannot be compared, which is said and is no
difference. Values of another floating-point type are compared to the precision of bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from latentwatch.arrays import F32
from latentwatch.errors import WatchlistRefused
from latentwatch.names import ModelMatch
from latentwatch.watchlist.file import f32_from_bf16
from latentwatch.watchlist.identity import Config, ModelIdentity
from latentwatch.watchlist.tensors import Entry, SafetensorsFile

SAMPLED: Final = 256
"""Tensors of which values are kept: with 16 values each, some 20 KB on the card and as many reads of a page."""
_VALUES: Final = 16
_MOST_FILE_BYTES: Final = 256 << 20
"""Of a tokenizer or an index; published ones have up to 35 MB."""
_TOLERANCE: Final = 2.0**-7
"""Relative: what rounding to bfloat16, once or twice, may move a value by."""
_LAYOUT: Final = frozenset({"model", "language_model", "text_model", "transformer", "base_model"})
"""Parts of tensor names by which libraries nest the same model."""
_NOT_THE_MODEL: Final = (
    *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "auto_map", "architectures"),
    *("_commit_hash", "id2label", "label2id", "initializer", "dropout", "pdrop", "token_id", "output_attentions"),
    *("output_hidden_states", "return_dict", "torchscript", "cache_implementation", "_attn_implementation"),
    *("quantization_config", "problem_type", "use_bfloat16", "pretraining_tp"),
)
"""Keys of config.json, or parts of them, that say nothing of what is computed."""
_DTYPES: Final = {"<f4": "F32", "<f2": "F16"}


@dataclass(frozen=True)
class Comparison:
    """Whether a checkpoint is that model."""

    match: ModelMatch
    text: str
    """What differs, or what could not be compared; empty where all of it is the same."""


def of_checkpoint(folder: Path) -> ModelIdentity:
    """What a folder in Hugging Face's layout says of its model. What cannot be read is left out; it raises nothing."""
    config = _json(folder / "config.json")
    tensors = {} if _is_quantised(config) else _tensors(folder, config)
    floating = sorted(name for name, (_, entry) in tensors.items() if _code(entry) and _size(entry))
    places = np.unique(np.linspace(0, len(floating) - 1, min(SAMPLED, len(floating))).astype(int))
    chosen = [floating[place] for place in places.tolist()]
    return ModelIdentity(
        config=dict(_flat(config)),
        tokenizer=_tokenizer(folder),
        tensors=len(tensors),
        tensors_sha256=_names_sha256(tensors) if tensors else "",
        samples={name: made for name in chosen if (made := _sample(name, *tensors[name]))},
    )


def compare(
    stated: ModelIdentity | None,
    folder: Path,
    *,
    overrides: Config | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> Comparison:
    """Whether the checkpoint in a folder is the model that was stated. It raises nothing.

    Args: overrides: what an engine puts in the place of config.json's values.   go_on: asked between two reads of
          weights; what was not read once it says no is not compared.
    """
    if stated is None or not stated.is_stated:
        return Comparison(ModelMatch.NOT_STATED, "the watchlist does not state its model beyond its sizes")
    config = {**_json(folder / "config.json"), **(overrides or {})}
    different = [*_config_differences(stated.config, dict(_flat(config))), *_tokenizer_difference(stated, folder)]
    weights = _weights(stated, folder, config, go_on)
    if weights.match is ModelMatch.DIFFERS:
        different.append(weights.text)
    if different:
        return Comparison(ModelMatch.DIFFERS, "; ".join(different))
    return weights


# -- config.json


def _read(path: Path) -> bytes:
    """A file of bounded size. Raises OSError: also for what is no file, and might never end or never begin."""
    if not path.is_file() or path.stat().st_size > _MOST_FILE_BYTES:
        raise OSError(f"{path} is no file of at most {_MOST_FILE_BYTES} bytes")
    return path.read_bytes()


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_quantised(config: Config) -> bool:
    return "quantization_config" in config or "compression_config" in config


def _flat(value: Config, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, found in sorted(value.items()):
        if any(part in key for part in _NOT_THE_MODEL):
            continue
        name = f"{path}.{key}" if path else str(key)
        if isinstance(found, Mapping):
            yield from _flat(found, name)
        elif found is not None and len(json.dumps(found, default=str)) <= 4096:
            yield name, found


def _config_differences(stated: Config, found: Config) -> Iterator[str]:
    """By names that both have: versions of one library add keys, move them and leave out what is the default."""
    for name in sorted(stated.keys() & found.keys()):
        if stated[name] != found[name]:
            yield f"config {name} is {_short(found[name])} and not {_short(stated[name])}"


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


# -- the tokenizer


def _tokenizer(folder: Path) -> dict[str, str]:
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model"):
        path = folder / name
        try:
            data = _read(path)
        except OSError:
            continue
        made = {"vocabulary": _vocabulary_sha256(data)} if name == "tokenizer.json" else {}
        return {**{key: value for key, value in made.items() if value}, name: hashlib.sha256(data).hexdigest()}
    return {}


def _vocabulary_sha256(data: bytes) -> str:
    """Of what maps text to tokens, however the file is laid out; empty where it is not understood."""
    try:
        read = json.loads(data)
        model = read["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            vocabulary = sorted(vocabulary.items(), key=lambda item: (item[1], item[0]))
        added = sorted((token["id"], token["content"]) for token in read.get("added_tokens", ()))
        told = json.dumps([vocabulary, added, len(model.get("merges") or ())], ensure_ascii=True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    return hashlib.sha256(told.encode()).hexdigest()


def _tokenizer_difference(stated: ModelIdentity, folder: Path) -> Iterator[str]:
    found = _tokenizer(folder)
    same_kind = [name for name in stated.tokenizer if name in found]
    # The bytes of a file that was written again may differ where its vocabulary does not.
    if same_kind and all(stated.tokenizer[name] != found[name] for name in same_kind):
        yield f"the tokenizer is another one ({same_kind[-1]})"


# -- the weights


def _tensors(
    folder: Path, config: Config, go_on: Callable[[], bool] = lambda: True
) -> dict[str, tuple[SafetensorsFile, Entry]]:
    """The checkpoint's tensors by name without layout; empty where it has no safetensors that can be read in time."""
    try:
        index = _json(folder / "model.safetensors.index.json").get("weight_map", {})
        names = sorted({str(name) for name in index.values()}) if isinstance(index, dict) else []
        # Beside the shards lies the same model once more in some repositories, in its authors' own layout.
        paths = [folder / name for name in names] or [
            path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("consolidated")
        ]
        files: list[SafetensorsFile] = []
        for path in paths:
            if not path.is_file() or (files and not go_on()):
                return {}
            files.append(SafetensorsFile(path))
    except (OSError, WatchlistRefused):
        return {}
    tied = _is_tied(config)
    found: dict[str, tuple[SafetensorsFile, Entry]] = {}
    twice: set[str] = set()
    for file in files:
        for name, entry in file.entries.items():
            plain = plain_name(name)
            if plain.endswith("inv_freq") or (tied and plain == "lm_head.weight"):
                continue
            if plain in found:
                twice.add(plain)
            found[plain] = (file, entry)
    return {name: place for name, place in found.items() if name not in twice}


def _is_tied(config: Config) -> bool:
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    return bool(config.get("tie_word_embeddings", inner))


def plain_name(name: str) -> str:
    """A tensor's name without the parts by which libraries nest the same model."""
    return ".".join(part for part in name.split(".") if part not in _LAYOUT)


def _names_sha256(tensors: Mapping[str, tuple[SafetensorsFile, Entry]]) -> str:
    told = "\n".join(f"{name} {list(entry.shape)}" for name, (_, entry) in sorted(tensors.items()))
    return hashlib.sha256(told.encode()).hexdigest()


def _size(entry: Entry) -> int:
    return int(np.prod(entry.shape, dtype=np.int64))


def _code(entry: Entry) -> str:
    return "BF16" if entry.bf16 else _DTYPES.get(entry.dtype.str, "")


def _sample(name: str, file: SafetensorsFile, entry: Entry) -> str:
    """Neighbouring values at a place that the name decides; empty where they cannot be read."""
    count = _size(entry)
    taken = min(_VALUES, count)
    start = zlib.crc32(name.encode()) % (count - taken + 1)
    try:
        with file.path.open("rb") as opened:
            opened.seek(entry.offset + start * entry.dtype.itemsize)
            raw = opened.read(taken * entry.dtype.itemsize)
    except OSError:
        return ""
    return f"{_code(entry)}:{raw.hex()}" if len(raw) == taken * entry.dtype.itemsize else ""


def _values(sample: str) -> F32:
    code, _, text = sample.partition(":")
    raw = bytes.fromhex(text)
    if code == "BF16":
        return f32_from_bf16(np.frombuffer(raw, "<u2"))
    return np.frombuffer(raw, "<f4" if code == "F32" else "<f2").astype(np.float32)


def _is_same(stated: str, found: str) -> bool:
    if stated.partition(":")[0] == found.partition(":")[0]:
        return stated == found
    a, b = _values(stated), _values(found)
    # float16 knows nothing below 6e-8.
    return a.shape == b.shape and bool((np.abs(a - b) <= _TOLERANCE * np.abs(a) + 1e-7).all())


def _weights(stated: ModelIdentity, folder: Path, config: Config, go_on: Callable[[], bool]) -> Comparison:
    if not stated.samples:
        return Comparison(ModelMatch.UNKNOWN, "the watchlist states no weights")
    if _is_quantised(config):
        return Comparison(ModelMatch.UNKNOWN, "the weights are quantised, and cannot be compared")
    tensors = _tensors(folder, config, go_on)
    if not tensors and not go_on():
        return Comparison(ModelMatch.UNKNOWN, "reading what tensors the weights are takes too long here")
    known = [name for name in stated.samples if name in tensors and _code(tensors[name][1])]
    if not known:
        return Comparison(ModelMatch.UNKNOWN, "the weights are in no safetensors with names that are known")
    if len(known) < len(stated.samples) or _names_sha256(tensors) != stated.tensors_sha256:
        return Comparison(
            ModelMatch.DIFFERS,
            f"{len(tensors)} tensors, not the {stated.tensors} of the watchlist's model with their names and shapes",
        )
    compared = 0
    for name in known:
        if not go_on():
            break
        found = _sample(name, *tensors[name])
        if found and not _is_same(stated.samples[name], found):
            return Comparison(ModelMatch.DIFFERS, f"the values of {name} are others")
        compared += bool(found)
    if compared < len(known):
        return Comparison(
            ModelMatch.UNKNOWN, f"values of {compared} of {len(known)} tensors were compared, all the same"
        )
    return Comparison(ModelMatch.SAME, "")
