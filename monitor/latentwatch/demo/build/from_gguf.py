"""A GGUF file as a Hugging Face folder in float32, which transformers and vLLM load: weights, tokenizer, chat template.

transformers reads such files too, but then does not save them, and it cuts digits as GPT-2 does whatever the file says.
Quantised weights are multiplied out by gguf, llama.cpp's own package; nothing is fitted or rounded again.

Shape legend: O outputs, I inputs of a matrix.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import filelock
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file

from latentwatch.arrays import F32
from latentwatch.demo.build.gguf_tokenizers import Facts, UnknownPart, write_tokenizer
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.storage import sync_file, sync_folder

VERSION: Final = 1
"""Of what is written: another one never finds a folder of this one in the cache."""
WAIT_SECONDS: Final = 300.0
"""How long to wait for another process that converts into the same cache."""
_BLOCK: Final = 1 << 20


@dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture is named at Hugging Face."""

    config: Mapping[str, str]
    """Keys of config.json by the file's own, which stand behind the architecture's name."""
    constants: Mapping[str, Any]
    """What config.json says of every model of it."""
    layer: Mapping[str, str]
    """Parameters of a layer."""
    ignored: frozenset[str]
    """Keys that change nothing, or are checked elsewhere."""
    interleaved: Mapping[str, str]
    """Weights whose rows llama.cpp orders in another way, see `halved`; and which count of heads is theirs."""
    completed: Callable[[dict[str, Any]], dict[str, Any]]
    """What config.json says besides, by what the file said; it takes `rope_theta` out."""
    norm_added: float = 0.0
    """What llama.cpp's converter adds to the weights of norms, because the model itself adds it as it runs."""


def _one_rope(config: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": config.pop("rope_theta", 10000.0)}}


def _gemma3_layers(config: dict[str, Any]) -> dict[str, Any]:
    """Every sixth layer sees the whole context; llama.cpp has pattern, local base and scale in its code."""
    layers = config["num_hidden_layers"]
    if layers == GEMMA3_27B_LAYERS:
        scale = config["hidden_size"] // config["num_attention_heads"]
    else:
        scale = config["head_dim"]
    kinds = {"full_attention": config.pop("rope_theta", 1e6), "sliding_attention": 1e4}
    return {
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)],
        "query_pre_attn_scalar": scale,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in kinds.items()},
    }


