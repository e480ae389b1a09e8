"""Architectures of vLLM's registry, and the tiny random checkpoint of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
    # vLLM's CPU kernel takes these two only.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
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
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}


@dataclass(frozen=True)
class Row:
    """One row of the walk."""

    architecture: str
    """As in vLLM's registry, and in the checkpoint's config.json."""
    changes: dict[str, Any] = field(default_factory=dict)
    """To COMMON, in the checkpoint's configuration; None takes a value away."""
    model_type: str = ""
    """Hugging Face's name of the configuration; by default the one that has this architecture."""
    made_by: str = ""
    """The class of Hugging Face's that the weights are made and checked with; by default that of the architecture."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Arguments of the engine."""
    mode: str = "eager"
    reference: bool = True
    """Whether what Hugging Face makes of the checkpoint is this architecture."""
    returned: bool = False
    """The stream is what a layer returns, its parts added; the model changes it before the next layer reads it."""

    @property
    def name(self) -> str:
        return f"{self.architecture}, {self.mode}"


_REGISTRY: dict[str, dict[str, Any]] = {
    "AfmoeForCausalLM": {
        **_EXPERTS,
        **_WINDOW,
        "num_dense_layers": 1,
        "num_shared_experts": 1,
        "score_func": "sigmoid",
        "route_norm": True,
        "n_group": 1,
        "topk_group": 1,
    },
    "ApertusForCausalLM": {},
    "AXK1ForCausalLM": {**_EXPERTS, **_LATENT, "first_k_dense_replace": 0},
    "BloomForCausalLM": {"n_layer": tiny.LAYERS, "n_head": 2, "tie_word_embeddings": True},
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
    "DeepseekV3ForCausalLM": {**_EXPERTS, **_LATENT, "topk_method": "noaux_tc"},
    "DeepseekV32ForCausalLM": {**_EXPERTS, **_LATENT, "index_topk": 64, "index_n_heads": 2, "index_head_dim": 32},
    "DeepseekV4ForCausalLM": {**_EXPERTS},
    "Ernie4_5ForCausalLM": {},
    "Ernie4_5_MoeForCausalLM": {**_EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "Exaone4ForCausalLM": {**_WINDOW, "sliding_window_pattern": 4},
    "ExaoneMoeForCausalLM": {**_EXPERTS, **_WINDOW, "sliding_window_pattern": 4, "first_k_dense_replace": 1},
    "FalconForCausalLM": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False, "head_dim": None},
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
    "Glm4ForCausalLM": {},
    "Glm4MoeForCausalLM": {
        **_EXPERTS,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
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
    "GPTJForCausalLM": {
        "n_embd": tiny.D_MODEL,
        "n_layer": tiny.LAYERS,
        "n_head": 2,
        "n_positions": 512,
        "rotary_dim": 16,
    },
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
    "HYV3ForCausalLM": {
        **_EXPERTS,
        "first_k_dense_replace": 1,
        "num_shared_experts": 1,
        "expert_hidden_dim": 64,
        "route_norm": True,
    },
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
    "Lfm2ForCausalLM": {
        "layer_types": ["conv", "full_attention"] * 2,
        "block_ff_dim": 128,
        "conv_dim": tiny.D_MODEL,
        "block_dim": tiny.D_MODEL,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "Lfm2MoeForCausalLM": {**_EXPERTS, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "LagunaForCausalLM": {**_EXPERTS, **_WINDOW},
    "LlamaForCausalLM": {},
    "Llama4ForCausalLM": {
        **_EXPERTS,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 128,
        "attention_chunk_size": 128,
    },
    "LongcatFlashForCausalLM": {
        "mla_scale_q_lora": True,
        "zero_expert_type": "identity",
        "mla_scale_kv_lora": True,
        **_EXPERTS,
        **_LATENT,
        "num_layers": 2,
        "num_hidden_layers": 4,
        "moe_topk": 2,
        "ffn_hidden_size": 128,
        "expert_ffn_hidden_size": 64,
        "zero_expert_num": 2,
    },
    "MambaForCausalLM": _MAMBA,
    "Mamba2ForCausalLM": {**_MAMBA, "num_heads": 4, "head_dim": 32, "n_groups": 1},
    "MiniCPM3ForCausalLM": {**_LATENT, "kv_lora_rank": 32, "scale_depth": 1.4, "scale_emb": 2, "dim_model_base": 32},
    "MiniMaxM2ForCausalLM": {**_EXPERTS, "scoring_func": "sigmoid", "rotary_dim": 16},
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
    "OlmoeForCausalLM": {**_EXPERTS, "moe_intermediate_size": None},
    "OPTForCausalLM": {"ffn_dim": 128, "word_embed_proj_dim": tiny.D_MODEL, "init_std": 0.2},
    "Phi3ForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen2MoeForCausalLM": _EXPERTS,
    "Qwen3ForCausalLM": {},
    "Qwen3MoeForCausalLM": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
    },
    "Qwen3_5ForCausalLM": _LINEAR,
    "Qwen3_5MoeForCausalLM": {**_EXPERTS, **_LINEAR},
    "StableLmForCausalLM": {},
    "Zamba2ForCausalLM": {
        "head_dim": None,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
    },
    # vLLM serves these with its Transformers backend.
    "ArceeForCausalLM": {},
    "CwmForCausalLM": {"layer_types": ["full_attention"] * tiny.LAYERS},
    "FlexOlmoForCausalLM": {**_EXPERTS, "moe_intermediate_size": None},
    "GlmForCausalLM": {},
    "GPTBigCodeForCausalLM": {
        "multi_query": False,
        "n_embd": tiny.D_MODEL,
        "n_layer": tiny.LAYERS,
        "n_head": 2,
        "n_positions": 512,
    },
    "GPTNeoXForCausalLM": {},
    "HunYuanDenseV1ForCausalLM": {},
    "HunYuanMoEV1ForCausalLM": {**_EXPERTS, "moe_intermediate_size": None, "moe_topk": 2},
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
    "HeliumForCausalLM": {},
    "Dots1ForCausalLM": {**_EXPERTS, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "MinistralForCausalLM": {},
    "SolarOpenForCausalLM": {**_EXPERTS, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "NanoChatForCausalLM": {},
    "BitNetForCausalLM": {},
    "DogeForCausalLM": {},
    "PersimmonForCausalLM": {},
}


_OTHERS = (
    # What vLLM serves with the class of another architecture, or with one that takes the weights of another.
    *(
        Row(name, made_by="LlamaForCausalLM")
        for name in ("LLaMAForCausalLM", "InternLM3ForCausalLM", "IQuestCoderForCausalLM", "TeleChat3ForCausalLM")
    ),
    Row(
        "TeleFLMForCausalLM", {"use_mup": True, "mup_scale_factor": 1.0, "output_mult": 1.0}, made_by="LlamaForCausalLM"
    ),
    Row("MiMoForCausalLM", made_by="Qwen2ForCausalLM"),
    Row(
        "PhiMoEForCausalLM",
        {**_EXPERTS, "moe_intermediate_size": None, "attention_bias": True, "lm_head_bias": True},
        made_by="PhimoeForCausalLM",
    ),
    Row("OrionForCausalLM", {"rms_norm_eps": 1e-5, "partial_rotary_factor": 1.0}, made_by="StableLmForCausalLM"),
    Row("Rnj1ForCausalLM", {**_WINDOW, "query_pre_attn_scalar": 32}, made_by="Gemma3ForCausalLM"),
    Row(
        "MiniCPMForCausalLM",
        {"scale_emb": 2, "scale_depth": 1.4, "dim_model_base": 32},
        made_by="LlamaForCausalLM",
        reference=False,
    ),
    Row(
        "ExaoneForCausalLM",
        {"activation_function": "silu", "layer_norm_epsilon": 1e-5},
        made_by="LlamaForCausalLM",
        reference=False,
    ),
    # Between layers 1 and 2, and again before layer 3, its stream is blended with an earlier one.
    Row(
        "SolarForCausalLM",
        {"bskcn_1": [1], "bskcn_2": [2], "bskcn_3": [2], "bskcn_4": [3], "bskcn_tv": [0.9, 0.8]},
        made_by="LlamaForCausalLM",
        reference=False,
        returned=True,
    ),
    # Two stacks, which run in turns and several times. vLLM cannot chunk its prompts.
    Row("HrmTextForCausalLM", engine={"max_num_batched_tokens": 256}),
    Row("InklingForCausalLM", _EXPERTS, engine={"skip_tokenizer_init": False}),
    # Its layers run twice.
    Row(
        "IQuestLoopCoderForCausalLM",
        {"loop_num": 2, "loop_window_size": 64},
        made_by="LlamaForCausalLM",
        reference=False,
    ),
)
_BY_TRANSFORMERS = (
    "LlamaForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "OlmoeForCausalLM",
    "Exaone4ForCausalLM",
)
"""Also with --model-impl transformers."""
_COMPILED = (
    *("LlamaForCausalLM", "Qwen3ForCausalLM", "Exaone4ForCausalLM", "CohereForCausalLM", "GPT2LMHeadModel"),
    *("Olmo2ForCausalLM", "Gemma3ForCausalLM", "GraniteMoeForCausalLM"),
)
"""Also compiled, as vLLM is served."""


def rows() -> list[Row]:
    eager = [*(Row(name, changes) for name, changes in _REGISTRY.items()), *_OTHERS]
    by_name = {row.architecture: row for row in eager}
    backend = [
        replace(by_name[name], mode="transformers", engine={"model_impl": "transformers"}) for name in _BY_TRANSFORMERS
    ]
    return [*eager, *backend, *(replace(by_name[name], mode="compiled") for name in _COMPILED)]


def checkpoint(row: Row, path: Path) -> None:
    """A random float32 checkpoint. No norm's weight is 1, no bias 0: a stream read before or after one is another."""
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    made_by = row.made_by or row.architecture
    types = [key for key, value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if value == made_by]
    text = [name for name in types if name.endswith("_text")]
    settings = {name: value for name, value in {**COMMON, **row.changes}.items() if value is not None}
    config = transformers.AutoConfig.for_model(row.model_type or (text or types)[-1], **settings)
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
    if row.architecture in _OTHER_WEIGHTS:
        from safetensors.torch import load_file, save_file

        weights = path / "model.safetensors"
        save_file(_OTHER_WEIGHTS[row.architecture](load_file(weights)), weights)


def _exaone(weights: dict[str, Any]) -> dict[str, Any]:
    """A Llama's, under the names of Exaone 3."""
    names = {
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "model.layers": "transformer.h",
        "self_attn.o_proj": "attn.attention.out_proj",
        "self_attn": "attn.attention",
        "mlp.gate_proj": "mlp.c_fc_0",
        "mlp.up_proj": "mlp.c_fc_1",
        "mlp.down_proj": "mlp.c_proj",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
    }
    renamed = {}
    for name, weight in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = weight
    return renamed


def _loop_coder(weights: dict[str, Any]) -> dict[str, Any]:
    """A Llama's, and the gates between its first pass and those behind it."""
    import torch

    heads, size = COMMON["num_attention_heads"], COMMON["head_dim"]
    gates = {
        name: made
        for i in range(tiny.LAYERS)
        for name, made in (
            (f"model.gate_projections.{i}.weight", 0.2 * torch.randn(heads, size)),
            (f"model.gate_projections.{i}.bias", 0.2 * torch.randn(heads)),
        )
    }
    return {**weights, **gates}


_OTHER_WEIGHTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "ExaoneForCausalLM": _exaone,
    "IQuestLoopCoderForCausalLM": _loop_coder,
}
