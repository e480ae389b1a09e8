"""What a run leaves in its folder: probes of each layer, the watchlist.yaml that names them, the cards, the figures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import yaml

from latentwatch import storage
from latentwatch.names import HookPoint
from latentwatch.prompts import written
from latentwatch.prompts.prompt import Kind
from latentwatch.watchlist.starter.concern import Detector, FamilyRow


@dataclass(frozen=True)
class About:
    """Of what, and how, the detectors are: for every card."""

    model: str
    """Folder or name."""
    name: str
    dtype: str
    skip_first: int
    shared_prefix: int
    generation_prompt: str
    exceedance_rate: float
    traffic: str
    """Where the limits come from."""
    missing: Sequence[str]
    too_long: int


def write(folder: Path, detectors: Sequence[Detector], about: About, extra: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write everything; returns the watchlist.yaml.

    Args: extra: further hook points of the watchlist.yaml, such as an SAE's.
    """
    hook_points: list[Mapping[str, Any]] = []
    for layer in sorted({d.settings.layer for d in detectors}):
        of_layer = [d for d in detectors if d.settings.layer == layer]
        hook_point = HookPoint.parse(f"resid_post.{layer}")
        path = folder / f"probes.{layer}.safetensors"
        _probes(path, of_layer, hook_point, about.name)
        features = [_feature(detector, about) for detector in of_layer]
        source = {"format": "linear_probe", "path": path.name, "features": features}
        hook_points.append({"hook_point": str(hook_point), "sources": [source]})
    content = {
        "name": f"starter-{about.name}"[:128],
        "notes": _notes(about),
        "model": _model(folder, about),
        "hook_points": _merged([*hook_points, *extra]),
    }
    _text(folder / "watchlist.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))
    _text(folder / "cards.md", cards(detectors, about))
    figures = {"rows": [row for detector in detectors for row in published(detector, about.name)]}
    _text(folder / "detectors.json", json.dumps(figures, indent=1) + "\n")
    return folder / "watchlist.yaml"


def published(detector: Detector, model: str) -> list[dict[str, object]]:
    """The detector's figures as detectors.json has them."""
    return [
        {
            "model": model,
            "concern": detector.concern,
            "family": row.family,
            "tpr_at_1pct": round(row.tpr.value, 4),
            "tpr_interval": [round(row.tpr.low, 4), round(row.tpr.high, 4)],
            "tpr_text": round(row.text.value, 4),
            "tpr_length": round(row.tpr_length, 4),
            "better_by": round(row.better_by.value, 4),
            "better_by_interval": [round(row.better_by.low, 4), round(row.better_by.high, 4)],
            "auroc": round(row.auroc, 4),
            "auroc_text": round(row.auroc_text, 4),
            "negatives": str(row.negatives),
            "n": row.n,
            "n_negative": row.n_negative,
            "layer": detector.settings.layer,
            "statistic": detector.settings.statistic,
        }
        for row in detector.rows
    ]


def _merged(hook_points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each hook point once, with the sources of all."""
    sources: dict[str, list[object]] = {}
    for one in hook_points:
        sources.setdefault(one["hook_point"], []).extend(one["sources"])
    return [{"hook_point": name, "sources": of_name} for name, of_name in sources.items()]


def _model(folder: Path, about: About) -> dict[str, object]:
    local = Path(about.model).is_dir()
    config = os.path.relpath(Path(about.model).resolve(), folder.resolve()) if local else f"hf:{about.model}"
    return {"name": about.name, "config": config, "dtypes": [about.dtype]}


def _probes(path: Path, detectors: Sequence[Detector], hook_point: HookPoint, model: str) -> None:
    tensors = {
        "direction": np.array([d.probe.weight_D for d in detectors], np.float32),
        "bias": np.array([d.probe.bias for d in detectors], np.float32),
    }
    metadata = {
        "names": json.dumps([d.concern for d in detectors]),
        "hook_point": str(hook_point),
        "model": model,
    }
    with storage.atomic_write(path, private=False) as file:
        file.write(safetensors.numpy.save(tensors, metadata))


def _feature(detector: Detector, about: About) -> dict[str, object]:
    own, of_text = detector.mean_tpr(Kind.HARD)
    hard = [row for row in detector.rows if row.negatives is Kind.HARD]
    concern = written.concerns()[detector.concern]
    window = {} if detector.settings.window_tokens == 1 else {"window_tokens": detector.settings.window_tokens}
    return {
        "name": detector.concern,
        "id": detector.concern,
        "label": concern["label"] + ("" if detector.beats_text else " (no better than the text alone)"),
        "severity": concern["severity"] if detector.beats_text else "info",
        "skip_first_positions": about.skip_first,
        "limit": {"statistic": detector.settings.statistic, "value": round(detector.limit, 4), **window},
        "evidence": {
            "auroc": round(float(np.mean([row.auroc for row in hard])), 4),
            "tpr_at_fpr_1pct": round(own, 4),
            "n": sum(row.n for row in hard) + hard[0].n_negative,
            "n_positive": sum(row.n for row in hard),
            "split": "families that had no part in fitting or choosing, against hard harmless texts",
            "aggregation": f"{detector.settings.statistic} over tokens",
            "measured_on": "contrast texts of latentwatch and the public sets that are installed",
            "remarks": _remarks(detector, about, own, of_text),
        },
    }


def _remarks(detector: Detector, about: About, own: float, of_text: float) -> str:
    verdict = "Better than" if detector.beats_text else "NOT better than"
    lines = [
        f"{verdict} the best text classifier by 10 points: {own:.0%} against {of_text:.0%} at 1 % false positives.",
        f"The limit is exceeded by {about.exceedance_rate:.1%} of {detector.n_ordinary} requests: {about.traffic}.",
        *(f"{row.family}: {_shown(row)}." for row in detector.rows),
    ]
    return " ".join(lines)


def _shown(row: FamilyRow) -> str:
    return (
        f"{row.tpr.value:.0%} ({row.tpr.low:.0%} to {row.tpr.high:.0%}) of {row.n} against {row.n_negative} "
        f"{row.negatives} texts, text {row.text.value:.0%}, length {row.tpr_length:.0%}"
    )


def _notes(about: About) -> str:
    lines = [
        f"Written by `latentwatch watchlist start` for {about.name} in {about.dtype}.",
        f"The first {about.skip_first} positions are left out: all prompts share their first {about.shared_prefix} "
        "tokens, which the chat template writes.",
        f"Prompts without an answer end with {about.generation_prompt!r}, as in serving.",
    ]
    return "\n".join(lines)


def cards(detectors: Sequence[Detector], about: About) -> str:
    """Every detector's card and the conditions that they share, as Markdown."""
    parts = [f"# Detectors for {about.name}\n", _notes(about), ""]
    if about.too_long:
        parts.append(f"{about.too_long} prompts were too long and are left out.\n")
    if about.missing:
        parts += ["Public sets that are missing here:\n", *(f"- {line}" for line in about.missing), ""]
    for detector in detectors:
        parts.append(_card(detector, about))
    return "\n".join(parts)


def _card(detector: Detector, about: About) -> str:
    own, of_text = detector.mean_tpr(Kind.HARD)
    verdict = "beats" if detector.beats_text else "does not beat"
    settings = detector.settings
    lines = [
        f"## {detector.concern}\n",
        f"{written.concerns()[detector.concern]['label']}. Layer {settings.layer}, {settings.statistic} over "
        f"{settings.window_tokens} token(s). It {verdict} the text by 10 points on "
        f"families that it never saw: {own:.0%} against {of_text:.0%} at 1 % false positives among hard texts.",
        f"Limit {detector.limit:.4g}, exceeded by {about.exceedance_rate:.1%} of {detector.n_ordinary} requests "
        f"({about.traffic}).\n",
        "| family | against | n | TPR at 1 % FPR | text | length | better by | AUROC | text |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in detector.rows:
        interval = f"{row.tpr.value:.0%} ({row.tpr.low:.0%} to {row.tpr.high:.0%})"
        better = f"{row.better_by.value:+.0%} ({row.better_by.low:+.0%} to {row.better_by.high:+.0%})"
        lines.append(
            f"| {row.family} | {row.negatives} | {row.n}, {row.n_negative} | {interval} | {row.text.value:.0%} "
            f"({row.text_by}) | {row.tpr_length:.0%} | {better} | {row.auroc:.3f} | {row.auroc_text:.3f} |"
        )
    lines.append("\nOn the selection families (AUROC and TPR, averaged):\n")
    best = sorted(detector.selection.items(), key=lambda one: -one[1])[:5]
    lines += [f"- layer {s.layer}, {s.statistic}, strength {s.strength}: {figure:.3f}" for s, figure in best]
    return "\n".join([*lines, ""])


def _text(path: Path, text: str) -> None:
    with storage.atomic_write(path, private=False) as file:
        file.write(text.encode())
