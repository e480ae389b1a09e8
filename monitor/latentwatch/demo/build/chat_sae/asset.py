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

ASSETS: Final = Path(__file__).parents[2] / "assets" / "chat_sae"
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


def hook_point_entry(folder: Path = ASSETS, *, path: str | None = None) -> dict[str, Any]:
    """What a watchlist.yaml says of these rows, to be listed under its `hook_points`.

    Args: path: how the YAML names the folder; absolute if not given.
    """
    metadata = json.loads((folder / "cfg.json").read_text("utf-8"))["metadata"]
    layer = int(metadata["hook_name"].split(".")[1])
    return {
        "hook_point": f"resid_post.{layer}",
        "sources": [
            {
                "format": "saelens",
                "path": str(folder) if path is None else path,
                "licence": "Apache-2.0",
                "features": yaml.safe_load((folder / FEATURES).read_text("utf-8")),
            }
        ],
    }
