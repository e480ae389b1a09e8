"""What a compaction launch looks like for a step, as plain functions: nothing is compiled here."""

from __future__ import annotations

import pytest
import torch
from latentwatch.kernels.compact import HEAD, Compactor


def compactor(max_rows: int, *, features: int = 20, dense: int = 3, capacity: int = 1 << 18) -> Compactor:
    acts = [torch.zeros(max_rows, features // 2), torch.zeros(max_rows, features - features // 2)]
    stats = [torch.zeros(max_rows, 3) for _ in acts]
    return Compactor(acts, stats, torch.arange(features) < dense, capacity=capacity)


@pytest.mark.parametrize("max_rows", [1, 16, 2049, 4097, 8192, 20_000])
def test_warming_up_takes_every_shape_that_a_step_can_take(max_rows: int) -> None:
    made = compactor(max_rows)
    warmed = [made.constants(rows) for rows in made.steps()]
    assert all(made.constants(rows) in warmed for rows in range(1, max_rows + 1, 13))


@pytest.mark.parametrize("rows", [1, 7, 512, 2048, 2049, 8192, 8193, 20_000])
def test_every_row_has_a_program_and_every_program_a_word(rows: int) -> None:
    made = compactor(20_000)
    shape = made.constants(rows)
    programs = -(-rows // shape["BLOCK_R"])
    assert programs <= shape["BLOCKS"] <= made.constants(20_000)["BLOCKS"]


@pytest.mark.parametrize("rows", [1, 2, 33, 500])
def test_the_parts_of_a_step_lie_side_by_side_in_the_buffer(rows: int) -> None:
    made = compactor(500, features=21, dense=4)
    layout = made.layout(rows)
    places = sorted(layout[2:-1])
    assert places[0] == HEAD and places == list(layout[2:-1]) and places[-1] <= layout.words
    assert layout.words <= made.layout(500).words


def test_a_decode_step_travels_in_kilobytes() -> None:
    """8 rows of 256 features: the copy to the host is what a small step pays for."""
    made = compactor(8192, features=256, dense=8)
    assert made.layout(8).words * 4 < 32 << 10


def test_a_step_never_reserves_more_than_it_could_fire() -> None:
    assert compactor(64, features=10, dense=4, capacity=1 << 18).layout(5).capacity == 5 * 6
    assert compactor(64, features=10, dense=4, capacity=7).layout(5).capacity == 7
