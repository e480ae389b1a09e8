"""A sample of `make bench-architectures`: exact, with the answers of an engine without the monitor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.architectures import catalogue
from tests.bench.architectures.walk import Forks, walk

pytestmark = pytest.mark.engine

ROWS = {row.name: row for row in catalogue.rows()}


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks(seconds=120.0)
    yield forks
    forks.close()


@pytest.mark.parametrize(
    "name",
    [
        # The whole stream, and beside it what it was before.
        "Exaone4ForCausalLM, eager",
        # By the Transformers backend, [1, T, D].
        "Olmo2ForCausalLM, eager",
        # Attention and Mamba side by side in each layer.
        "FalconH1ForCausalLM, eager",
        # Norms behind attention and MLP, and a scaled embedding.
        "Gemma2ForCausalLM, transformers",
    ],
)
def test_an_architecture_is_scored_exactly_and_answers_as_without_the_monitor(name: str, forks: Forks, tmp_path: Path):
    found = walk(ROWS[name], tmp_path, forks)
    assert (found["outcome"], found["reason"]) == ("exact", "")
