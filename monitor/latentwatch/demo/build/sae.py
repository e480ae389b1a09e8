"""Sparse autoencoders on a model's residual stream, trained with SAELens.

A BatchTopK SAE (arXiv 2412.06410) keeps the K_ACTIVE * batch strongest activations of a batch; SAELens saves it as a
JumpReLU SAE whose threshold is the running mean of the smallest kept activation.

Shape legend: N tokens, D d_model, F features.
"""

from __future__ import annotations

import json
import shutil
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

CHECKPOINTS: Final = 40
"""Of one training that can be stopped."""


@dataclass(frozen=True)
class SaePlan:
    """How one SAE is trained."""

    tokens: int = 2_000_000
    """Tokens shown, with repetition."""
    width: int = 1024
    k_active: int = 16
    batch_tokens: int = 2048
    learning_rate: float = 1e-3
    bfloat16: bool = False
    """Multiply in bfloat16, with weights and sums in float32: a CPU that has it needs two thirds of the time."""
    norm_batches: int = 50
    """From which the stream's mean norm is estimated."""

    @property
    def steps(self) -> int:
        """Batches shown."""
        return self.tokens // self.batch_tokens


@dataclass(frozen=True)
class Place:
    """The stream that an SAE is trained on, as its cfg.json says it."""

    model_name: str
    hook_point: HookPoint
    context_tokens: int
    excluded_positions: int = 1
    """At the beginning of each text."""


@dataclass(frozen=True)
class Encoder:
    """The reading half of a saved JumpReLU SAE: enough to score features."""

    w_enc_DF: torch.Tensor
    b_enc_F: torch.Tensor
    w_dec_FD: torch.Tensor
    b_dec_D: torch.Tensor
    threshold_F: torch.Tensor

    def only(self, index_K: torch.Tensor) -> Encoder:
        """Some of the features, in this order."""
        return Encoder(
            self.w_enc_DF[:, index_K],
            self.b_enc_F[index_K],
            self.w_dec_FD[index_K],
            self.b_dec_D,
            self.threshold_F[index_K],
        )

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
    acts_ND: torch.Tensor,
    place: Place,
    folder: Path,
    plan: SaePlan,
    *,
    seed: int,
    progress: Progress,
    checkpoints: Path | None = None,
) -> None:
    """Train on [N, D], the excluded positions left out, and write the SAELens v6 folder.

    With `checkpoints`, a training that was stopped goes on from the last one that lies there, over the same batches in
    the same order; all of them are gone when it has ended.
    """
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    sae = _untrained(acts_ND.shape[1], plan)
    trainer = SAETrainer(_trainer_config(plan, checkpoints), sae, iter(()), save_checkpoint_fn=_only_the_last)
    if last := _last_checkpoint(checkpoints):
        sae.load_weights_from_checkpoint(last)
        trainer.load_trainer_state(last)
        trainer.checkpoint_thresholds = [n for n in trainer.checkpoint_thresholds if n > trainer.n_training_samples]
    shown = trainer.n_training_samples // plan.batch_tokens + plan.norm_batches if last else 0
    trainer.data_provider = _shuffled(acts_ND, plan, seed, shown, place.hook_point, progress)
    trainer.fit()
    sae.save_inference_model(folder)
    _complete_config(folder / "cfg.json", place)
    if checkpoints is not None:
        shutil.rmtree(checkpoints, ignore_errors=True)


def _last_checkpoint(checkpoints: Path | None) -> Path | None:
    # SAELens writes this file last, so that a checkpoint which has it is whole.
    whole = [path.parent for path in checkpoints.glob("*/activation_scaler.json")] if checkpoints else []
    return max(whole, key=lambda path: int(path.name), default=None)


def _only_the_last(checkpoint_path: Path | None) -> None:
    """Remove the checkpoints before a new one."""
    if checkpoint_path is not None:
        for older in checkpoint_path.parent.iterdir():
            if older.name != checkpoint_path.name:
                shutil.rmtree(older)


def _untrained(d_in: int, plan: SaePlan) -> BatchTopKTrainingSAE:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    return BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=d_in,
            d_sae=plan.width,
            k=plan.k_active,
            dtype="float32",
            device="cpu",
            normalize_activations="expected_average_only_in",
            apply_b_dec_to_input=True,
        )
    )


def _trainer_config(plan: SaePlan, checkpoints: Path | None) -> SAETrainerConfig:
    from sae_lens.config import SAETrainerConfig

    return SAETrainerConfig(
        total_training_samples=plan.steps * plan.batch_tokens,
        train_batch_size_samples=plan.batch_tokens,
        lr=plan.learning_rate,
        lr_end=plan.learning_rate / 10,
        lr_warm_up_steps=plan.steps // 50,
        lr_decay_steps=plan.steps // 4,
        dead_feature_window=200,
        n_batches_for_norm_estimate=plan.norm_batches,
        device="cpu",
        autocast=plan.bfloat16,
        n_checkpoints=CHECKPOINTS if checkpoints else 0,
        checkpoint_path=str(checkpoints) if checkpoints else None,
    )


def _shuffled(
    acts_ND: torch.Tensor, plan: SaePlan, seed: int, shown: int, hook_point: HookPoint, progress: Progress
) -> Iterator[torch.Tensor]:
    """Endless float32 batches in random order, each pass over the tokens in a new one; the first `shown` left out."""
    generator = torch.Generator().manual_seed(seed)
    per_pass = len(acts_ND) // plan.batch_tokens
    served = 0
    while True:
        order_N = torch.randperm(len(acts_ND), generator=generator)
        for cut in range(per_pass):
            served += 1
            if served <= shown:
                continue
            yield acts_ND[order_N[cut * plan.batch_tokens : (cut + 1) * plan.batch_tokens]].float()
            if served % 400 == 0:
                progress(f"SAE at {hook_point}: {min(1.0, served / plan.steps):4.0%}")


def _complete_config(path: Path, place: Place) -> None:
    """Say in the SAE's metadata which model and stream it was trained on."""
    config = json.loads(path.read_text("utf-8"))
    config["device"] = "cpu"
    config["metadata"] = {
        **config.get("metadata", {}),
        "model_name": place.model_name,
        "hook_name": f"blocks.{place.hook_point.layer}.hook_resid_post",
        "hf_hook_name": f"model.layers.{place.hook_point.layer}",
        "prepend_bos": True,
        "context_size": place.context_tokens,
        "exclude_positions": list(range(place.excluded_positions)),
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
