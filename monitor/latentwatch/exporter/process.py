"""The exporter's main loop: ring in, batches out. Started by the engine's worker.

It lives in a session of its own, so that a signal meant for the server does not end it before it has drained. It ends
when the engine closes the ring or is gone, after at most forwarding.DRAIN_SECONDS.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import Final

from latentwatch import host
from latentwatch.exporter.backlog import BacklogDelivery
from latentwatch.exporter.forwarding import Before, Exporter
from latentwatch.exporter.ledger import Ledger
from latentwatch.exporter.score_cache import ScoreCache
from latentwatch.handover.exporter_config import ExporterConfig
from latentwatch.handover.ring import Ring
from latentwatch.transport.address import positive
from latentwatch.transport.credentials import Credentials
from latentwatch.transport.hello import Hello
from latentwatch.transport.sender import Sender
from latentwatch.transport.shed_priority import ShedPriority
from latentwatch.transport.spool import Spool, SpoolFolder, SpoolSettings

log = logging.getLogger("latentwatch.exporter")

BUFFER_MIB: Final = "LATENTWATCH_BUFFER_MIB"
"""memory for what the collector has not acknowledged, MiB for each engine; 64 if unset"""
BUFFER_MIB_UNSET: Final = 64.0
IDLE_SECONDS: Final = 0.005
"""Sleep between two looks at an empty ring: adds this much to a score's way, costs about 0.2 % of a core."""
_LOOK_SECONDS: Final = 1.0
"""Between two looks for the engine while it has nothing to say yet."""


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What one run of the process is made of, and in which order it is given back."""

    ring: Ring
    exporter: Exporter
    spool: Spool | None
    backlog: BacklogDelivery | None

    def close(self, *, engine_ended: bool) -> None:
        if self.backlog is not None:
            self.backlog.stop()
        self.exporter.finish(engine_ended=engine_ended)
        if self.spool is not None:
            self.spool.close()


def _wire(config: ExporterConfig, env: Mapping[str, str]) -> _Parts:
    """Raises: ConfigRefused: an address, a number, a certificate or the spool's folder that cannot be used."""
    hello = Hello(**dataclasses.asdict(config.identity))
    ring = Ring(config.ring_fd, config.geometry, create=False)
    before = Before.load(ring)
    credentials = Credentials.from_env(env)
    settings = SpoolSettings.from_env(env)
    folder = SpoolFolder(settings, hello.replica) if settings is not None else None
    spool = folder.open(hello) if folder is not None else None
    sender = Sender(
        config.collector,
        hello,
        credentials=credentials,
        max_buffer_bytes=int(positive(env, BUFFER_MIB, BUFFER_MIB_UNSET) * (1 << 20)),
        spool=spool,
        earlier=before.state.sequence,
        encodes=True,
        on_drop=before.on_drop,
        priority=ShedPriority([(f.severity, f.matters_from, f.dense) for f in config.features]),
    )
    ledger = Ledger(
        armed=hello.armed, drafts=config.drafts, score_cache=_score_cache(config), cached_reason=config.cached_reason
    )
    exporter = Exporter(ring, ledger, sender, before, folder)
    backlog = None
    if folder is None:
        sender.start()
    else:

        def sender_of(hello: Hello, spool: Spool) -> Sender:
            return Sender(config.collector, hello, credentials=credentials, spool=spool)

        backlog = BacklogDelivery(folder, sender, hello.boot_id, sender_of)
    return _Parts(ring, exporter, spool, backlog)


def _score_cache(config: ExporterConfig) -> ScoreCache | None:
    cached, geometry = config.cached_blocks, config.geometry
    if cached is None:
        return None
    return ScoreCache(
        blocks=cached.blocks,
        block_size=cached.block_size,
        dense=geometry.dense,
        hook_points=geometry.hook_points,
    )


class _StopSignal:
    """Set by SIGTERM. SIGINT is the terminal's word to the server, and not for us."""

    def __init__(self) -> None:
        self.came = False
        signal.signal(signal.SIGTERM, self._set)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _set(self, _number: int, _frame: FrameType | None) -> None:
        self.came = True


def _is_told(engine: int) -> bool:
    """Wait for the line on stdin; False where the engine ended first.

    Then no end of file need come: a process that the engine forked meanwhile has the other end of the pipe too.
    """
    while not select.select([sys.stdin], [], [], _LOOK_SECONDS)[0]:
        if os.getppid() != engine:
            return False
    return bool(sys.stdin.readline())


def main(config_fd: int, engine: int) -> int:
    """Wait for a line on stdin, which says that the ExporterConfig is in its file; run until the engine is done.

    Args: engine: its process, the parent of this one while it lives.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s [latentwatch exporter] %(message)s")
    stop = _StopSignal()
    if not _is_told(engine):
        return 0  # the engine ended while its model loaded
    # From here on, with the threads to come, a share of the processor like any other's but never out of turn: a step
    # that has just been handed over wakes nobody who takes the core from the engine's scheduler.
    with host.optional("a place behind others on the processor"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    # Not `read`: the place in the file is shared with the engine, and with the exporter before this one.
    config = ExporterConfig.from_json(os.pread(config_fd, os.fstat(config_fd).st_size, 0).decode())
    parts = _wire(config, os.environ)
    ended = False
    while not stop.came:
        # Before the look at the ring: what was written before the engine went is then still read.
        ended = parts.ring.closed or os.getppid() != config.engine_pid
        if not parts.exporter.forward_step(time.monotonic()):
            if ended:
                break
            time.sleep(IDLE_SECONDS)
    parts.close(engine_ended=ended)
    return 0
