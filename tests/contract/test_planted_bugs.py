"""Bugs that did harm elsewhere, or that no test here noticed once, put back one at a time: a named test must fail.

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

RECEIVER, CREDENTIALS = "tests/unit/transport/test_receiver.py", "tests/unit/transport/test_credentials.py"
PSEUDONYMS, DRIFT = "tests/unit/collector/test_pseudonyms.py", "tests/unit/collector/test_drift.py"
STORAGE, REQUESTS = "tests/unit/test_storage.py", "tests/unit/aggregate/test_requests.py"
NEVER_LEARNT = "test_what_may_be_an_attack_is_never_among_what_is_calibrated_from"
ON_DISK = "test_it_is_on_the_disk_before_it_takes_the_place_of_the_old_one_and_its_folder_after"
AT_THE_LIMIT = "test_a_score_at_the_limit_is_within_it_and_the_next_one_above_is_not"

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
    "an ack before the journal is written": Bug(
        "monitor/latentwatch/transport/servicer.py",
        "            self._sink.commit()\n            await context.write(codec.encode_reply(codec.Ack(stored)))",
        "            await context.write(codec.encode_reply(codec.Ack(stored)))\n            self._sink.commit()",
        f"{RECEIVER}::test_no_ack_leaves_before_its_batch_was_committed",
    ),
    "a welcome before the journal is written": Bug(
        "monitor/latentwatch/transport/servicer.py",
        "            stored = self._sink.hello(hello, self._clock())\n            self._sink.commit()",
        "            stored = self._sink.hello(hello, self._clock())",
        f"{RECEIVER}::test_no_ack_leaves_before_its_batch_was_committed",
    ),
    "eight characters of a token compared": Bug(
        "monitor/latentwatch/transport/credentials.py",
        "hmac.compare_digest(shown, one.encode())",
        "hmac.compare_digest(shown[:8], one.encode()[:8])",
        f"{CREDENTIALS}::test_a_token_that_differs_in_one_character_is_no_token",
    ),
    "the key of pseudonyms ignored": Bug(
        "monitor/latentwatch/collector/pseudonyms.py",
        "hmac.new(self._key, name",
        "hmac.new(bytes(32), name",
        f"{PSEUDONYMS}::test_a_pseudonym_is_the_hmac_under_the_key_and_nobody_without_it_can_name_a_request",
    ),
    "a canary without its key": Bug(
        "monitor/latentwatch/drift/canary.py",
        "return hmac.new(key, ",
        "return hmac.new(bytes(32), ",
        f"{DRIFT}::test_nobody_without_the_key_can_hide_among_the_canaries",
    ),
    "windows that alarm are learnt": Bug(
        "monitor/latentwatch/drift/model.py",
        "        if self._alarming():\n            # What",
        "        if False:\n            # What",
        f"{DRIFT}::{NEVER_LEARNT}",
    ),
    "the largest values of windows that alarm are learnt": Bug(
        "monitor/latentwatch/drift/model.py",
        "        if not self._alarming():\n            self.observed.add_tail",
        "        if True:\n            self.observed.add_tail",
        f"{DRIFT}::{NEVER_LEARNT}",
    ),
    "deleted rows are not overwritten": Bug(
        "monitor/latentwatch/evidence/segment.py",
        "PRAGMA secure_delete = ON",
        "PRAGMA secure_delete = OFF",
        "tests/unit/evidence/test_store.py::test_a_deletion_overwrites_and_need_not_rewrite_the_file",
    ),
    "a file takes its place before it is on the disk": Bug(
        "monitor/latentwatch/storage.py",
        "            file.flush()\n            os.fsync(file.fileno())",
        "            file.flush()",
        f"{STORAGE}::{ON_DISK}",
    ),
    "a rename that is not on the disk": Bug(
        "monitor/latentwatch/storage.py",
        "    sync_folder(path.parent)\n",
        "",
        f"{STORAGE}::{ON_DISK}",
    ),
    "float16 not clipped in the engine": Bug(
        "monitor/latentwatch/engines/vllm/read_buffers.py",
        "np.clip(dense, -_F16_MAX, _F16_MAX)",
        "dense",
        f"{TAP}::test_dense_scores_beyond_float16_are_clipped_on_their_way_into_the_slot",
    ),
    "float16 not clipped in a rolling mean": Bug(
        "monitor/latentwatch/aggregate/requests.py",
        'np.clip(fires["act"], -FLOAT16_MAX, FLOAT16_MAX)',
        'fires["act"]',
        f"{REQUESTS}::test_an_activation_beyond_float16_counts_as_its_largest_value_in_a_rolling_mean",
    ),
    "the limit itself exceeds, sparse": Bug(
        "monitor/latentwatch/aggregate/requests.py",
        "np.flatnonzero((act > table",
        "np.flatnonzero((act >= table",
        f"{REQUESTS}::{AT_THE_LIMIT}[sparse]",
    ),
    "the limit itself exceeds, dense": Bug(
        "monitor/latentwatch/aggregate/requests.py",
        "np.nonzero((score_RP > table",
        "np.nonzero((score_RP >= table",
        f"{REQUESTS}::{AT_THE_LIMIT}[dense]",
    ),
    "the limit itself exceeds, rolling": Bug(
        "monitor/latentwatch/aggregate/rolling.py",
        "(mean_RG > self._limit_G)",
        "(mean_RG >= self._limit_G)",
        f"{REQUESTS}::{AT_THE_LIMIT}[rolling]",
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
        assert text.count(bug.right) == 1, f"{bug.file} has {text.count(bug.right)} times {bug.right!r}"
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
    assert " failed" in result.stdout
