"""From chats to the watched rows of an SAE: see `python -m latentwatch.demo.build.chat_sae --help`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.names import HookPoint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from latentwatch.demo.build.chat_sae.chats import Piece
    from latentwatch.demo.build.chat_sae.choose import Choice
    from latentwatch.demo.build.chat_sae.stream import Harvest, Progress
    from latentwatch.demo.build.sae import Encoder, SaePlan
    from latentwatch.watchlist.figures import Dictionary

NEEDED: Final = ("torch", "transformers", "sae_lens")
CANDIDATE_CHATS: Final = 6_000
"""Read and tokenised; those that are shorter than a piece fall out."""


@dataclass(frozen=True)
class Plan:
    """How much of everything. The defaults take about 30 CPU minutes."""

    hook_point: HookPoint = HookPoint(14)  # noqa: RUF009  # a frozen value
    pieces: int = 1_800
    context_tokens: int = 256
    heldout_pieces: int = 120
    """The last of them: nothing is trained on these chats."""
    loss_pieces: int = 40
    """Of the held out ones, for the losses with a spliced reconstruction."""
    tokens: int = 3_500_000
    width: int = 4096
    k_active: int = 32
    seed: int = 0


@dataclass
class Work:
    """The model and what of it is on disk."""

    model_folder: Path
    name: str
    folder: Path
    plan: Plan
    progress: Progress

    def __post_init__(self) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.model_folder)

    def model(self, dtype: str) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.model_folder, dtype=dtype).eval()
        return model

    def pieces(self) -> list[Piece]:
        """The chats that are read, in an order of the seed."""
        from itertools import islice

        from latentwatch.demo.build.chat_sae import chats

        return chats.pieces(
            list(islice(chats.read_chats(chats.wheel_file()), CANDIDATE_CHATS)),
            self.tokenizer,
            self.plan.pieces,
            context_tokens=self.plan.context_tokens,
            rng=np.random.default_rng(self.plan.seed),
        )

    def stream(self, pieces: Sequence[Piece]) -> Harvest:
        """The stream over the pieces, in bfloat16: its rounding is far below what an SAE leaves unexplained."""
        from transformers import AutoConfig

        from latentwatch.demo.build.chat_sae import stream

        width = AutoConfig.from_pretrained(self.model_folder).hidden_size
        written = stream.Harvest(self.folder / "stream", pieces[0].first)
        if written.done == len(pieces):
            return written
        inner = stream.cut_model(self.model("bfloat16"), self.plan.hook_point)
        return stream.harvest(inner, pieces, written.folder, width=width, progress=self.progress)

    def encoder(self, harvest: Harvest) -> Encoder:
        """The whole SAE, trained unless it lies there."""
        from latentwatch.demo.build import sae

        folder = self.folder / "sae"
        if not (folder / "cfg.json").exists():
            place = sae.Place(self.name, self.plan.hook_point, self.plan.context_tokens, harvest.first)
            rows_ND = usable(harvest, slice(0, -self.plan.heldout_pieces))
            self.progress(f"training on {len(rows_ND)} tokens")
            sae.train_sae(
                rows_ND,
                place,
                folder,
                sae_plan(self.plan),
                seed=self.plan.seed,
                progress=self.progress,
                checkpoints=self.folder / "checkpoints",
            )
        return sae.load_encoder(folder)


def sae_plan(plan: Plan) -> SaePlan:
    """What the training is asked for."""
    from latentwatch.demo.build.sae import SaePlan

    return SaePlan(
        tokens=plan.tokens, width=plan.width, k_active=plan.k_active, batch_tokens=512, bfloat16=True, norm_batches=20
    )


def usable(harvest: Harvest, pieces: slice) -> torch.Tensor:
    """float16 [N, D] of some pieces, attention sinks left out."""
    import torch

    from latentwatch.demo.build.chat_sae.stream import sinks

    acts_PCD = harvest.acts_PCD()[pieces]
    acts_ND = torch.from_numpy(acts_PCD.reshape(-1, acts_PCD.shape[2]).copy())
    norm_N = torch.cat([rows.float().norm(dim=1) for rows in torch.split(acts_ND, 1 << 14)]).numpy()
    return acts_ND[torch.from_numpy(~sinks(norm_N))]


def run(
    model_folder: Path, name: str, folder: Path, out: Path | None, plan: Plan, *, threads: int, progress: Progress
) -> None:
    """Write the watched rows into `out`. Raises: ConfigRefused: a package or the chats are missing."""
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        raise ConfigRefused(
            "training an SAE",
            found=f"{', '.join(missing)} not installed",
            instead="Run in a clone of the repository: pip install '.[demo-build]'.",
            reason=RefusalReason.DEMO_BUILD_EXTRA,
        )
    import torch

    from latentwatch.demo.build.chat_sae import asset

    torch.set_num_threads(threads)
    work = Work(model_folder, name, folder, plan, progress)
    pieces = work.pieces()
    harvest = work.stream(pieces)
    encoder = work.encoder(harvest)
    quality, losses = _quality(work, harvest, encoder, pieces[-plan.heldout_pieces :])
    progress(f"on chats that it did not see: {quality}")
    chosen = _chosen(work, harvest, encoder, quality)
    facts = {"model": name, "plan": {**vars(plan), "hook_point": str(plan.hook_point)}, "quality": quality, **losses}
    asset.write(out or asset.ASSETS, folder / "sae", encoder, chosen, facts)
    progress(f"{len(chosen)} features in {out or asset.ASSETS}")


def _quality(
    work: Work, harvest: Harvest, encoder: Encoder, held_out: Sequence[Piece]
) -> tuple[Dictionary, dict[str, object]]:
    """On chats that were not trained on. Dead is what fires on none of their tokens and of 20,000 others."""
    import torch

    from latentwatch.demo.build.chat_sae import quality

    plan = work.plan
    unseen_ND = usable(harvest, slice(-plan.heldout_pieces, None))
    found = encoder.quality(unseen_ND)
    fired_F = (encoder.activations(torch.cat([unseen_ND, usable(harvest, slice(0, 90))])) > 0).any(0)
    median = float(unseen_ND.float().norm(dim=1).median())
    losses = quality.spliced_losses(
        work.model("float32"), plan.hook_point, encoder, held_out[: plan.loss_pieces], median
    )
    figures: Dictionary = {
        "fvu": round(found["fvu"], 4),
        "l0": round(found["l0"], 2),
        "dead_share": round(float(1 - fired_F.mean()), 5),
        "loss_recovered": round(losses["loss_recovered"], 4),
        "tokens": len(unseen_ND),
    }
    return figures, {"losses": dict(losses)}


def _chosen(work: Work, harvest: Harvest, encoder: Encoder, quality: Dictionary) -> list[Choice]:
    import torch

    from latentwatch.demo.build.chat_sae import choose, stream

    known = choose.sentences()
    inner = stream.cut_model(work.model("float32"), work.plan.hook_point)
    answered = choose.responses(inner, work.tokenizer, encoder, known.texts)
    largest_SF = np.stack([response.acts_TF.max(0) for response in answered])
    unseen_ND = usable(harvest, slice(-work.plan.heldout_pieces, None))
    picks = choose.picks(largest_SF, known, (encoder.activations(unseen_ND) > 0).mean(0).astype(np.float32))
    index_K = torch.tensor([index for index, _ in picks])
    acts_PCD = harvest.acts_PCD()
    chat_acts = [encoder.only(index_K).activations(torch.from_numpy(acts_CD.copy())) for acts_CD in acts_PCD]
    chat_N = np.repeat(np.arange(len(acts_PCD)), acts_PCD.shape[1])
    return choose.choices(picks, known, answered, np.concatenate(chat_acts), chat_N, quality)
