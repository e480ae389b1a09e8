"""cfg.json of SAELens, versions 3 to 6: every key that a version wrote, and what it means for activations.

A flat file was written before version 6; later ones have what concerns the model under `metadata`.
"""

from __future__ import annotations

import re
from typing import Final

from latentwatch.watchlist.declared import Known, passed_over
from latentwatch.watchlist.location import Config, Location
from latentwatch.watchlist.sources import refuse_architecture

_NOT_LINEAR: Final = {
    "abstopk": "it keeps the sign of the k largest magnitudes, which depends on every other feature",
    "temporal": "its features depend on earlier tokens",
    "matching_pursuit": "its features are chosen one after another",
}
_TRAINING_ONLY: Final = ("batchtopk", "matryoshka_batchtopk")
_DTYPES: Final = tuple(
    f"{prefix}{name}" for prefix in ("", "torch.") for name in ("float64", "float32", "float16", "bfloat16")
)

_PLACES: Final = Known(used=frozenset(("hook_name", "hf_hook_name", "hook_head_index", "hook_layer")))
_ABOUT_MODEL: Final = (
    Known(
        used=frozenset(("model_from_pretrained_kwargs", "sae_lens_version", "sae_lens_training_version")),
        only={"model_class_name": ("HookedTransformer", "AutoModelForCausalLM", None)},
    )
    | passed_over("a fact for people", "model_name", "neuronpedia_id", "dataset_path", "dataset_trust_remote_code")
    | passed_over("which tokens it saw; each is encoded alone", "prepend_bos", "context_size", "seqpos_slice")
    | passed_over("which tokens it saw; each is encoded alone", "exclude_special_tokens", "exclude_positions")
    | passed_over("which tokens it saw", "disable_concat_sequences", "sequence_separator_token")
    | passed_over("of the output", "hook_name_out", "hook_layer_out", "hook_head_index_out", "hf_hook_name_out")
    | passed_over("how it was trained", "training_architecture", "training_architecture_details")
    | passed_over("measured on its training data", "l0", "num_dead_features", "explained_variance")
)
_LOADED: Final = Known(used=frozenset(("center_writing_weights",))) | passed_over(
    "it leaves the residual stream as it is",
    *("center_unembed", "fold_ln", "fold_value_biases", "refactor_factored_attn_matrices", "default_prepend_bos"),
    *("device", "n_devices", "dtype", "torch_dtype", "device_map", "cache_dir", "trust_remote_code", "move_to_device"),
    *("default_padding_side", "local_files_only", "attn_implementation", "token"),
)
_ENCODER: Final = Known(
    used=frozenset(("architecture", "d_in", "d_sae", "apply_b_dec_to_input", "normalize_activations", "dtype"))
    | {"reshape_activations"},
    unread={"device": "where it was computed"},
)
_CHECKPOINT: Final = passed_over(
    "how it was trained; version 6 leaves it in checkpoints",
    *("decoder_init_norm", "l1_coefficient", "lp_norm", "l1_warm_up_steps", "use_sparse_activations"),
    *("aux_loss_coefficient", "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode"),
    *("l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient", "jumprelu_tanh_scale", "target_l0"),
    *("jumprelu_ste_to_input",),
)
_TOPK: Final = Known(used=frozenset(("k", "rescale_acts_by_decoder_norm")))
_NOT_TOPK: Final = Known(only={"rescale_acts_by_decoder_norm": (False,)})
_TRANSCODER: Final = Known(used=frozenset(("d_out",)))
_FLAT: Final = Known(
    used=frozenset(("hook_point", "hook_point_layer", "hook_point_head_index"))
    | {"activation_fn", "activation_fn_str", "activation_fn_kwargs"},
    unread={"finetuning_scaling_factor": "it scales the decoder's input", "finetuning_method": "of the decoder"},
) | passed_over(
    "how it was trained, and of what",
    *("hook_eval", "streaming", "is_dataset_tokenized", "use_cached_activations", "cached_activations_path"),
    *("new_cached_activations_path", "b_dec_init_method", "expansion_factor", "normalize_sae_decoder", "noise_factor"),
    *("from_pretrained_path", "decoder_orthogonal_init", "decoder_heuristic_init", "decoder_heuristic_init_norm"),
    *("init_encoder_as_decoder_transpose", "n_batches_in_buffer", "training_tokens", "total_training_tokens"),
    *("finetuning_tokens", "store_batch_size_prompts", "store_batch_size", "act_store_device", "seed", "autocast"),
    *("autocast_lm", "autocast_sae", "compile_llm", "llm_compilation_mode", "compile_sae", "sae_compilation_mode"),
    *("train_batch_size_tokens", "train_batch_size", "adam_beta1", "adam_beta2", "mse_loss_normalization"),
    *("l1_coefficient", "lp_norm", "scale_sparsity_penalty_by_decoder_norm", "l1_warm_up_steps", "lr", "lr_end"),
    *("lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps", "n_restart_cycles", "use_ghost_grads"),
    *("feature_sampling_window", "dead_feature_window", "dead_feature_threshold", "dead_feature_estimation_method"),
    *("feature_sampling_method", "resample_batches", "feature_reinit_scale", "n_eval_batches"),
    *("eval_batch_size_prompts", "n_eval_seqs", "log_to_wandb", "log_activations_store_to_wandb", "wandb_project"),
    *("log_optimizer_state_to_wandb", "wandb_id", "wandb_entity", "wandb_log_frequency", "eval_every_n_wandb_logs"),
    *("run_name", "resume", "n_checkpoints", "checkpoint_path", "verbose", "model_kwargs", "tokens_per_buffer"),
    *("n_training_tokens", "sae_set", "jumprelu_init_threshold", "jumprelu_bandwidth", "unique_id"),
    *("activations_mixing_fraction", "ghost_grads"),
)
_TOPK_FN: Final = Known(used=frozenset(("k",)))


