"""A sample of what `make fuzz` does, the same each time: bounded by a count, not by a clock."""

from __future__ import annotations

import random
import resource
import time
import zlib
from pathlib import Path

import latentwatch
import pytest

from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS
from tests.fuzz.targets.target import MIB, SECONDS, Target

INPUTS = {"journal": 40, "checkpoint": 100, "baseline file": 100, "evidence segment": 200}
"""Of the slow ones."""
FOUND = {
    "environment": [b"\0unix:/\xff/a.sock", b"\0\xfehost:1", b"\x02/tmp\n\xff"],
    "ring events": [b'["x"]', b"[]", b"{}", b"1", b'["c"]', b"[[]]", b"\xff", b"[" * 5000],
}
"""What raised something else once, by target."""


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Target:
    caplog.set_level("CRITICAL")
    return TARGETS[request.param]


def test_whatever_comes_is_refused_by_name_or_taken_and_the_same_again(target: Target):
    seeds = target.corpus()
    assert any(target.accepts(seed) for seed in seeds), "no seed is taken"
    rng = random.Random(zlib.crc32(target.name.encode()))
    count = INPUTS.get(target.name, 300)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in [*seeds, *FOUND.get(target.name, ()), *(mutated(rng, seeds, target.words) for _ in range(count))]:
        began = time.process_time()
        try:
            target.accepts(data)
        except Exception as error:
            raise AssertionError(f"{target.name} of {data[:2000]!r}") from error
        assert time.process_time() - began < SECONDS, data[:2000]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MIB << 10


def test_every_target_has_lines_of_its_own():
    """Modules that were renamed would be counted no more."""

    missing = [
        module
        for target in TARGETS.values()
        for module in target.modules
        if not (Path(latentwatch.__file__).parent / module).is_file()
    ]
    assert not missing
