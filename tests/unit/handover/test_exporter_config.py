"""What the engine tells its exporter arrives as it was meant, and nothing else is taken for it."""

from __future__ import annotations

import json
import math

import pytest
from latentwatch.facts import EngineIdentity
from latentwatch.handover.exporter_config import CachedBlocks, ExporterConfig, WatchedFeature
from latentwatch.handover.ring import Geometry
from latentwatch.names import Reason, Severity

CONFIG = ExporterConfig(
    engine_pid=7,
    ring_fd=5,
    geometry=Geometry(max_requests=2, max_rows=16, features=3, dense=1, hook_points=1),
    collector="unix:///tmp/c.sock",
    drafts=False,
    cached_reason=Reason.PREFIX_CACHE,
    cached_blocks=CachedBlocks(blocks=10, block_size=16),
    features=(WatchedFeature(Severity.CRITICAL, 3.0, False), WatchedFeature(Severity.WARNING, -math.inf, False)),
    identity=EngineIdentity("pod/0", "b", "0", "m", "", False, "engine_mode", "said", "0.1", "0.32"),
)


def test_it_arrives_as_it_was_sent_infinities_and_all():
    line = CONFIG.to_json()
    assert "\n" not in line and ExporterConfig.from_json(line) == CONFIG


@pytest.mark.parametrize("place", [(), ("geometry",), ("identity",), ("cached_blocks",)])
def test_a_field_that_one_end_does_not_know_is_a_mistake(place):
    told = json.loads(CONFIG.to_json())
    at = told
    for name in place:
        at = at[name]
    at["new"] = 1
    with pytest.raises(TypeError, match="new"):
        ExporterConfig.from_json(json.dumps(told))
