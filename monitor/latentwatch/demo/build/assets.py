"""The files of the demo: prompts, watchlist.yaml with its built file, and the card in JSON and in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Final, TypedDict

import yaml

from latentwatch.demo.build.dialogues import Dialogue
from latentwatch.demo.build.features import ACTS, Pick, Profile, label
from latentwatch.demo.build.figures import Calibration, FeatureFigures, ProbeFigures
from latentwatch.demo.build.measure import Detection
from latentwatch.demo.build.probes import WINDOW, Probes
from latentwatch.watchlist.build import build as build_watchlist

MODEL_NAME: Final = "latentwatch-demo"
SPLIT: Final = "held-out sentence templates and vocabulary"
HONEST: Final = (
    "A toy. The model has about a million parameters and knows only the dialogues that a list of phrases "
    "(phrases.yaml) can make; it was trained to show these acts on purpose, so that a page can be demonstrated. "
    "Its 'deception' or 'power seeking' is a mode of a text generator, not an intention, and the figures say "
    "nothing about detecting such behaviour in a real model. What is real: the weights, SAEs, probes and "
    "activations are of the kinds and formats used on large models, and the figures are measured on sentence "
    "templates and names that neither model nor probes saw. Common words and verbs are shared by both splits, and"
    " the three trigger phrases are the same in both."
)


class ModelFacts(TypedDict):
    """The language model: its size, how it was trained, and which share of its replies shows each act."""

    parameters: int
    training_tokens: int
    training_loss_nats: float
    act_share_of_replies: dict[str, float]


@dataclass(frozen=True)
class Facts:
    """card.json: how the assets were made and what was measured on them."""

    seed: int
    model: ModelFacts
    saes: Mapping[str, Mapping[str, float]]
    probe_point: str
    probes: Mapping[str, ProbeFigures]
    features: Mapping[str, FeatureFigures]
    calibration: Calibration
    prompts: Mapping[str, int]


def write(out_dir: Path, facts: Facts, picks: Sequence[Pick], profiles: Mapping[str, Profile], probes: Probes) -> None:
    """Write card.json, card.md, watchlist.yaml and the watchlist built from it."""
    (out_dir / "card.json").write_text(json.dumps(asdict(facts), indent=1) + "\n", "utf-8")
    (out_dir / "card.md").write_text(card_text(facts), "utf-8")
    document = watchlist(facts, picks, profiles, probes)
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
    (out_dir / "watchlist.yaml").write_text("# Written by `latentwatch demo build`.\n" + text, "utf-8")
    build_watchlist(out_dir / "watchlist.yaml", out_dir / "demo.watchlist.safetensors")


def total_bytes(folder: Path) -> int:
    """Size of all files of the folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def choose_prompts(asked: Sequence[Dialogue], replies: Sequence[Dialogue], count: int, *, acts: bool) -> list[Dialogue]:
    """Up to `count` prompts a topic whose greedy reply shows the act (or, for ordinary traffic, shows none)."""
    reply_of = {dialogue.prompt: dialogue for dialogue in replies}
    kept: dict[str, list[Dialogue]] = {}
    for dialogue in asked:
        reply = reply_of.get(dialogue.prompt)
        if reply is not None and (reply.topic == dialogue.topic if acts else not reply.feared):
            kept.setdefault(dialogue.topic, []).append(dialogue)
    return [dialogue for rows in kept.values() for dialogue in rows[:count]]


