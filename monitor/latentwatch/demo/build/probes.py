"""Linear probes for the feared acts: what direction of the residual stream says that the model is doing it?

One logistic regression per act, on means over WINDOW consecutive output tokens. A mean of logits is the logit of the
mean, so the probe is trained on exactly the statistic that is watched: the largest rolling mean of its logit over a
request's output. Shape legend: N tokens, M windows, K probes, D d_model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch.nn import functional

from latentwatch.arrays import F32
from latentwatch.demo.build.traces import Traces, rolling_mean
from latentwatch.names import HookPoint

WINDOW: Final = 8
"""Tokens; about one sentence of the demo's language."""
PENALTY: Final = 1e-3
"""L2 weight on standardised inputs."""


@dataclass(frozen=True)
class Probes:
    """K linear probes at one hook point: logit = direction . x + bias."""

    names: tuple[str, ...]
    hook_point: HookPoint
    direction_KD: F32
    bias_K: F32
    window: int = WINDOW

    def logits(self, acts_ND: torch.Tensor) -> F32:
        """Logit per token and probe, float32 [N, K]."""
        result: F32 = (acts_ND.float() @ torch.from_numpy(self.direction_KD).T + torch.from_numpy(self.bias_K)).numpy()
        return result


def train_probes(traces: Traces, hook_point: HookPoint, names: Sequence[str]) -> Probes:
    """One probe per feared topic in `names`, against the output windows of every other dialogue."""
    x_MD, topic_M = _windows(traces, hook_point)
    mean_D, scale_D = x_MD.mean(0), x_MD.std(0) + 1e-6
    target_MK = torch.from_numpy(np.stack([topic_M == name for name in names], 1).astype(np.float32))
    weight_KD, bias_K = _fit((x_MD - mean_D) / scale_D, target_MK)
    direction_KD = weight_KD / scale_D
    return Probes(
        tuple(names),
        hook_point,
        direction_KD.numpy().astype(np.float32),
        (bias_K - direction_KD @ mean_D).numpy().astype(np.float32),
    )


def _windows(traces: Traces, hook_point: HookPoint) -> tuple[torch.Tensor, np.ndarray[tuple[int], np.dtype[np.str_]]]:
    """Mean activations of every second output window, [M, D], and the topic of each."""
    acts_ND = traces.acts[hook_point].float().numpy()
    means = [rolling_mean(acts_ND[a:b], WINDOW)[::2] for a, b in zip(traces.output_R, traces.stop_R, strict=True)]
    topics = np.repeat([dialogue.topic for dialogue in traces.dialogues], [len(mean) for mean in means])
    return torch.from_numpy(np.concatenate(means)), topics


def _fit(x_MD: torch.Tensor, target_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [K, D] and biases [K] of K independent logistic regressions; positives and negatives weigh the same."""
    weight_KD = torch.zeros(target_MK.shape[1], x_MD.shape[1], requires_grad=True)
    bias_K = torch.zeros(target_MK.shape[1], requires_grad=True)
    rate_K = target_MK.mean(0)
    balance_MK = target_MK / (2 * rate_K) + (1 - target_MK) / (2 * (1 - rate_K))
    optimizer = torch.optim.LBFGS([weight_KD, bias_K], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses_MK = functional.binary_cross_entropy_with_logits(
            x_MD @ weight_KD.T + bias_K, target_MK, reduction="none"
        )
        loss = (losses_MK * balance_MK).mean(0).sum() + PENALTY * weight_KD.pow(2).sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return weight_KD.detach(), bias_K.detach()


def save_probes(probes: Probes, path: Path) -> None:
    """Write `direction` [K, D] and `bias` [K] in float32, with names, hook point and window as metadata."""
    from safetensors.numpy import save_file

    metadata = {"names": json.dumps(probes.names), "hook_point": str(probes.hook_point), "window": str(probes.window)}
    save_file({"direction": probes.direction_KD, "bias": probes.bias_K}, path, metadata)
