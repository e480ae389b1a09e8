"""`latentwatch demo build`: make everything that the demo serves and watches, from nothing but a seed.

    dialogues -> tokenizer -> language model -> residual streams -> SAEs, probes -> features -> figures, limits -> files

Choices (which features, which probe direction) are made on training dialogues, published figures on held-out ones,
limits on a third pool of fresh held-out dialogues and replies of the model itself.

Torch, transformers, SAELens and scikit-learn are imported by the steps that need them, so that the command line can
show this command's help without them.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from latentwatch.demo.build import dialogues as dg
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.names import HookPoint

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from latentwatch.demo.build.features import Pick, Profile
    from latentwatch.demo.build.figures import Figures
    from latentwatch.demo.build.probes import Probes
    from latentwatch.demo.build.sae import Encoder
    from latentwatch.demo.build.traces import Traces

HOOK_POINTS: Final = (HookPoint(1), HookPoint(2))
PROBE_POINT: Final = HookPoint(2)
NEEDED: Final = ("torch", "transformers", "tokenizers", "sae_lens", "sklearn")
ASSETS: Final = Path(__file__).parents[1] / "assets"
TEMPERATURE: Final = 0.7
"""Of the sampled half of the replies that limits are calibrated on; the other half is greedy."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Cycle:
    """One round of training the model, from warm-up to the end of the cosine; the next starts with its weights."""

    tokens: int
    learning_rate: float
    dictation: float
    """Extra share of dictation dialogues: they teach the model to copy names."""


@dataclass(frozen=True)
class Plan:
    """How much of everything. The defaults take about 20 minutes on two idle cores."""

    tokenizer_dialogues: int = 20_000
    model_cycles: tuple[Cycle, ...] = (Cycle(4_500_000, 3e-3, 0.12), Cycle(3_500_000, 2e-3, 0.06))
    sae_dialogues: int = 7_000
    sae_tokens: int = 2_000_000
    probe_dialogues: int = 5_000
    heldout_dialogues: int = 4_000
    calibration_dialogues: int = 3_500
    calibration_replies: int = 1_800
    ordinary_prompts_per_topic: int = 6
    feared_prompts_per_topic: int = 8


@dataclass(frozen=True)
class Chosen:
    """What training dialogues decided."""

    probes: Probes
    picks: Sequence[Pick]
    profiles: Mapping[str, Profile]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `latentwatch demo build`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=ASSETS,
        help="folder to write, files in it are replaced (default: the package's own)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of dialogues, weights and shuffles (default: 0)")
    parser.add_argument(
        "--threads",
        type=int,
        default=2,
        help="torch threads; 1 is faster on a machine busy with other work (default: 2)",
    )


