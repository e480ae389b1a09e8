"""Architectures of vLLM's registry, and the tiny random checkpoint of each: what its configuration has beside COMMON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    # Large enough that the residual stream differs between positions and layers by more than rounding.
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_MAMBA = {"state_size": 16, "conv_kernel": 4, "expand": 2, "time_step_rank": 8}
_WINDOW = {"sliding_window": 64}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}


@dataclass(frozen=True)
class Row:
    """One row of the walk."""

    architecture: str
    """As in vLLM's registry, and in the checkpoint's config.json."""
    changes: dict[str, Any] = field(default_factory=dict)
    """To COMMON, in the checkpoint's configuration."""
    model_type: str = ""
    """Hugging Face's name of the configuration; by default the one that has this architecture."""
    made_by: str = ""
    """The class of Hugging Face's that the weights are made and checked with; by default that of the architecture."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Arguments of the engine."""
    mode: str = "eager"

    @property
    def name(self) -> str:
        return f"{self.architecture}, {self.mode}"


_REGISTRY: dict[str, dict[str, Any]] = {
    "AfmoeForCausalLM": {**_EXPERTS, **_WINDOW, "num_dense_layers": 1, "num_shared_experts": 1},
    "ApertusForCausalLM": {},
    "AXK1ForCausalLM": {**_EXPERTS, **_LATENT},
    "BloomForCausalLM": {"n_layer": tiny.LAYERS, "n_head": 2},
    "CohereForCausalLM": {"logit_scale": 1.0},
    "Cohere2ForCausalLM": {"logit_scale": 1.0, **_WINDOW},
    "Cohere2MoeForCausalLM": {**_EXPERTS, **_WINDOW},
    "DbrxForCausalLM": {
        "d_model": tiny.D_MODEL,
        "n_heads": 2,
        "n_layers": tiny.LAYERS,
        "max_seq_len": 512,
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "DeepseekV2ForCausalLM": {**_EXPERTS, **_LATENT, "topk_method": "greedy"},
    "DeepseekV3ForCausalLM": {**_EXPERTS, **_LATENT},
    "DeepseekV32ForCausalLM": {**_EXPERTS, **_LATENT, "index_topk": 64, "index_n_heads": 2, "index_head_dim": 32},
    "DeepseekV4ForCausalLM": {**_EXPERTS},
    "Ernie4_5ForCausalLM": {},
    "Ernie4_5_MoeForCausalLM": {**_EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "Exaone4ForCausalLM": {**_WINDOW, "sliding_window_pattern": 4},
    "ExaoneMoeForCausalLM": {**_EXPERTS, **_WINDOW, "sliding_window_pattern": "LLLG", "first_k_dense_replace": 1},
    "FalconForCausalLM": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False},
    "FalconMambaForCausalLM": _MAMBA,
    "FalconH1ForCausalLM": {
        "mamba_d_ssm": 128,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
    },
    "GemmaForCausalLM": {"tie_word_embeddings": True},
    "Gemma2ForCausalLM": {"query_pre_attn_scalar": 32, **_WINDOW, "tie_word_embeddings": True},
    "Gemma3ForCausalLM": {"query_pre_attn_scalar": 32, **_WINDOW, "tie_word_embeddings": True},
    "Gemma3nForCausalLM": {
        "vocab_size_per_layer_input": tiny.VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * tiny.LAYERS,
        "intermediate_size": [128] * tiny.LAYERS,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "tie_word_embeddings": True,
        **_WINDOW,
    },
    "Gemma4ForCausalLM": {
        "vocab_size_per_layer_input": tiny.VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 32,
        "tie_word_embeddings": True,
        **_WINDOW,
    },
    "Qwen3NextForCausalLM": {**_EXPERTS, **_LINEAR},
    "Qwen4ExpForCausalLM": {**_EXPERTS},
    "Glm4ForCausalLM": {},
    "Glm4MoeForCausalLM": {**_EXPERTS, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "Glm4MoeLiteForCausalLM": {**_EXPERTS, **_LATENT},
    "GlmMoeDsaForCausalLM": {**_EXPERTS, **_LATENT, "index_topk": 64, "index_n_heads": 2, "index_head_dim": 32},
    "GptOssForCausalLM": {**_EXPERTS, **_WINDOW},
    "GPT2LMHeadModel": {
        "n_embd": tiny.D_MODEL,
        "n_layer": tiny.LAYERS,
        "n_head": 2,
        "n_positions": 512,
        "tie_word_embeddings": True,
    },
    "GPTJForCausalLM": {"n_embd": tiny.D_MODEL, "n_layer": tiny.LAYERS, "n_head": 2, "n_positions": 512, "rotary_dim": 16},
    "GraniteForCausalLM": {"residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "GraniteMoeForCausalLM": {**_EXPERTS, "residual_multiplier": 0.5},
    "GraniteMoeHybridForCausalLM": {
        **_EXPERTS,
        "layer_types": ["attention"] * tiny.LAYERS,
        "shared_intermediate_size": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
    },
    "GraniteMoeSharedForCausalLM": {**_EXPERTS, "shared_intermediate_size": 64},
    "GraniteMoeSWAForCausalLM": {**_EXPERTS, **_WINDOW, "shared_intermediate_size": 64},
    "GraniteSWAForCausalLM": _WINDOW,
    "HrmTextForCausalLM": {},
    "HYV3ForCausalLM": {**_EXPERTS},
    "HYV4ForCausalLM": {**_EXPERTS},
    "HyperCLOVAXForCausalLM": {},
    "JambaForCausalLM": {
        **_EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 8,
    },
    "KimiLinearForCausalLM": {**_EXPERTS, **_LATENT},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 128},
    "Lfm2MoeForCausalLM": {**_EXPERTS, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "LagunaForCausalLM": {**_EXPERTS, **_WINDOW},
    "LlamaForCausalLM": {},
    "Llama4ForCausalLM": {**_EXPERTS, "intermediate_size_mlp": 128, "attention_chunk_size": 128},
    "LongcatFlashForCausalLM": {**_EXPERTS, **_LATENT, "num_layers": 2, "num_hidden_layers": 4, "moe_topk": 2, "ffn_hidden_size": 128, "expert_ffn_hidden_size": 64, "zero_expert_num": 2},
    "MambaForCausalLM": _MAMBA,
    "Mamba2ForCausalLM": {**_MAMBA, "num_heads": 4, "head_dim": 32, "n_groups": 1},
    "MiniCPM3ForCausalLM": {**_LATENT, "scale_depth": 1.4, "scale_emb": 2, "dim_model_base": 32},
    "MiniMaxM2ForCausalLM": {**_EXPERTS, "rotary_dim": 16},
    "InklingForCausalLM": {**_EXPERTS},
    "Ministral3ForCausalLM": {},
    "MistralForCausalLM": {},
    "MixtralForCausalLM": _EXPERTS,
    "MiMoV2FlashForCausalLM": {**_EXPERTS, **_WINDOW},
    "NemotronForCausalLM": {},
    "NemotronHForCausalLM": {
        "hybrid_override_pattern": "M-*-",
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "ssm_state_size": 16,
    },
    "OlmoHybridForCausalLM": {**_LINEAR},
    "OlmoeForCausalLM": _EXPERTS,
    "OPTForCausalLM": {"ffn_dim": 128, "word_embed_proj_dim": tiny.D_MODEL, "init_std": 0.2},
    "Phi3ForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen2MoeForCausalLM": _EXPERTS,
    "Qwen3ForCausalLM": {},
    "Qwen3MoeForCausalLM": _EXPERTS,
    "Qwen3_5ForCausalLM": _LINEAR,
    "Qwen3_5MoeForCausalLM": {**_EXPERTS, **_LINEAR},
    "StableLmForCausalLM": {},
    "Zamba2ForCausalLM": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
    },
    # vLLM serves these with its Transformers backend.
    "ArceeForCausalLM": {},
    "CwmForCausalLM": {"layer_types": ["full_attention"] * tiny.LAYERS},
    "FlexOlmoForCausalLM": _EXPERTS,
    "GlmForCausalLM": {},
    "GPTBigCodeForCausalLM": {"n_embd": tiny.D_MODEL, "n_layer": tiny.LAYERS, "n_head": 2, "n_positions": 512},
    "GPTNeoXForCausalLM": {},
    "HunYuanDenseV1ForCausalLM": {},
    "HunYuanMoEV1ForCausalLM": {**_EXPERTS, "moe_topk": 2},
    "Jais2ForCausalLM": {},
    "MellumForCausalLM": {**_EXPERTS},
    "OlmoForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "Olmo3ForCausalLM": _WINDOW,
    "PhiForCausalLM": {},
    "SeedOssForCausalLM": {},
    "SmolLM3ForCausalLM": {},
    "Starcoder2ForCausalLM": {},
    "VaultGemmaForCausalLM": {"query_pre_attn_scalar": 32, **_WINDOW},
    # In no registry of vLLM's, but the Transformers backend takes what its interface fits.
    "DiffLlamaForCausalLM": {},
    "HeliumForCausalLM": {},
    "Dots1ForCausalLM": {**_EXPERTS, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "MinistralForCausalLM": {},
    "SolarOpenForCausalLM": {**_EXPERTS, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "NanoChatForCausalLM": {},
    "BitNetForCausalLM": {},
    "DogeForCausalLM": {},
    "YoutuForCausalLM": _LATENT,
    "PhimoeForCausalLM": _EXPERTS,
    "PersimmonForCausalLM": {},
    "GPTNeoForCausalLM": {"num_layers": tiny.LAYERS, "num_heads": 2, "attention_types": [[["global", "local"], 2]]},
    "CodeGenForCausalLM": {"n_embd": tiny.D_MODEL, "n_layer": tiny.LAYERS, "n_head": 4, "n_positions": 512, "rotary_dim": 8},
    "XGLMForCausalLM": {"d_model": tiny.D_MODEL, "ffn_dim": 128, "num_layers": tiny.LAYERS, "attention_heads": 2},
    "BioGptForCausalLM": {},
    "ModernBertDecoderForCausalLM": {},
    "MptForCausalLM": {"d_model": tiny.D_MODEL, "n_heads": 2, "n_layers": tiny.LAYERS, "max_seq_len": 512},
    "JetMoeForCausalLM": {**_EXPERTS, "kv_channels": 32},
    "BambaForCausalLM": {"attn_layer_indices": [1, 3], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16},
    "AriaTextForCausalLM": {"moe_num_experts": 4, "moe_topk": 2},
    "MiniMaxForCausalLM": {**_EXPERTS},
}


def rows() -> list[Row]:
    return [Row(name, changes) for name, changes in _REGISTRY.items()]


def checkpoint(row: Row, path: Path) -> None:
    """A random float32 checkpoint. No norm's weight is 1, no bias 0: a stream read before or after one is another."""
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    made_by = row.made_by or row.architecture
    types = [key for key, value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if value == made_by]
    text = [name for name in types if name.endswith("_text")]
    config = transformers.AutoConfig.for_model(row.model_type or (text or types)[-1], **{**COMMON, **row.changes})
    config.architectures = [row.architecture]
    torch.manual_seed(0)
    model: Any = getattr(transformers, made_by)(config).float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.2 * torch.randn_like(weight)
    model.save_pretrained(path)
    tiny.save_tokenizer(path)
    if row.made_by:
        written = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**written, "architectures": [row.architecture]}))
