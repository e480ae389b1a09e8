"""Shapes of served models with dummy weights, and a watchlist that fires on 1 % of tokens whatever the weights.

Dimension key: K features at one hook point, D d_model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from latentwatch.names import HookPoint, Severity
from latentwatch.watchlist import file as watchlist_file

LLAMA_8B = "llama-3.1-8b"
MOE = "qwen3-30b-a3b-24-layers"
"""Qwen3-30B-A3B with half of its layers, so that two engines with 128 experts a layer fit one GPU."""
TINY = "tiny"
"""For the check without a GPU."""
FIRING_TAU = 2.326
"""A standard normal is above it in 1 % of draws."""
DENSE_PER_HOOK = 2


def config(name: str) -> Any:
    """The Hugging Face configuration of one shape."""
    from transformers import LlamaConfig, Qwen3MoeConfig

    if name == MOE:
        return Qwen3MoeConfig(
            architectures=["Qwen3MoeForCausalLM"],
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=24,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
            max_position_embeddings=8192,
            dtype="bfloat16",
        )
    shape = {
        LLAMA_8B: {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        TINY: {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2},
    }[name]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128256 if name == LLAMA_8B else 512,
        num_key_value_heads=8 if name == LLAMA_8B else 2,
        max_position_embeddings=8192,
        dtype="bfloat16",
        **shape,
    )


def write(name: str, folder: Path) -> Path:
    """A model folder without weights; vLLM fills them in with load_format="dummy"."""
    path = folder / name
    config(name).save_pretrained(path)
    return path


def watchlist(name: str, path: Path, *, features: int = 256, hook_points: int = 4) -> watchlist_file.Watchlist:
    """`features` random unit rows over evenly spread layers, on the stream scaled to sqrt(D): s is standard normal."""
    shape = config(name)
    rng = np.random.default_rng(0)
    layers = np.linspace(0, shape.num_hidden_layers - 2, hook_points).round().astype(int)
    hooks = tuple(
        _rows(int(layer), features // hook_points, shape.hidden_size, rng) for layer in dict.fromkeys(layers.tolist())
    )
    model = watchlist_file.ModelCard(
        name, shape.architectures[0], shape.hidden_size, shape.num_hidden_layers, shape.vocab_size, ("bfloat16",)
    )
    return watchlist_file.write(watchlist_file.Watchlist(f"bench-{name}", model, hooks), path)


def _rows(layer: int, K: int, D: int, rng: np.random.Generator) -> watchlist_file.HookRows:
    w_KD = rng.standard_normal((K, D)).astype(np.float32)
    w_KD /= np.linalg.norm(w_KD, axis=1, keepdims=True)
    hi_KD = watchlist_file.bf16_from_f32(w_KD)
    lo_KD = watchlist_file.bf16_from_f32(w_KD - watchlist_file.f32_from_bf16(hi_KD))
    scale_6K = np.zeros((len(watchlist_file.SCALE_ROWS), K), np.float32)
    scale_6K[watchlist_file.SCALE_ROWS.index("tau")] = FIRING_TAU
    scale_6K[watchlist_file.SCALE_ROWS.index("gain")] = 1.0
    scale_6K[watchlist_file.SCALE_ROWS.index("norm")] = watchlist_file.NORMS.index("constant_norm")
    for row in ("tau", "lo"):
        scale_6K[watchlist_file.SCALE_ROWS.index(row), :DENSE_PER_HOOK] = -np.inf
    features = tuple(
        watchlist_file.Feature(
            id=f"l{layer}_{k}",
            label="a random direction",
            severity=Severity.NONE,
            kind="direction",
            gate="none" if k < DENSE_PER_HOOK else "exact",
            units="standard deviations",
        )
        for k in range(K)
    )
    return watchlist_file.HookRows(HookPoint(layer), features, hi_KD, lo_KD, scale_6K)
