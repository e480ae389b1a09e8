"""The watched rows of the SAE as a small asset: a folder that SAELens and `watchlist build` read, and what is known.

A row of a JumpReLU SAE scores by itself, so that a few of them are an SAE of their own, but for its reconstruction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import yaml

from latentwatch.demo.build.chat_sae.choose import Choice
from latentwatch.demo.build.sae import Encoder

ASSETS: Final = Path(__file__).parents[2] / "assets" / "smollm2" / "sae"
"""Beside the watchlist.yaml that lists them."""
FEATURES: Final = "features.yaml"
WATCHED: Final = ("weapons", "killing", "illegal", "hacking", "self-harm", "fraud", "hate", "orders", "secrets")
"""Topics that somebody would want to know of, by how they begin: severity info and a limit. The others explain."""


def write(folder: Path, whole: Path, encoder: Encoder, chosen: Sequence[Choice], facts: dict[str, Any]) -> None:
    """Write the rows of the chosen features in their order, their YAML, and card.json with `facts`.

    Args: whole: the folder of the whole SAE, whose cfg.json says what the rows are of.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    index_K = torch.tensor([choice.index for choice in chosen])
    tensors = {
        "W_enc": encoder.w_enc_DF[:, index_K].contiguous(),
        "b_enc": encoder.b_enc_F[index_K].clone(),
        "W_dec": encoder.w_dec_FD[index_K].clone(),
        "b_dec": encoder.b_dec_D.clone(),
        "threshold": encoder.threshold_F[index_K].clone(),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    config = json.loads((whole / "cfg.json").read_text("utf-8"))
    config["d_sae"] = len(chosen)
    (folder / "cfg.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    rows = [_row(k, choice) for k, choice in enumerate(chosen)]
    text = yaml.safe_dump(rows, sort_keys=False, allow_unicode=True, width=120)
    (folder / FEATURES).write_text("# Written by `python -m latentwatch.demo.build.chat_sae`.\n" + text, "utf-8")
    (folder / "card.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


def _row(k: int, choice: Choice) -> dict[str, Any]:
    row: dict[str, Any] = {"index": k, "id": f"sae_f{choice.index}", "label": choice.label}
    row["severity"] = "info" if choice.topic.startswith(WATCHED) else "none"
    if row["severity"] == "info" and choice.limit > 0:
        row["limit"] = {"statistic": "max", "value": choice.limit}
    return {**row, "evidence": choice.evidence}


def merged(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The watchlist.yaml beside the folder, with these rows at their hook point; as it is where the folder has none."""
    if not (folder / FEATURES).exists():
        return document
    entry = hook_point_entry(folder)
    hooks = [dict(hook) for hook in document["hook_points"]]
    same = [hook for hook in hooks if hook["hook_point"] == entry["hook_point"]]
    for hook in same:
        hook["sources"] = [*hook["sources"], *entry["sources"]]
    return {**document, "hook_points": hooks if same else [*hooks, entry]}


def hook_point_entry(folder: Path) -> dict[str, Any]:
    """What a watchlist.yaml that lies beside the folder says of these rows, as one of its `hook_points`."""
    metadata = json.loads((folder / "cfg.json").read_text("utf-8"))["metadata"]
    layer = int(metadata["hook_name"].split(".")[1])
    return {
        "hook_point": f"resid_post.{layer}",
        "sources": [
            {
                "format": "saelens",
                "path": folder.name,
                "licence": "Apache-2.0",
                # The template's own tokens, which are the same in every request and were not trained on.
                "defaults": {"skip_first_positions": len(metadata["exclude_positions"])},
                "features": yaml.safe_load((folder / FEATURES).read_text("utf-8")),
            }
        ],
    }
