"""The bugs that lost tokens elsewhere, put back one at a time: each must make a named test fail.

Each case runs pytest on a copy of the sources in which one line is replaced; one run on an unchanged copy shows that
the copy itself is sound.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.engines import ROOT


class Bug(NamedTuple):
    file: str
    right: str
    wrong: str
    caught_by: str


TAP, ARMING = "tests/unit/engines/vllm/test_step_tap.py", "tests/unit/engines/vllm/test_arming.py"
LEDGER, INHERITANCE = "tests/unit/exporter/test_ledger.py", "tests/unit/exporter/test_inheritance.py"

BUGS = {
    "the batch order of the scheduler, not of the runner": Bug(
        "monitor/latentwatch/engines/vllm/row_map.py",
        "return _from_v2(batch)",
        "return _from_v1(type(batch)(**{**vars(batch), 'req_ids': list(scheduler_output.num_scheduled_tokens), "
        "'num_computed_tokens_cpu': batch.num_computed_tokens_np}), scheduler_output)",
        f"{TAP}::test_the_v2_row_map_follows_the_batch_order_not_the_schedulers",
    ),
    "a layer's output[0] without the residual": Bug(
        "monitor/latentwatch/engines/vllm/hook.py",
        "_score(module, output[0], output[1])",
        "_score(module, output[0], None)",
        f"{ARMING}::test_every_kind_of_layer_is_scored_on_the_summed_stream",
    ),
    "padding counted as rows": Bug(
        "monitor/latentwatch/engines/vllm/row_map.py",
        "n = batch.num_reqs",
        "n = len(batch.query_start_loc_np) - 1",
        f"{TAP}::test_the_v2_row_map_follows_the_batch_order_not_the_schedulers",
    ),
    "no inheritance": Bug(
        "monitor/latentwatch/exporter/inheritance.py",
        "self._score_cache = score_cache",
        "self._score_cache = None",
        f"{INHERITANCE}::test_a_hit_on_blocks_that_the_same_step_fills_inherits_their_scores",
    ),
    "scores of a block's former owner": Bug(
        "monitor/latentwatch/exporter/inheritance.py",
        "self._score_cache.forget(np.array(blocks[hits:], np.int64))",
        "pass",
        f"{INHERITANCE}::test_a_block_allocated_anew_forgets_even_if_the_step_that_filled_it_was_lost",
    ),
    "every tensor-parallel rank counts": Bug(
        "monitor/latentwatch/engines/vllm/attach.py",
        "return int(self._worker.rank) % int(self._worker.parallel_config.world_size) == 0",
        "return True",
        "tests/unit/engines/vllm/test_attach.py::test_one_rank_of_an_engine_reports",
    ),
    "rejected drafts committed": Bug(
        "monitor/latentwatch/exporter/pending_steps.py",
        "if not self._drafts:",
        "if True:",
        f"{LEDGER}::test_rejected_drafts_are_never_committed",
    ),
    "one position off after a preemption": Bug(
        "monitor/latentwatch/exporter/attribution.py",
        "again_T = position_T < rows.from_Q[request_T]",
        "again_T = position_T < rows.from_Q[request_T] - 1",
        f"{LEDGER}::test_recompute_after_preemption_counts_each_position_once_with_its_first_final_score",
    ),
}


def _all_but_sources(at: str, names: list[str]) -> list[str]:
    return [name for name in names if not (name.endswith(".py") or Path(at, name).is_dir()) or name == "__pycache__"]


def pytest_on_a_copy(folder: Path, tests: list[str], bug: Bug | None) -> subprocess.CompletedProcess[str]:
    for package in ("monitor", "tests"):
        shutil.copytree(ROOT / package, folder / package, ignore=_all_but_sources)
    shutil.copy(ROOT / "pyproject.toml", folder)
    if bug is not None:
        source = folder / bug.file
        text = source.read_text()
        assert text.count(bug.right) == 1, f"{bug.file} has {text.count(bug.right)} lines {bug.right!r}"
        source.write_text(text.replace(bug.right, bug.wrong))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder / 'monitor'}{os.pathsep}{folder}", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_unchanged_copy_passes(tmp_path):
    result = pytest_on_a_copy(tmp_path, sorted({bug.caught_by for bug in BUGS.values()}), None)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_put_back_is_caught(name, tmp_path):
    result = pytest_on_a_copy(tmp_path, [BUGS[name].caught_by], BUGS[name])
    # 1: tests failed. Not 2 or 4: the mutated source was loaded and the test was there.
    assert result.returncode == 1, result.stdout
    assert "1 failed" in result.stdout
