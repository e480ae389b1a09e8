"""Putting a watchlist onto a loaded model: find the layers, make the static buffers, register the hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from latentwatch.engines.vllm import hook
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

    def reset(self) -> None:
        """Mark the buffer as unwritten, so that a step without the op can be told from one with it."""
        self.stat_T3[0, 0] = UNWRITTEN


def arm(
    model: torch.nn.Module, watchlist: Watchlist, *, max_rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[ArmedHook, ...]:
    """Register the op at every hook point. Call after the weights are loaded and before the first forward.

    Raises: EngineRefused: the model's layers cannot be found without guessing.
    """
    layers, owner = find_layers(model, watchlist.model.layers)
    if dtype == torch.float16 and any(hasattr(module, "routed_scaling_factor") for module in layers.modules()):
        raise EngineRefused(
            f"{type(model).__name__} in float16",
            found="layers with a routed_scaling_factor divide their stream by it there, so that it does not overflow",
            instead="Serve it with --dtype bfloat16.",
            reason=RefusalReason.ARCHITECTURE_UNKNOWN,
        )
    places = [_place(layers, owner, rows.hook_point.layer) for rows in watchlist.hooks]
    scratch = score_op.scratch(
        max_rows, [len(rows.features) for rows in watchlist.hooks], watchlist.model.d_model, device
    )
    return tuple(
        _arm_one(place, rows, max_rows, dtype, device, scratch)
        for place, rows in zip(places, watchlist.hooks, strict=True)
    )


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


def find_layers(model: torch.nn.Module, count: int) -> tuple[torch.nn.ModuleList, torch.nn.Module]:
    """The decoder layers and the module that owns them.

    Raises: EngineRefused: not exactly one list of `count` modules is named `layers` or `h`.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and name.rpartition(".")[2] in ("layers", "h")
        and len(module) == count
    ]
    if len(found) != 1:
        raise EngineRefused(
            f"decoder layers of {type(model).__name__}",
            found=f"{len(found)} lists of {count} modules are named 'layers' or 'h': {[name for name, _ in found]}",
            instead="This architecture is not supported; report it with the model's name.",
            reason=RefusalReason.ARCHITECTURE_UNKNOWN,
        )
    name, layers = found[0]
    return layers, model.get_submodule(name.rpartition(".")[0])


@dataclass(frozen=True)
class _Place:
    """Where the hook for one hook point goes."""

    module: torch.nn.Module
    function: Callable[[torch.nn.Module, object, object], None]
    residual: bool
    """The hook sees the stream as two halves."""


def _place(layers: torch.nn.ModuleList, owner: torch.nn.Module, layer: int) -> _Place:
    """The place for resid_post.<layer>.

    A layer whose forward takes `residual` returns it unsummed; the norm behind it then returns the sum. Not every such
    layer does: that the sum is meant shows in the final norm, which takes both halves.

    Raises: EngineRefused: the layer takes `residual`, and no norm behind it adds it.
    """
    decoder = layers[layer]
    if not _takes_residual(decoder):
        return _Place(decoder, hook.after_whole_layer, residual=False)
    last = layer + 1 == len(layers)
    norm = getattr(owner, "norm", None) if last else getattr(layers[layer + 1], "input_layernorm", None)
    if norm is not None and _takes_residual(norm):
        return _Place(norm, hook.after_norm, residual=False)
    if not any(_takes_residual(child) for child in owner.children()):
        raise EngineRefused(
            f"residual stream of {type(decoder).__name__}",
            found="the layer returns two tensors, and no norm of the model adds them: their sum may not be the stream",
            instead="This architecture is not supported; report it with the model's name.",
            reason=RefusalReason.ARCHITECTURE_UNKNOWN,
        )
    return _Place(decoder, hook.after_layer, residual=True)


def _takes_residual(module: torch.nn.Module) -> bool:
    """vLLM's norms dispatch from forward(*args) to forward_native(x, residual=None)."""
    forward = getattr(module, "forward_native", module.forward)
    return "residual" in inspect.signature(forward).parameters


def _arm_one(
    place: _Place,
    rows: HookRows,
    max_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    scratch: torch.Tensor | None,
) -> ArmedHook:
    w_hi, w_lo, scale = score_op.pack(rows, device, dtype)
    act = torch.zeros(max_rows, len(rows.features), dtype=torch.float32, device=device)
    stat = torch.zeros(max_rows, 3, dtype=torch.float32, device=device)
    score_op.warm_up(w_hi, w_lo, scale, act, stat, scratch, dtype=dtype, residual=place.residual)
    for name, tensor in zip(hook.BUFFERS, (w_hi, w_lo, scale, act, stat, scratch), strict=True):
        place.module.register_buffer(hook.PREFIX + name, tensor, persistent=False)
    place.module.register_forward_hook(place.function)
    armed = ArmedHook(rows, act, stat)
    armed.reset()
    return armed
