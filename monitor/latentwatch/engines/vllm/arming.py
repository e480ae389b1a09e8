"""Putting a watchlist onto a loaded model: find the layers, prove where their stream is, make the static buffers,
register the hooks, and see that they score it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from latentwatch.engines.vllm import hook, proof
from latentwatch.engines.vllm.proof import Forward, Place
from latentwatch.errors import EngineRefused, RefusalReason, WatchlistRefused
from latentwatch.kernels import score_op
from latentwatch.kernels.reference import UNWRITTEN
from latentwatch.watchlist.file import HookRows, ModelCard, Watchlist


@dataclass(frozen=True)
class ArmedHook:
    """One hook point's static output buffers, written by the op in every forward."""

    rows: HookRows
    act_TK: torch.Tensor
    """float32 [max_rows, K]"""
    stat_T3: torch.Tensor
    """float32 [max_rows, 3]: Euclidean norm (inf where the row is not finite), max |x|, non-finite elements"""
    registered: RemovableHandle | None = None
    reader: str = ""
    """the function of hook.py that was registered"""

    def reset(self) -> None:
        """Mark the buffer as unwritten, so that a step without the op can be told from one with it."""
        self.stat_T3[0, 0] = UNWRITTEN

    def remove(self) -> None:
        """Take the hook off an eager model. A compiled graph goes on calling the op, and needs the module's buffers."""
        if self.registered is not None:
            self.registered.remove()


def arm(
    model: nn.Module,
    watchlist: Watchlist,
    forward: Forward,
    *,
    max_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    between_layers: bool = False,
) -> tuple[ArmedHook, ...]:
    """Register the op at every hook point. Call after the weights are loaded and before the first forward is traced.

    Args:   between_layers: the model may add something there, so that only the layer itself gives its own stream.
    Raises: EngineRefused: the layers cannot be found without guessing, it is not proven what of their output the
            stream is, or the op did not score it. Whatever `forward` raises is passed on. No hook is left then.
    """
    layers = find_layers(model, watchlist.model.layers, forward)
    if dtype == torch.float16 and any(hasattr(module, "routed_scaling_factor") for module in layers.modules()):
        raise EngineRefused(
            f"{type(model).__name__} in float16",
            found="layers with a routed_scaling_factor divide their stream by it there, so that it does not overflow",
            instead="Serve it with --dtype bfloat16.",
            reason=RefusalReason.ARCHITECTURE_UNKNOWN,
        )
    hooked = [rows.hook_point.layer for rows in watchlist.hooks]
    norms = None if between_layers else model
    places = proof.prove(layers, hooked, watchlist.model.d_model, forward, norms_of=norms, max_rows=max_rows)
    scratch = score_op.scratch(
        max_rows, [len(rows.features) for rows in watchlist.hooks], watchlist.model.d_model, device
    )
    hooks: list[ArmedHook] = []
    try:
        hooks += [
            _arm_one(place, rows, max_rows, dtype, device, scratch)
            for place, rows in zip(places, watchlist.hooks, strict=True)
        ]
        confirm(places, hooks, forward)
    except Exception:
        # Whatever it is, it is passed on, and no hook stays behind.
        _remove_all(places)
        raise
    for hook_ in hooks:
        hook_.reset()
    return tuple(hooks)


def check_model(hf_config: Any, dtype: torch.dtype, expected: ModelCard) -> None:
    """Refuse a watchlist that was made for another model (invariant I6).

    Raises: WatchlistRefused naming the first field that differs; reason "watchlist_width" or "watchlist_model".
    """
    architectures = getattr(hf_config, "architectures", None) or ["unknown"]
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    served_dtype = str(dtype).removeprefix("torch.")
    for field, found, want in (
        ("d_model", text.hidden_size, expected.d_model),
        ("layers", text.num_hidden_layers, expected.layers),
        ("architecture", architectures[0], expected.architecture),
        ("vocab_size", text.vocab_size, expected.vocab_size),
    ):
        if found != want:
            raise WatchlistRefused(
                f"watchlist for model {expected.name!r} ({field} {want})",
                found=f"the engine serves a model with {field} {found}",
                instead="Serve the model that the watchlist was built for, or build one for this model.",
                reason=RefusalReason.WATCHLIST_WIDTH if field == "d_model" else RefusalReason.WATCHLIST_MODEL,
            )
    if served_dtype not in expected.dtypes:
        raise WatchlistRefused(
            f"watchlist for model {expected.name!r} in {', '.join(expected.dtypes)}",
            found=f"the engine serves it in {served_dtype}",
            instead=f"Serve with --dtype {expected.dtypes[0]}, or calibrate a watchlist for {served_dtype}.",
            reason=RefusalReason.WATCHLIST_DTYPE,
        )