GEMMA3_27B_LAYERS: Final = 62
"""The one Gemma 3 that scales its queries by the width of the stream for each head."""
LLAMA: Final = Architecture(
    config={
        "vocab_size": "vocab_size",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "block_count": "num_hidden_layers",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "context_length": "max_position_embeddings",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "rope.freq_base": "rope_theta",
    },
    constants={"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"},
    layer={
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    },
    ignored=frozenset({"rope.dimension_count", "attention.value_length"}),
    interleaved={"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"},
    completed=_one_rope,
)
GEMMA3: Final = Architecture(
    config={**LLAMA.config, "attention.sliding_window": "sliding_window"},
    constants={
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
    },
    layer={
        **LLAMA.layer,
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    ignored=frozenset({"attention.value_length"}),
    interleaved={},
    completed=_gemma3_layers,
    norm_added=1.0,
)
ARCHITECTURES: Final[Mapping[str, Architecture]] = {"llama": LLAMA, "gemma3": GEMMA3}
_OUTSIDE_LAYERS: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def installed_file(distribution: str, suffix: str = ".gguf") -> Path:
    """The one file with this suffix that an installed distribution brought; nothing of it is imported.

    Raises: ConfigRefused, reason "model_file": it is not installed, or has none or several.
    """
    try:
        listed = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise _refused(
            f"model of {distribution}", "the package is not installed in this environment", _INSTALL
        ) from None
    found = [Path(str(file.locate())) for file in listed if file.name.endswith(suffix)]
    if len(found) != 1 or not found[0].is_file():
        raise _refused(f"model of {distribution}", f"{len(found)} files *{suffix} in the package, not one", _INSTALL)
    return found[0]


def folder_of(file: Path, cache: Path) -> Path:
    """The Hugging Face folder of a GGUF file, made where this cache has none of the same content.

    It is there whole or not at all: what a kill left half done is removed and made again.

    Raises: ConfigRefused, reason "model_file": the file cannot be read, or is of an architecture, a tokenizer or with a
            tensor that is not known here; the cache cannot be written.
    """
    try:
        folder = cache / f"{file.stem}-{_digest(file)}-{VERSION}"
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / f"{folder.name}.lock", timeout=WAIT_SECONDS):
            if not folder.is_dir():
                _convert_into(file, folder)
    except (OSError, filelock.Timeout) as error:
        raise _refused(f"model {file}", f"{type(error).__name__}: {error}", "Check the file and the cache.") from error
    return folder


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file as a Hugging Face folder in float32, into an empty folder. Raises as folder_of, OSError."""
    what = f"model {file}"
    try:
        reader = GGUFReader(file)
        facts: Facts = {field.name: field.contents() for field in reader.fields.values()}
        name = facts["general.architecture"]
        if name not in ARCHITECTURES:
            raise _refused(what, f"architecture {name!r}", f"Known are: {', '.join(ARCHITECTURES)}.")
        tensors = weights(reader, ARCHITECTURES[name], facts)
        config = config_of(facts, ARCHITECTURES[name], tied="lm_head.weight" not in tensors)
        write_tokenizer(facts, folder)
    except UnknownPart as error:
        raise _refused(what, str(error), "Convert it with the tools of its makers.") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        # gguf and NumPy raise many kinds between them; all mean a damaged file, or one that lacks what is needed.
        raise _refused(what, f"not a whole GGUF file of a model ({type(error).__name__}: {error})", _INSTALL) from error
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for path, content in (
        ("config.json", config),
        ("generation_config.json", {key: config[key] for key in config if key.endswith("_token_id")}),
    ):
        (folder / path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def config_of(facts: Facts, architecture: Architecture, *, tied: bool) -> dict[str, Any]:
    """The content of config.json. Raises UnknownPart: a key of the architecture that is not known here."""
    prefix = facts["general.architecture"] + "."
    said = {key.removeprefix(prefix): value for key, value in facts.items() if key.startswith(prefix)}
    if strange := sorted(set(said) - set(architecture.config) - architecture.ignored):
        raise UnknownPart(f"the key {prefix}{strange[0]} is not known here")
    config = {name: said[key] for key, name in architecture.config.items() if key in said}
    if "rms_norm_eps" in config:
        # Stored in float32: 1e-05 comes out as 9.999999747378752e-06.
        config["rms_norm_eps"] = float(str(np.float32(config["rms_norm_eps"])))
    ids = {
        f"{name}_token_id": facts[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in facts
    }
    config |= {"vocab_size": len(facts["tokenizer.ggml.tokens"])} if "vocab_size" not in config else {}
    config |= architecture.completed(config)
    return {**architecture.constants, **config, **ids, "tie_word_embeddings": tied, "dtype": "float32"}


def weights(reader: GGUFReader, architecture: Architecture, facts: Facts) -> dict[str, F32]:
    """Every tensor in float32 under its name at Hugging Face. Raises UnknownPart: a tensor that is not known here."""
    found: dict[str, F32] = {}
    for tensor in reader.tensors:
        value: F32 = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if tensor.name.endswith("norm.weight"):
            value = value - np.float32(architecture.norm_added)
        if tensor.name in _OUTSIDE_LAYERS:
            found[_OUTSIDE_LAYERS[tensor.name]] = value
            continue
        part, *rest = tensor.name.split(".")
        if part != "blk" or len(rest) != 3 or rest[1] not in architecture.layer or rest[2] != "weight":
            raise UnknownPart(f"the tensor {tensor.name} is not known here")
        number, kind, _ = rest
        if kind in architecture.interleaved:
            value = halved(value, int(facts[f"{facts['general.architecture']}.{architecture.interleaved[kind]}"]))
        found[f"model.layers.{number}.{architecture.layer[kind]}.weight"] = value
    return found


def halved(weight_OI: F32, heads: int) -> F32:
    """Rows of a query or key projection in Hugging Face's order.

    The rotary embedding turns pairs of outputs of a head: (0, 1), (2, 3), ... in llama.cpp, (0, n/2), (1, n/2 + 1), ...
    at Hugging Face.
    """
    outputs, inputs = weight_OI.shape
    pairs = weight_OI.reshape(heads, outputs // heads // 2, 2, inputs)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(outputs, inputs))


def _convert_into(file: Path, folder: Path) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        convert(file, partial)
        for path in partial.iterdir():
            sync_file(path)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_folder(folder.parent)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()[:16]


_INSTALL: Final = "Run 'make demo', or install .requirements/real.txt with --no-deps --require-hashes."


def _refused(what: str, found: str, instead: str) -> ConfigRefused:
    return ConfigRefused(what, found=found, instead=instead, reason=RefusalReason.MODEL_FILE)
