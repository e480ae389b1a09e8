"""Sparse autoencoders on the demo model's residual stream, trained with SAELens.

A BatchTopK SAE (arXiv 2412.06410) keeps the K_ACTIVE * batch strongest activations of a batch; SAELens saves it as a
JumpReLU SAE whose threshold is the running mean of the smallest kept activation.

Shape legend: N tokens, D d_model, F features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from latentwatch.arrays import F32
from latentwatch.demo.build.model import Progress
from latentwatch.names import HookPoint

if TYPE_CHECKING:
    from sae_lens import BatchTopKTrainingSAE
    from sae_lens.config import SAETrainerConfig

WIDTH: Final = 1024
K_ACTIVE: Final = 16


@dataclass(frozen=True)
class SaePlan:
    """How one SAE is trained."""

    tokens: int = 2_000_000
    """Tokens shown, with repetition."""
    batch_tokens: int = 2048
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Encoder:
    """The reading half of a saved JumpReLU SAE: enough to score features."""

    w_enc_DF: torch.Tensor
    b_enc_F: torch.Tensor
    w_dec_FD: torch.Tensor
    b_dec_D: torch.Tensor
    threshold_F: torch.Tensor

    @torch.inference_mode()
    def activations(self, acts_ND: torch.Tensor) -> F32:
        """Feature activations in float32, [N, F]."""
        pre_NF = (acts_ND.float() - self.b_dec_D) @ self.w_enc_DF + self.b_enc_F
        result: F32 = (pre_NF * (pre_NF > self.threshold_F)).clamp_min_(0).numpy()
        return result

    def quality(self, acts_ND: torch.Tensor) -> dict[str, float]:
        """Mean number of active features a token (l0) and the fraction of variance unexplained (fvu)."""
        features_NF = torch.from_numpy(self.activations(acts_ND))
        x_ND = acts_ND.float()
        error = (x_ND - features_NF @ self.w_dec_FD - self.b_dec_D).pow(2).sum()
        spread = (x_ND - x_ND.mean(0)).pow(2).sum()
        fired_F = (features_NF > 0).any(0)
        return {
            "l0": float((features_NF > 0).sum(1).float().mean()),
            "fvu": float(error / spread),
            "silent_features": int((~fired_F).sum()),
        }


def train_sae(
    acts_ND: torch.Tensor, hook_point: HookPoint, folder: Path, plan: SaePlan, *, seed: int, progress: Progress
) -> None:
    """Train on bfloat16 [N, D] (no <bos> rows) and write the SAELens v6 folder (cfg.json, sae_weights.safetensors)."""
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    sae = _untrained(acts_ND.shape[1])
    steps = plan.tokens // plan.batch_tokens
    batches = _shuffled(acts_ND, plan.batch_tokens, seed, hook_point, steps, progress)
    trainer = SAETrainer(_trainer_config(plan, steps), sae, batches)
    trainer.fit()
    sae.save_inference_model(folder)
    _complete_config(folder / "cfg.json", hook_point)


def _untrained(d_in: int) -> BatchTopKTrainingSAE:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    return BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=d_in,
            d_sae=WIDTH,
            k=K_ACTIVE,
            dtype="float32",
            device="cpu",
            normalize_activations="expected_average_only_in",
            apply_b_dec_to_input=True,
        )
    )


def _trainer_config(plan: SaePlan, steps: int) -> SAETrainerConfig:
    from sae_lens.config import SAETrainerConfig

    return SAETrainerConfig(
        total_training_samples=steps * plan.batch_tokens,
        train_batch_size_samples=plan.batch_tokens,
        lr=plan.learning_rate,
        lr_end=plan.learning_rate / 10,
        lr_warm_up_steps=steps // 50,
        lr_decay_steps=steps // 4,
        dead_feature_window=200,
        n_batches_for_norm_estimate=50,
        device="cpu",
    )


def _shuffled(
    acts_ND: torch.Tensor, batch_tokens: int, seed: int, hook_point: HookPoint, steps: int, progress: Progress
) -> Iterator[torch.Tensor]:
    """Endless float32 batches in random order, each pass over the tokens in a new one."""
    generator = torch.Generator().manual_seed(seed)
    served = 0
    while True:
        order_N = torch.randperm(len(acts_ND), generator=generator)
        for cut in range(0, len(order_N) - batch_tokens + 1, batch_tokens):
            yield acts_ND[order_N[cut : cut + batch_tokens]].float()
            served += 1
            if served % 400 == 0:
                progress(f"SAE at {hook_point}: {min(1.0, served / steps):4.0%}")


def _complete_config(path: Path, hook_point: HookPoint) -> None:
    """Say in the SAE's metadata which model and stream it was trained on."""
    config = json.loads(path.read_text("utf-8"))
    config["device"] = "cpu"
    config["metadata"] = {
        **config.get("metadata", {}),
        "model_name": "latentwatch-demo",
        "hook_name": f"blocks.{hook_point.layer}.hook_resid_post",
        "hf_hook_name": f"model.layers.{hook_point.layer}",
        "prepend_bos": True,
        "context_size": 1024,
        "exclude_positions": [0],
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def load_encoder(folder: Path) -> Encoder:
    """Read a saved JumpReLU SAE with safetensors alone."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = load_file(folder / "sae_weights.safetensors")
    return Encoder(*(tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")))


def firing_rate(features_NF: F32) -> F32:
    """Share of tokens on which each feature is above zero, [F]."""
    rate: F32 = (features_NF > 0).mean(0, dtype=np.float64).astype(np.float32)
    return rate