def find_layers(model: nn.Module, count: int, forward: Forward) -> nn.ModuleList:
    """The decoder layers: the one list of `count` modules that is named `layers` or `h`; where that does not tell, the
    one list whose modules run one after the other in a dummy forward, each given what the one before it returned.

    Raises: EngineRefused: there is no such list, or more than one.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    found = [name for name in lists if name.rpartition(".")[2] in ("layers", "h")]
    if len(found) != 1:
        found = proof.chains(lists, forward)
    if len(found) != 1:
        raise EngineRefused(
            f"decoder layers of {type(model).__name__}",
            found=f"{len(lists)} lists have {count} modules, {list(lists)}, and in {len(found)} of them each runs on "
            f"what the one before it returned: {found}",
            instead="This architecture is not supported; report it with the model's name.",
            reason=RefusalReason.ARCHITECTURE_UNKNOWN,
        )
    return lists[found[0]]


def confirm(places: Sequence[Place], hooks: Sequence[ArmedHook], forward: Forward) -> None:
    """See that each hook scores the stream: known numbers are put where the proof found it, in a forward of few rows.

    Raises: EngineRefused, reason "stream_unproven": scores differ from those of the known numbers.
    """
    rows = min(8, hooks[0].act_TK.shape[0])
    expected = []
    with ExitStack() as injected:
        for i, (place, hook_) in enumerate(zip(places, hooks, strict=True)):
            known = proof.known_halves(place, rows, hook_.rows.w_hi_KD.shape[1], seed=100 + 10 * i)
            injected.enter_context(proof.injected(place, known))
            expected.append(score_op.expected(hook_.rows, torch.stack(known).sum(dim=0)))
            hook_.reset()
        forward(rows)
    for place, hook_, (act_TK, stat_T3) in zip(places, hooks, expected, strict=True):
        found_TK, found_T3 = hook_.act_TK[:rows].cpu(), hook_.stat_T3[:rows].cpu()
        largest_K = np.abs(hook_.rows.scale_6K[1]) * np.linalg.norm(hook_.rows.w_KD, axis=1) * float(stat_T3.max())
        # A score at its very threshold may be on either side of it.
        wrong = int(((found_TK - act_TK).abs() > 1e-3 * torch.tensor(largest_K)).sum())
        if wrong > 1 + act_TK.numel() // 100 or not torch.allclose(found_T3[:, 0], stat_T3[:, 0], rtol=1e-3):
            raise EngineRefused(
                f"scores at {hook_.rows.hook_point} ({type(place.layer).__name__})",
                found=f"{wrong} of {act_TK.numel()} scores of known numbers are wrong, their lengths are "
                f"{found_T3[0, 0]:.4g} and not {stat_T3[0, 0]:.4g}",
                instead="Serve without latentwatch, and report it with the model's name.",
                reason=RefusalReason.STREAM_UNPROVEN,
            )


def _arm_one(
    place: Place,
    rows: HookRows,
    max_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    scratch: torch.Tensor | None,
) -> ArmedHook:
    w_hi, w_lo, scale = score_op.pack(rows, device, dtype)
    act = torch.zeros(max_rows, len(rows.features), dtype=torch.float32, device=device)
    stat = torch.zeros(max_rows, 3, dtype=torch.float32, device=device)
    score_op.warm_up(w_hi, w_lo, scale, act, stat, scratch, dtype=place.dtype, residual=place.residual)
    for name, tensor in zip(hook.BUFFERS, (w_hi, w_lo, scale, act, stat, scratch), strict=True):
        place.module.register_buffer(hook.PREFIX + name, tensor, persistent=False)
    armed = ArmedHook(rows, act, stat, place.module.register_forward_hook(place.function), place.function.__name__)
    armed.reset()
    return armed


def _remove_all(places: Sequence[Place]) -> None:
    """Leave the modules as they were; nothing has been traced yet."""
    for place in places:
        for key, function in list(place.module._forward_hooks.items()):
            if function is place.function:
                del place.module._forward_hooks[key]
        for name in hook.BUFFERS:
            place.module._buffers.pop(hook.PREFIX + name, None)
            place.module._non_persistent_buffers_set.discard(hook.PREFIX + name)