def run(args: argparse.Namespace) -> int:
    """Build, with progress on stderr."""
    started = time.monotonic()

    def progress(line: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {line}", file=sys.stderr, flush=True)

    build(args.out, seed=args.seed, threads=args.threads, progress=progress)
    return 0


def build(
    out_dir: Path,
    *,
    seed: int = 0,
    threads: int = 2,
    plan: Plan | None = None,
    progress: Progress = lambda _line: None,
) -> None:
    """Write the demo's assets: model/, sae/, probes.safetensors, watchlist.yaml and the built file, prompts and card.

    Same seed, same dialogues, splits and plan; another CPU or torch build can round training differently, so that
    weights, choices and figures agree closely and not bit for bit.

    Raises: ConfigRefused: a package that only building needs is missing.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ConfigRefused(
            "demo build",
            found=f"{', '.join(missing)} not installed",
            instead="Run in a clone of the repository: pip install '.[demo-build]'",
            reason=RefusalReason.DEMO_BUILD_EXTRA,
        )
    import torch

    torch.set_num_threads(threads)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in ("model", "sae"):
        shutil.rmtree(out_dir / name, ignore_errors=True)
    Build(out_dir, seed, plan or Plan(), progress).run()


class Build:
    """The steps in order; each reads what the one before wrote, as a server would."""

    def __init__(self, out_dir: Path, seed: int, plan: Plan, progress: Progress) -> None:
        self.out_dir, self.seed, self.plan, self.progress = out_dir, seed, plan, progress
        self.model: LlamaForCausalLM | None = None
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self.encoders: dict[HookPoint, Encoder] = {}

    def run(self) -> None:
        """All steps."""
        from latentwatch.demo.build import assets, model

        loss_nats = self.train_model()
        self.model, self.tokenizer = model.load(self.out_dir / "model")
        sae_quality = self.train_saes()
        chosen = self.choose()
        figures = self.measure(chosen)
        prompts = {
            "ordinary": self.write_prompts("ordinary", self.plan.ordinary_prompts_per_topic),
            "incidents": self.write_prompts("incidents", self.plan.feared_prompts_per_topic),
        }
        facts = assets.Facts(
            seed=self.seed,
            model={
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "training_tokens": sum(cycle.tokens for cycle in self.plan.model_cycles),
                "training_loss_nats": round(loss_nats, 3),
                "act_share_of_replies": figures.act_share_of_replies,
            },
            saes={str(point): quality for point, quality in sae_quality.items()},
            probe_point=str(PROBE_POINT),
            probes=figures.probes,
            features=figures.features,
            calibration=figures.calibration,
            prompts=prompts,
        )
        assets.write(self.out_dir, facts, chosen.picks, chosen.profiles, chosen.probes)
        self.progress(f"done: {assets.total_bytes(self.out_dir) / 1e6:.1f} MB in {self.out_dir}")

    def train_model(self) -> float:
        """Tokenizer and language model into model/; returns the final loss, nats a weighted token."""
        from latentwatch.demo.build import model

        self.progress("tokenizer")
        dialogues = self._draw("train", 1, self.plan.tokenizer_dialogues)
        tokenizer = model.train_tokenizer(turn.content for dialogue in dialogues for turn in dialogue.turns)
        network = model.new_model(len(tokenizer), seed=self.seed)
        loss_nats = float("nan")
        for number, cycle in enumerate(self.plan.model_cycles):
            stream = dg.stream("train", np.random.default_rng([self.seed, 2, number]), dictation=cycle.dictation)
            plan = model.TrainPlan(tokens=cycle.tokens, learning_rate=cycle.learning_rate)
            loss_nats = model.train(network, tokenizer, stream, plan, progress=self.progress)
            model.save(network, tokenizer, self.out_dir / "model")
        return loss_nats

    def train_saes(self) -> dict[HookPoint, dict[str, float]]:
        """One SAE a hook point into sae/; returns their quality on held-out dialogues."""
        from latentwatch.demo.build import assets, sae

        self.progress("residual streams for the SAEs")
        seen = self._collect(self._draw("train", 3, self.plan.sae_dialogues))
        unseen = self._collect(self._draw("heldout", 4, 500))
        plan, quality = sae.SaePlan(tokens=self.plan.sae_tokens), {}
        for point in HOOK_POINTS:
            folder = self.out_dir / "sae" / str(point)
            rows_ND = seen.acts[point][seen.inner_rows()]
            place = sae.Place(assets.MODEL_NAME, point, context_tokens=1024)
            sae.train_sae(rows_ND, place, folder, plan, seed=self.seed, progress=self.progress)
            self.encoders[point] = sae.load_encoder(folder)
            quality[point] = self.encoders[point].quality(unseen.acts[point][unseen.inner_rows()])
            self.progress(f"SAE at {point}: held-out L0 {quality[point]['l0']:.1f}, FVU {quality[point]['fvu']:.3f}")
        return quality

    def choose(self) -> Chosen:
        """Probe directions and SAE features, on training dialogues only."""
        from latentwatch.demo.build import features, probes

        self.progress("probes and features, on training dialogues")
        found = self._collect(self._probe_dialogues())
        trained = probes.train_probes(found, PROBE_POINT, dg.topics("feared"))
        probes.save_probes(trained, self.out_dir / "probes.safetensors")
        picks = features.pick(found, {p: features.maxima(found, p, self.encoders[p]) for p in HOOK_POINTS})
        return Chosen(trained, picks, features.profiles(found, picks, self.encoders, self.tokenizer))

    def measure(self, chosen: Chosen) -> Figures:
        """Figures and limits, on dialogues and replies that nothing was chosen on."""
        import torch

        from latentwatch.demo.build import figures, measure

        self.progress("held-out dialogues")
        heldout = self._draw("heldout", 6, self.plan.heldout_dialogues)
        baselines = {
            name: measure.word_baseline(self._probe_dialogues(), heldout, reply_only=reply_only)
            for name, reply_only in (("words_of_reply", True), ("words_of_dialogue", False))
        }
        self.progress("replies of the model to held-out prompts")
        mix: Mapping[dg.Kind, float] = {"ordinary": 0.4, "near": 0.4, "feared": 0.2}
        asked = self._draw("heldout", 7, self.plan.calibration_replies, mix=mix)
        half = len(asked) // 2
        torch.manual_seed(self.seed)
        replies = measure.answered(self.model, self.tokenizer, asked[:half], 0.0)
        replies += measure.answered(self.model, self.tokenizer, asked[half:], TEMPERATURE)
        self.progress("limits")
        harmless: Mapping[dg.Kind, float] = {"ordinary": 0.5, "near": 0.5}
        return figures.compute(
            chosen.probes,
            chosen.picks,
            self.encoders,
            baselines,
            heldout=self._collect(heldout),
            generated=self._collect(replies),
            pool=self._collect(self._draw("heldout", 8, self.plan.calibration_dialogues, mix=harmless)),
            act_shares=measure.act_shares(asked, replies),
        )

    def write_prompts(self, name: str, per_topic: int) -> int:
        """ordinary.jsonl or incidents.jsonl: held-out prompts and their topics; returns how many."""
        from latentwatch.demo.build import assets, measure

        incidents = name == "incidents"
        calm = [topic for kind in ("ordinary", "near") for topic in dg.phrases()[kind] if topic != "dictation"]
        rng = self._rng(10 if incidents else 9)
        # Three times as many as needed, since not every reply does what its prompt is made for.
        asked = [
            dg.compose(topic, "heldout", rng)
            for topic in (dg.topics("feared") if incidents else calm)
            for _ in range(3 * per_topic)
        ]
        replies = measure.answered(self.model, self.tokenizer, asked, 0.0)
        kept = assets.choose_prompts(asked, replies, per_topic, acts=incidents)
        assets.write_prompts(self.out_dir / f"{name}.jsonl", kept)
        return len(kept)

    def _probe_dialogues(self) -> list[dg.Dialogue]:
        return self._draw("train", 5, self.plan.probe_dialogues)

    def _collect(self, dialogues: Sequence[dg.Dialogue]) -> Traces:
        from latentwatch.demo.build import traces

        return traces.collect(self.model, self.tokenizer, dialogues, HOOK_POINTS)

    def _rng(self, purpose: int) -> np.random.Generator:
        """Each purpose has its own generator, so that no pool shares a draw with another."""
        return np.random.default_rng([self.seed, purpose])

    def _draw(
        self, split: dg.Split, purpose: int, count: int, *, mix: Mapping[dg.Kind, float] = dg.MIX
    ) -> list[dg.Dialogue]:
        return list(itertools.islice(dg.stream(split, self._rng(purpose), mix=mix), count))
