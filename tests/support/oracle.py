"""What the scores must be: Hugging Face's own forward, and the card's rows in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from latentwatch.watchlist.file import SCALE_ROWS, Watchlist

F64 = npt.NDArray[np.float64]


def residual_streams(model_path: Path, tokens: list[int], layers: list[int], dtype: str = "bfloat16") -> list[F64]:
    """resid_post of each layer, [T, D], by forward hooks: hidden_states[-1] would be behind the final norm."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = _model_cache.get((model_path, dtype))
    if model is None:
        # Eager attention is the only one that knows every architecture (Gemma-2 caps its attention scores).
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=getattr(torch, dtype), attn_implementation="eager"
        ).eval()
        _model_cache[model_path, dtype] = model
    caught: dict[int, Any] = {}

    def catch(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            caught[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    body = getattr(model.base_model, "decoder", model.base_model)
    blocks = body.h if hasattr(body, "h") else body.layers
    handles = [blocks[layer].register_forward_hook(catch(layer)) for layer in layers]

    try:
        with torch.inference_mode():
            model(torch.tensor([tokens]))
    finally:
        for handle in handles:
            handle.remove()
    return [caught[layer].reshape(len(tokens), -1).double().numpy() for layer in layers]


_model_cache: dict[Any, Any] = {}


def expected_scores(watchlist: Watchlist, streams: list[F64]) -> tuple[F64, F64]:
    """(activations [T, F], pre-activations [T, F]) in float64 from the streams at the watchlist's hook points."""
    acts, pres = [], []
    for rows, x_TD in zip(watchlist.hooks, streams, strict=True):
        scale = dict(zip(SCALE_ROWS, rows.scale_6K.astype(np.float64), strict=True))
        assert (scale["norm"] == 0).all(), "the oracle knows plain rows only"
        s = x_TD @ rows.w_KD.astype(np.float64).T
        act = np.maximum(scale["gain"] * s + scale["bias"], scale["lo"])
        acts.append(np.where(s > scale["tau"], act, 0.0))
        pres.append(s - np.where(np.isfinite(scale["tau"]), scale["tau"], s - 1.0))
    return np.concatenate(acts, axis=1), np.concatenate(pres, axis=1)
