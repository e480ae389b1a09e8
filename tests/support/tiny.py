"""Tiny random checkpoints and watchlists for engine tests: real files, real formats, a second to make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from latentwatch.names import HookPoint, Severity
from latentwatch.watchlist import file as watchlist_file

VOCABULARY = 512
D_MODEL = 64
LAYERS = 4


def llama(path: Path, seed: int = 0, **changes: Any) -> Path:
    """A random bfloat16 Llama in Hugging Face's format, without a tokenizer. `changes`: to its LlamaConfig."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": D_MODEL,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # Large enough that the residual stream differs between positions by more than bfloat16 noise.
        "initializer_range": 0.2,
    }
    LlamaForCausalLM(LlamaConfig(**{**config, **changes})).to(torch.bfloat16).save_pretrained(path)
    return path


def looping_llama(path: Path) -> Path:
    """A random Llama that mostly counts in circles of eight tokens: a drafter by n-grams is often right, never always.

    Large embeddings outweigh what the layers add, and the output head says of each token the next in its circle.
    """
    import torch
    from transformers import LlamaForCausalLM

    llama(path)
    model: Any = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight *= {"o_proj": 0.5, "down_proj": 0.5, "embed_tokens": 10.0}.get(name.split(".")[-2], 1.0)
        token = torch.arange(VOCABULARY)
        model.lm_head.weight[token // 8 * 8 + (token + 1) % 8] = model.model.embed_tokens.weight[token]
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def save_tokenizer(path: Path) -> None:
    """A word per token: servers and pooling models want a tokenizer, although every prompt comes as token ids."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    made.save_pretrained(path)


def watchlist(
    path: Path,
    *,
    layers: tuple[int, ...] = (1, 3),
    sparse: int = 12,
    dense: int = 2,
    d_model: int = D_MODEL,
    num_layers: int = LAYERS,
    threshold: float = 0.5,
    seed: int = 0,
    architecture: str = "LlamaForCausalLM",
) -> watchlist_file.Watchlist:
    """A random watchlist for `llama()`, or a model of its sizes: `sparse` gated features, `dense` probes a layer."""
    rng = np.random.default_rng(seed)
    hooks = []
    for layer in layers:
        K = sparse + dense
        w_KD = rng.normal(size=(K, d_model)).astype(np.float32) / np.sqrt(d_model)
        w_hi = watchlist_file.bf16_from_f32(w_KD)
        w_lo = watchlist_file.bf16_from_f32(w_KD - watchlist_file.f32_from_bf16(w_hi))
        scale = np.zeros((len(watchlist_file.SCALE_ROWS), K), np.float32)
        scale[0], scale[1], scale[2] = threshold, 1.0, rng.normal(size=K) * 0.1
        scale[[0, 3], sparse:] = -np.inf
        features = tuple(
            watchlist_file.Feature(
                id=f"l{layer}_{'f' if k < sparse else 'p'}{k}",
                label=f"random direction {k} of layer {layer}",
                severity=Severity.CRITICAL if k == sparse else Severity.INFO,
                kind="sae" if k < sparse else "probe",
                gate="exact" if k < sparse else "none",
                units="activation" if k < sparse else "logit",
                limit=watchlist_file.Limit("max", 2.0) if k % 3 == 0 else None,
                skip_first_positions=1,
            )
            for k in range(K)
        )
        hooks.append(watchlist_file.HookRows(HookPoint(layer), features, w_hi, w_lo, scale))
    model = watchlist_file.ModelCard("tiny", architecture, d_model, num_layers, VOCABULARY, ("bfloat16", "float32"))
    return watchlist_file.write(watchlist_file.Watchlist("tiny", model, tuple(hooks)), path)