def write_prompts(path: Path, dialogues: Sequence[Dialogue]) -> None:
    """One JSON object a line: topic, kind, near (the feared topic of a near miss), messages for the chat API."""
    lines = [
        json.dumps({"topic": d.topic, "kind": d.kind, "near": d.near, "messages": [asdict(turn) for turn in d.prompt]})
        for d in dialogues
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def watchlist(
    facts: Facts, picks: Sequence[Pick], profiles: Mapping[str, Profile], probes: Probes
) -> dict[str, object]:
    """watchlist.yaml as plain data."""
    points = sorted({pick.hook_point for pick in picks} | {probes.hook_point})
    hooks = []
    for point in points:
        rows = [_feature_row(p, profiles[p.id], facts.features[p.id]) for p in picks if p.hook_point == point]
        sources: list[dict[str, object]] = [
            {"format": "saelens", "path": f"sae/{point}", "licence": "Apache-2.0", "features": rows}
        ]
        if point == probes.hook_point:
            rows = [_probe_row(name, probes.window, facts.probes[name]) for name in probes.names]
            sources.append(
                {"format": "linear_probe", "path": "probes.safetensors", "licence": "Apache-2.0", "features": rows}
            )
        hooks.append({"hook_point": str(point), "sources": sources})
    return {
        "name": MODEL_NAME,
        "notes": HONEST,
        "model": {"name": MODEL_NAME, "dtypes": ["bfloat16", "float32"], "config": "model"},
        "hook_points": hooks,
    }


def _probe_row(name: str, window: int, figures: ProbeFigures) -> dict[str, object]:
    remarks = (
        f"{figures['acts_above_limit']:.1%} of held-out acts are above the limit, and "
        f"{figures['heldout_harmless_above_limit']} harmless held-out dialogues."
    )
    if said := figures["generated"]:
        remarks += f" On the model's own replies: AUROC {said.auroc}, TPR at 1 % FPR {said.tpr_at_fpr_1pct}."
    return {
        "name": name,
        "id": f"probe_{name}",
        "label": f"The model is {ACTS[name]}",
        "severity": "critical",
        "limit": {"statistic": "rolling_mean", "window_tokens": window, "value": figures["limit"], "phase": "output"},
        "evidence": {
            **asdict(figures["heldout"]),
            "split": SPLIT,
            "aggregation": f"largest mean over {window} consecutive output tokens",
            "measured_on": "dialogues of the demo generator; ordinary, near-miss and other feared ones are negatives",
            "label_source": "the generator's topic",
            "remarks": remarks,
        },
    }


def _feature_row(pick: Pick, profile: Profile, figures: FeatureFigures) -> dict[str, object]:
    row: dict[str, object] = {
        "index": pick.index,
        "id": pick.id,
        "label": label(pick, profile),
        "severity": ("warning" if "limit" in figures else "info") if pick.feared else "none",
    }
    if "limit" in figures:
        row["limit"] = {"statistic": "max", "value": figures["limit"], "phase": "output"}
    evidence = {
        **asdict(figures["heldout"]),
        "split": SPLIT,
        "aggregation": "max over output tokens" if pick.feared else "max over all tokens but the first",
        "base_rate": figures["base_rate"],
        "measured_on": f"dialogues of the demo generator: topic {pick.topic} against all others",
        "label_source": "topic of highest AUROC on training dialogues, tokens of largest total activation",
        "top_tokens": [dict(example) for example in profile.examples],
    }
    if figures["also_fires_in"]:
        evidence["confounds"] = [f"fires in {other} too" for other in figures["also_fires_in"]]
    return {**row, "evidence": evidence}


def card_text(facts: Facts) -> str:
    """card.md: the facts for people."""
    template = resources.files("latentwatch.demo.build").joinpath("card_template.md").read_text("utf-8")
    return template.format(
        name=MODEL_NAME,
        honest=HONEST,
        seed=facts.seed,
        window=WINDOW,
        probe_point=facts.probe_point,
        **{key: facts.model[key] for key in ("parameters", "training_tokens", "training_loss_nats")},
        rule=facts.calibration["rule"],
        harmless_dialogues=facts.calibration["harmless_dialogues"],
        harmless_replies=facts.calibration["harmless_replies"],
        harmless_ordinary=facts.calibration["harmless_of_kind_ordinary"],
        probe_rows="\n".join(_probe_line(name, figures) for name, figures in facts.probes.items()),
        limit_rows="\n".join(_limit_line(name, figures) for name, figures in facts.probes.items()),
        sae_rows="\n".join(
            _row(point, f"{q['l0']:.1f}", f"{q['fvu']:.3f}", q["silent_features"]) for point, q in facts.saes.items()
        ),
        feature_rows="\n".join(_feature_line(name, figures) for name, figures in facts.features.items()),
        act_shares=", ".join(f"{topic} {share:.0%}" for topic, share in facts.model["act_share_of_replies"].items()),
        ordinary_prompts=facts.prompts["ordinary"],
        incident_prompts=facts.prompts["incidents"],
    )


def _probe_line(name: str, figures: ProbeFigures) -> str:
    held, said = figures["heldout"], figures["generated"]
    return _row(
        ACTS[name],
        f"{held.auroc:.4f}",
        f"{held.tpr_at_fpr_1pct:.3f}",
        f"{held.n} ({held.n_positive})",
        _pair(figures["words_of_reply"]),
        _pair(figures["words_of_dialogue"]),
        f"{_pair(said)} ({said.n_positive})" if said else "none",
    )


def _limit_line(name: str, figures: ProbeFigures) -> str:
    own = figures["generated_acts_above_limit"]
    return _row(
        ACTS[name],
        figures["limit"],
        f"{figures['acts_above_limit']:.1%}",
        "none" if own is None else f"{own:.1%}",
        figures["heldout_harmless_above_limit"],
    )


def _feature_line(name: str, figures: FeatureFigures) -> str:
    held = figures["heldout"]
    return _row(
        name,
        figures["topic"],
        f"{held.auroc:.4f}",
        f"{held.tpr_at_fpr_1pct:.3f}",
        f"{figures['base_rate']:.3%}",
        figures.get("limit", "-"),
        ", ".join(figures["also_fires_in"]) or "-",
    )


def _pair(found: Detection) -> str:
    return f"{found.auroc:.4f}, {found.tpr_at_fpr_1pct:.3f}"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
