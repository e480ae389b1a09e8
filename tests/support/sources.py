"""Tiny published sources and YAML files, made by hand: real file layouts, random numbers.

Legend: D d_model, F features of the source, K selected features, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import yaml

D = 16
F = 24
LAYERS = 6


def stream(tokens: int, seed: int = 0, d_model: int = D) -> np.ndarray:
    """A residual stream with the large mean and the few large dimensions that real ones have, float64 [T, D]."""
    rng = np.random.default_rng(seed)
    scale_D = np.where(np.arange(d_model) % 7 == 3, 20.0, 1.0)
    return (rng.normal(size=(tokens, d_model)) + rng.normal(size=d_model) * 2) * scale_D


def saelens_weights(architecture: str, seed: int = 1) -> dict[str, np.ndarray]:
    """Random weights under the names that SAELens 6 gives them."""
    rng = np.random.default_rng(seed)
    weights = {"W_enc": rng.normal(size=(D, F)), "W_dec": rng.normal(size=(F, D)), "b_dec": rng.normal(size=D)}
    if architecture == "gated":
        weights |= {name: rng.normal(size=F) * 0.3 for name in ("b_gate", "b_mag", "r_mag")}
    else:
        weights["b_enc"] = rng.normal(size=F)
    if architecture == "jumprelu":
        weights["threshold"] = rng.uniform(-0.5, 30.0, F)
    return {name: array.astype(np.float32) for name, array in weights.items()}


def saelens(folder: Path, architecture: str = "jumprelu", layer: int = 2, seed: int = 1, **cfg: Any) -> Path:
    """A SAELens 6 folder. `cfg` overrides cfg.json; `metadata` in it is merged."""
    metadata = {"hook_name": f"blocks.{layer}.hook_resid_post", "sae_lens_version": "6.54.12", "model_name": "tiny"}
    fields = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **cfg,
        "metadata": metadata | cfg.get("metadata", {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(fields))
    safetensors.numpy.save_file(saelens_weights(architecture, seed), folder / "sae_weights.safetensors")
    return folder


def probe(path: Path, rows: int = 3, metadata: Mapping[str, str] | None = None, **tensors: np.ndarray) -> Path:
    """A linear probe file; `tensors` replaces or adds tensors."""
    rng = np.random.default_rng(7)
    content = {"direction": rng.normal(size=(rows, D)), "bias": rng.normal(size=rows)} | tensors
    path.parent.mkdir(parents=True, exist_ok=True)
    float32 = {name: np.ascontiguousarray(array, np.float32) for name, array in content.items()}
    safetensors.numpy.save_file(float32, path, dict(metadata or {}))
    return path


def document(*hooks: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """The content of a watchlist.yaml for the tiny model."""
    model = {
        "name": "tiny",
        "architecture": "LlamaForCausalLM",
        "d_model": D,
        "layers": LAYERS,
        "vocab_size": 100,
        "dtypes": ["float32"],
    }
    return {"name": "tiny watchlist", "model": model, "hook_points": list(hooks)} | fields


def hook(layer: int, *sources: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of `hook_points`."""
    return {"hook_point": f"resid_post.{layer}", "sources": list(sources)}


def source(
    format_name: str, path: str, features: int | list[Any] = 3, prefix: str = "f", **fields: Any
) -> dict[str, Any]:
    """One entry of `sources`; `features` as a number means the first rows."""
    chosen = list(range(features)) if isinstance(features, int) else features
    rows = [
        one if isinstance(one, dict) else {"index": one, "id": f"{prefix}{one}", "label": f"row {one}"}
        for one in chosen
    ]
    return {"format": format_name, "path": path, "defaults": {"severity": "info"}, "features": rows} | fields


def write_yaml(path: Path, content: Any) -> Path:
    """Write a watchlist.yaml."""
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
