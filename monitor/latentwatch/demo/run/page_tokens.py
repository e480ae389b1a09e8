"""Tokens of true and of false pages with their logits: numbers from the evidence, words from vLLM's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import httpx

from latentwatch.demo.run.detection import Detection, HeatMap, Token
from latentwatch.demo.run.stack import Launcher, Stack
from latentwatch.demo.run.traffic import Answer
from latentwatch.demo.smollm2.card import FeatureCard


async def heat_maps(detection: Detection, launcher: Launcher, stack: Stack, model: str) -> list[HeatMap]:
    """Of each detector's clearest true page, and of the clearest false ones. What is not kept is left out."""
    chosen = []
    for feature in detection.card.features.values():
        for true in (True, False):
            answers = _paged(detection, feature, true=true)
            if answers:
                chosen.append((feature, answers[0], true))
    chosen.sort(key=lambda choice: not choice[2])
    found = []
    for feature, answer, true in chosen:
        # A picture that cannot be drawn is no reason to lose the report.
        with suppress(httpx.HTTPError, KeyError, IndexError, ValueError):
            tokens = await _tokens(feature, answer, launcher, stack, model, detection.card.shared_positions)
            found.append(HeatMap(answer.response_id, feature.concern, true, feature.limit, tokens))
    return found


def _paged(detection: Detection, feature: FeatureCard, *, true: bool) -> list[Answer]:
    """Requests that this detector paged about, the shortest first: they are read at a glance."""
    over = {e.response_id for e in detection.exceedances if e.feature == feature.id and e.severity == "critical"}
    paged = [
        answer
        for answer in detection.answers
        if answer.response_id in over
        and (answer.prompt.concern == feature.concern if true else not answer.prompt.feared)
    ]
    return sorted(paged, key=lambda answer: answer.prompt_tokens)


async def _tokens(
    feature: FeatureCard, answer: Answer, launcher: Launcher, stack: Stack, model: str, shared_positions: int
) -> Sequence[Token]:
    asked = {
        "model": model,
        "messages": [dict(message) for message in answer.prompt.messages],
        "add_generation_prompt": True,
        "return_token_strs": True,
    }
    response = await launcher.client.post(f"{stack.engine_url}/tokenize", json=asked)
    words: list[str] = response.raise_for_status().json()["token_strs"]
    listed: dict[str, Any] = await launcher.json(
        f"{stack.collector_url}/v1/evidence/requests/{quote(answer.response_id, safe='')}"
    )
    kept = next(row for row in listed["requests"][0]["activations"] if row["feature"] == feature.id)
    logits = dict(zip(kept["positions"], kept["values"], strict=True))
    return [
        Token(_word(word), logits.get(position)) for position, word in enumerate(words) if position >= shared_positions
    ]


def _word(token: str) -> str:
    """A token of byte pairs as people write it."""
    return token.replace("Ġ", " ").replace("Ċ", "⏎\n")
