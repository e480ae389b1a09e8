"""How our scores compare with what an upstream class encoded: used by the tests and by `make bench-parity`.

Legend: T tokens, F features of the source.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.file import SCALE_ROWS
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import SourceOptions, open_source

GOLDEN = Path(__file__).parents[1] / "unit" / "watchlist" / "golden"
MAX_ABS_ERROR = 1e-5
"""On activations of a few units from weights of unit norm; two bfloat16 terms are off by 2.4e-6 rms per weight."""
NEAR_THRESHOLD = 1e-4
"""Closer than this to its threshold, rounding decides whether a feature fires, upstream as here."""


def cases() -> list[str]:
    """The golden cases, by folder name."""
    return sorted(path.parent.name for path in GOLDEN.glob("*/case.json"))


def measure(name: str) -> dict[str, Any]:
    """One row of the parity table: every feature of a golden source, scored by us and by its library."""
    folder = GOLDEN / name
    case = json.loads((folder / "case.json").read_text())
    expected = safetensors.numpy.load_file(folder / "expected.safetensors")
    source = open_source(
        case["format"],
        Location(case["path"], folder),
        HookPoint(case["layer"]),
        SourceOptions(**case.get("options", {})),
    )
    rows = source.rows(range(source.about.width))
    hi, lo, scale = canonical.fold(rows)
    x_TD = expected["x"].astype(np.float64)
    act_TF = canonical.activations(hi, lo, scale, x_TD)
    margin_TF = _margin(hi, lo, scale, rows.norm, x_TD)
    if source.about.k is not None:
        act_TF, margin_TF = _keep_largest(act_TF, rows.rank_K, source.about.k)
    upstream_TF = expected["act"].astype(np.float64)
    assert act_TF.shape == upstream_TF.shape, "the case was made for another number of features"
    flips_TF = ((act_TF != 0) != (upstream_TF != 0)) & (margin_TF > NEAR_THRESHOLD)
    both_TF = (act_TF != 0) == (upstream_TF != 0)
    return {
        "format": case["format"],
        "case": name,
        "max_abs_error": float(np.abs(act_TF - upstream_TF)[both_TF].max()),
        "gate_flips": int(flips_TF.sum()),
        "n": int(upstream_TF.size),
        "fires": int((upstream_TF != 0).sum()),
        "gate": source.about.gate,
        "library": case["library"],
    }


def _margin(hi: np.ndarray, lo: np.ndarray, scale: np.ndarray, norm: str, x_TD: np.ndarray) -> np.ndarray:
    """How far each score is from its threshold, in units of the activation."""
    tau, gain = scale[SCALE_ROWS.index("tau")], scale[SCALE_ROWS.index("gain")]
    return np.abs(canonical.normalised(norm, x_TD) @ canonical.stored(hi, lo).T - tau) * gain


def _keep_largest(act_TF: np.ndarray, rank_F: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The TopK encoder's own choice, possible here because every feature is scored; and the distance from it."""
    rank_TF = act_TF if rank_F is None else act_TF * rank_F
    ordered_TF = np.sort(rank_TF, axis=1)
    between_T = (ordered_TF[:, -k] + ordered_TF[:, -k - 1]) / 2
    return np.where(rank_TF > between_T[:, None], act_TF, 0.0), np.abs(rank_TF - between_T[:, None])
