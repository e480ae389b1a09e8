"""An SAE's own features by contrast: which of them stand for a concern already."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from latentwatch.names import HookPoint
from latentwatch.prompts import written
from latentwatch.prompts.prompt import Part
from latentwatch.watchlist import captured
from latentwatch.watchlist.activations import Recording
from latentwatch.watchlist.captured import CaptureJob
from latentwatch.watchlist.discover import Found, discover
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import SourceOptions, open_source
from latentwatch.watchlist.starter import concern as concerns
from latentwatch.watchlist.starter.tokens import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEATURES: Final = 2
"""Of a concern: those with the largest AUROC among those that pass."""
_FITTED: Final = (Part.TRAIN, Part.SELECTION)


def hook_point(
    folder: Path,
    job: CaptureJob,
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Sequence[str],
    *,
    sae: str,
    format: str,
    place: HookPoint,
    out: Path,
    progress: Callable[[str], None],
) -> Mapping[str, object] | None:
    """The SAE's entry in the watchlist.yaml that will lie in `out`; None where no feature passes.

    Features are found as `watchlist discover` does, on the families that probes are fitted on, each on one side of its
    split.

    Raises: WatchlistRefused: the SAE cannot be read, or a concern has too few families.
    """
    source = open_source(format, Location(sae, Path()), place, SourceOptions())
    layer = captured.layer(folder, job, job.layers.index(place.layer))
    said = list(captured.said(folder, job))
    best: dict[int, tuple[Found, str]] = {}
    for name in wanted:
        split = concerns.split(encoded.prompts, name)
        positive = [at for part in _FITTED for at in split.positive[part]]
        negative = [at for part in _FITTED for at in (*split.hard[part], *split.ordinary[part])]
        chosen = [*positive, *negative]
        recording = _recording(layer, encoded, said, tokenizer, chosen)
        groups = [f"{encoded.prompts[at].concern}/{encoded.prompts[at].family}" for at in chosen]
        found = discover(source, recording, np.arange(len(chosen)) < len(positive), groups)
        progress(f"{name}: {len(found)} features of the SAE pass")
        for one in found[:FEATURES]:
            if one.index not in best or best[one.index][0].auroc < one.auroc:
                best[one.index] = one, name
    if not best:
        return None
    path = sae if sae.startswith("hf:") else os.path.relpath(sae, out.resolve())
    features = [_feature(one, name, encoded.skip_first) for one, name in best.values()]
    return {"hook_point": str(place), "sources": [{"format": format, "path": path, "features": features}]}


def _recording(
    layer: captured.CapturedLayer,
    encoded: Encoded,
    said: Sequence[tuple[int, ...]],
    tokenizer: PreTrainedTokenizerBase,
    chosen: Sequence[int],
) -> Recording:
    bounds = layer.bounds_S
    pieces = [np.arange(bounds[at], bounds[at + 1]) for at in chosen]
    texts = []
    for at, piece in zip(chosen, pieces, strict=True):
        ids = (*encoded.ids[at], *said[at])[encoded.skip_first :][: len(piece)]
        texts.append(tuple(tokenizer.decode([one]) for one in ids))
    request_T = np.repeat(np.arange(len(chosen)), [len(piece) for piece in pieces])
    return Recording(layer.x_TD[np.concatenate(pieces)], request_T, tuple(texts))


def _feature(found: Found, concern: str, skip_first: int) -> dict[str, object]:
    label = written.concerns()[concern]["label"]
    evidence = found.evidence | {
        "split": "half of the families",
        "measured_on": f"contrast texts of latentwatch on {concern}",
        "remarks": "Families of the test had no part in it, and no text baseline was measured for it.",
    }
    return {
        "index": found.index,
        "id": f"{concern}-f{found.index}",
        "label": f"SAE feature that goes with: {label}",
        "severity": "info",
        "skip_first_positions": skip_first,
        "evidence": evidence,
    }