class SaelensConfig:
    """cfg.json of any version, read as version 6 reads it.

    Raises: WatchlistRefused: a key that no version writes for this architecture, or a value that is not read exactly.
    """

    def __init__(self, location: Location) -> None:
        self._location = location
        raw = location.json("cfg.json")
        version = raw.get("sae_lens_version")
        metadata = raw.get("metadata")
        if not version and isinstance(metadata, dict):
            version = metadata.get("sae_lens_version")
        major = str(version or "0").split(".")[0]
        self.flat = not major.isdigit() or int(major) < 6
        """Written before version 6: names and defaults differ."""
        self.architecture = self._architecture(raw)
        self.transcoder = "transcoder" in self.architecture
        self.skips = "skip" in self.architecture
        self._check_linear()  # before the keys, of which an architecture that cannot be watched has its own
        about = _PLACES | _ABOUT_MODEL
        known = _ENCODER | (_TOPK if self.architecture == "topk" else _NOT_TOPK)
        known |= _TRANSCODER if self.transcoder else Known()
        known |= (_FLAT | about) if self.flat else (Known(used=frozenset(("metadata",))) | _CHECKPOINT)
        self.top = Config(location, "cfg.json", raw, known)
        self.metadata = self.top if self.flat else self.top.section("metadata", about)
        self.places = self._places()

    def _architecture(self, raw: dict[str, object]) -> str:
        """Read before the keys are checked, since it says which keys there may be."""
        architecture = raw.get("architecture", "standard" if self.flat else None)
        if not isinstance(architecture, str):
            raise self._location.refuse(f"cfg.json has architecture = {architecture!r}, not text", "Fetch it again.")
        activation = raw.get("activation_fn", raw.get("activation_fn_str")) or "relu"
        if not self.flat or activation == "relu":
            return architecture
        if activation == "topk" and architecture in ("standard", "topk"):
            return "topk"
        raise refuse_architecture(self._location, architecture, f"its activation is {activation!r}, not ReLU")

    def _places(self) -> tuple[str, ...]:
        stated = [self.metadata.text("hook_name"), self.metadata.text("hf_hook_name")]
        if self.flat:
            stated.append(self.top.text("hook_point"))
        places = tuple(words for words in stated if words)
        if places and (numbered := re.search(r"\.(\d+)(?:\.|$)", places[0])):
            self.metadata.agrees("hook_layer", int(numbered[1]))
            if self.flat:
                self.top.agrees("hook_point_layer", int(numbered[1]))
        return places

    @property
    def norm_mode(self) -> str | None:
        """How the stream is normalised, as SAELens names it; None where a flat file is too old to say it."""
        mode = self.top.fields.get("normalize_activations")
        if self.flat and isinstance(mode, bool):  # before version 4
            return "expected_average_only_in" if mode else "none"
        return self.top.text("normalize_activations") or (None if self.flat else "none")

    @property
    def centred(self) -> bool | None:
        """Whether the model was loaded with center_writing_weights; None where nothing says how it was loaded.

        The runner of version 6 always writes how. A file that version 6 saved again after it had loaded an older one
        has a training version of null, and says nothing.
        """
        if self.metadata.fields.get("model_from_pretrained_kwargs") is not None:
            loaded = self.metadata.section("model_from_pretrained_kwargs", _LOADED)
            return loaded.flag("center_writing_weights", False)
        trained_by = str(self.metadata.fields.get("sae_lens_training_version", "6") or "0").split(".")[0]
        return False if not self.flat and trained_by.isdigit() and int(trained_by) >= 6 else None

    @property
    def d_in(self) -> int:
        return self._size("d_in")

    @property
    def d_out(self) -> int:
        """Width of what the decoder writes."""
        return self._size("d_out") if self.transcoder else self.d_in

    @property
    def width(self) -> int:
        """Features."""
        return self._size("d_sae")

    @property
    def k(self) -> int | None:
        """Features that fire on a token; None unless it is a TopK encoder."""
        if self.architecture != "topk":
            return None
        in_function = self.top.section("activation_fn_kwargs", _TOPK_FN).count("k") if self.flat else None
        k = self.top.count("k") or in_function
        if k is None:
            raise self.top.refuse("k", "a whole number above zero")
        if in_function is not None and in_function != k:
            raise self._location.refuse(f"cfg.json has both k = {k} and {in_function}", "Fetch the file again.")
        return k

    @property
    def subtracts_b_dec(self) -> bool:
        """Whether the decoder's bias is subtracted from the stream."""
        return self.top.flag("apply_b_dec_to_input", True) and not self.transcoder

    @property
    def ranks_by_decoder(self) -> bool:
        """Whether activations are multiplied by the length of their decoder rows."""
        return self.k is not None and self.top.flag("rescale_acts_by_decoder_norm", False)

    def _check_linear(self) -> None:
        """Refuse what has no linear row per feature."""
        if self.architecture in _TRAINING_ONLY:
            why = "this is a training checkpoint; save it with save_inference_model()"
            raise refuse_architecture(self._location, self.architecture, why)
        base = self.architecture.removeprefix("jumprelu_").removeprefix("skip_")
        if base not in ("standard", "jumprelu", "gated", "topk", "transcoder"):
            why = _NOT_LINEAR.get(self.architecture, "it is unknown here")
            raise refuse_architecture(self._location, self.architecture, why)

    def check_heads(self) -> None:
        """Refuse what was trained on attention heads."""
        reshaped = (self.top.text("reshape_activations") or "none") != "none"
        heads = [self.metadata.fields.get(key) for key in ("hook_head_index", "hook_point_head_index")]
        if reshaped or any(head is not None for head in heads):
            raise self._location.refuse(
                "it reads attention heads, not the residual stream", "Only the residual stream can be watched."
            )

    def check_values(self) -> None:
        """Refuse values that are not read exactly and stand in no declaration."""
        if self.transcoder and self.top.flag("apply_b_dec_to_input", True):
            raise self._location.refuse(
                "a transcoder with apply_b_dec_to_input, which SAELens does not know", "Fetch its files again."
            )
        if (dtype := self.top.text("dtype")) is not None and dtype not in _DTYPES:
            raise self._location.refuse(f"dtype is {dtype!r}", f"Known are {', '.join(_DTYPES)}.")
        if self.flat and self.architecture != "topk":
            self.top.section("activation_fn_kwargs", Known())

    def _size(self, key: str) -> int:
        size = self.top.count(key)
        if size is None:
            raise self.top.refuse(key, "a whole number above zero")
        return size
