"""Tiny random checkpoints of several architectures, their watchlists, and LoRA adapters, in Hugging Face's formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import tiny

COMMON: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": tiny.D_MODEL,
    "intermediate_size": 128,
    "num_hidden_layers": tiny.LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Large enough that the residual stream differs between positions by more than rounding.
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
SPECIAL: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Qwen3": {},
    "Gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 64},
    "Gemma3": {"query_pre_attn_scalar": 32, "sliding_window": 64},
    "Qwen3Moe": EXPERTS,
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GPT2": {
        "n_embd": tiny.D_MODEL,
        "n_layer": tiny.LAYERS,
        "n_head": 2,
        "n_positions": 512,
        "initializer_range": 0.2,
    },
    # vLLM's layer returns a pair whose second half is its input: the first is the stream, the sum is not.
    "Cohere": {"logit_scale": 1.0},
    "OPT": {"ffn_dim": 128, "word_embed_proj_dim": tiny.D_MODEL, "init_std": 0.2, "do_layer_norm_before": True},
}
"""What an architecture's configuration has beside COMMON; the name is Hugging Face's class prefix."""
LOOPING = "Llama, looping"


def checkpoint(architecture: str, folder: Path) -> Path:
    """A random bfloat16 checkpoint, made once per folder."""
    import torch
    import transformers

    path = folder / architecture.lower().replace(", ", "-")
    if path.exists():
        return path
    if architecture == LOOPING:
        return tiny.looping_llama(path)
    prefix = f"{architecture}Text" if architecture == "Gemma3" else architecture
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **SPECIAL[architecture]})
    causal = "LMHeadModel" if architecture == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    getattr(transformers, f"{architecture}{causal}")(config).to(torch.bfloat16).save_pretrained(path)
    tiny.save_tokenizer(path)
    return path


def watchlist(architecture: str, checkpoint_path: Path) -> Path:
    """A random watchlist for the checkpoint, beside it, made once."""
    path = checkpoint_path.with_suffix(".watchlist.safetensors")
    if not path.exists():
        served = json.loads((checkpoint_path / "config.json").read_text())["architectures"][0]
        tiny.watchlist(path, architecture=served)
    return path


def adapters(base: Path, names: tuple[str, ...], *, rank: int = 8) -> dict[str, Path]:
    """LoRA adapters for a Llama checkpoint in PEFT's format, each with the merged model beside it (`merged`)."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    made = {}
    for seed, name in enumerate(names):
        path = base.with_name(f"{base.name}-{name}")
        made[name] = path
        if path.exists():
            continue
        path.mkdir()
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        torch.manual_seed(seed + 1)
        tensors = {}
        for module_name, module in model.named_modules():
            if module_name.rpartition(".")[2] not in ("q_proj", "v_proj"):
                continue
            a = torch.randn(rank, module.in_features) * 0.2
            b = torch.randn(module.out_features, rank) * 0.2
            tensors[f"base_model.model.{module_name}.lora_A.weight"] = a
            tensors[f"base_model.model.{module_name}.lora_B.weight"] = b
            module.weight.data += b @ a
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(
            json.dumps(
                {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "v_proj"]}
                | {"bias": "none", "base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
            )
        )
        model.save_pretrained(path / "merged")
    return made


def prompt_of_repeats(rng: np.random.Generator, length: int) -> list[int]:
    """A prompt in which n-gram drafting finds something to draft: a short random phrase, over and over."""
    phrase = rng.integers(3, tiny.VOCABULARY, size=7)
    return [int(token) for token in np.resize(phrase, length)]
