"""The faults, each a function that breaks something a number of times under load and returns the books."""

from __future__ import annotations

import random
import signal
import time
from typing import Any

from tests.chaos.world import Books, Proxy, filled, reconcile, small_disk, until, world


def kills(count: int, seed: int) -> Books:
    """SIGKILL of the collector at random moments, its start and its resumption included."""
    rng = random.Random(seed)
    with world() as made:
        collector = made.collector()
        collector.start()
        engine = made.engine(f"unix://{collector.socket}")
        for i in range(count):
            # Every third one dies while it starts: before, while or after it reads its state.
            if i % 3 == 2:
                collector.start(wait=False)
                time.sleep(rng.uniform(0.0, 0.5))
            else:
                collector.start() if i else None
                time.sleep(rng.uniform(0.05, 1.0))
            with made.fault():
                collector.kill()
                time.sleep(rng.uniform(0.0, 0.3))
        collector.start()
        handed = engine.stop([collector])
        return reconcile("collector SIGKILL", made, [handed], [collector.totals()], [engine])


FULL_RING: dict[str, Any] = {
    "restart_seconds": 3.0,
    "slot_rows": 100_000,
    "max_owed": 8,
    "steps_per_second": 200.0,
}
"""An engine whose ring fills up while its exporter is away, and that then folds what it owes into sums."""


def exporter_kills(count: int, seed: int, *, spool: bool = True, collector_kills: bool = False, **engine: Any) -> Books:
    """SIGKILL of the exporter at random moments, every third time within milliseconds of its first step, every tenth
    time SIGTERM; while requests begin, hit the prefix cache, are preempted, aborted and end.

    Args: collector_kills: every fourth time the collector too.   engine: see engine.Config.
    """
    rng = random.Random(seed)
    with world() as made:
        collector = made.collector()
        collector.start()
        settings = {"LATENTWATCH_SPOOL": str(made.folder / "spool")} if spool else {}
        running = made.engine(f"unix://{collector.socket}", settings, seed=seed + 1, **engine)
        for i in range(count):
            if i % 3 == 2:
                running.until_exporter_reads()
                time.sleep(rng.uniform(0.0, 0.02))
            else:
                time.sleep(rng.uniform(0.0, 2.0))
            with made.fault():
                if collector_kills and i % 4 == 3:
                    collector.kill()
                    running.kill_exporter()
                    time.sleep(rng.uniform(0.0, 0.5))
                    collector.start()
                else:
                    running.kill_exporter(signal.SIGTERM if i % 10 == 9 else signal.SIGKILL)
        handed = running.stop([collector])
        how = ("spool" if spool else "no spool") + (", collector too" if collector_kills else "")
        how = "ring full" if engine else how
        return reconcile(f"exporter SIGKILL, {how}", made, [handed], [collector.totals()], [running])


def exporter_stops(count: int, seed: int, *, spool: bool = True) -> Books:
    """SIGSTOP of the exporter: it goes on after a while; every other time it never does, and its engine ends it."""
    rng = random.Random(seed)
    with world() as made:
        collector = made.collector()
        collector.start()
        settings = {"LATENTWATCH_SPOOL": str(made.folder / "spool")} if spool else {}
        running = made.engine(f"unix://{collector.socket}", settings, seed=seed + 1, stuck_seconds=30.0)
        running.until_exporter_reads()
        for i in range(count):
            time.sleep(rng.uniform(0.0, 1.0))
            stopped = running.exporter
            with made.fault():
                running.kill_exporter(signal.SIGSTOP)
                if i % 2:
                    until(lambda stopped=stopped: running.exporter not in (stopped, None), "another exporter")  # type: ignore[misc]
                else:
                    time.sleep(rng.uniform(0.5, 2.0))
                    running.kill_exporter(signal.SIGCONT)
        handed = running.stop([collector])
        how = "spool" if spool else "no spool"
        return reconcile(f"exporter SIGSTOP, {how}", made, [handed], [collector.totals()], [running])


def gateway_kills(count: int, seed: int) -> Books:
    """SIGKILL of a gateway, and every other time of a sidecar, while three sidecars of two engines forward to it."""
    rng = random.Random(seed)
    with world() as made:
        gateway = made.collector("gateway")
        gateway.start()
        sidecars = [
            made.collector(
                f"sidecar-{i}", more=("--forward-to", f"unix://{gateway.socket}", "--forward-name", f"pod-{i}")
            )
            for i in range(3)
        ]
        for sidecar in sidecars:
            sidecar.start()
        behind = [(sidecar, f"pod-{i}/{j}") for i, sidecar in enumerate(sidecars) for j in range(2)]
        engines = [made.engine(f"unix://{at.socket}", replica=name, steps_per_second=20.0) for at, name in behind]
        for i in range(count):
            time.sleep(rng.uniform(0.2, 1.0))
            broken = rng.choice(sidecars) if i % 2 else gateway
            with made.fault():
                broken.kill()
                time.sleep(rng.uniform(0.0, 1.0))
                broken.start()
        handed = [engine.stop([at]) for engine, (at, _) in zip(engines, behind, strict=True)]
        sent = sum(h["tokens"] for h in handed)
        until(lambda: sum(gateway.totals().tokens.values()) >= sent, "what all sidecars were to forward")
        return reconcile("gateway and sidecars SIGKILL", made, handed, [gateway.totals()], engines)


def cuts(count: int, seed: int) -> Books:
    """Every connection is reset at random moments."""
    rng = random.Random(seed)
    with world() as made:
        collector = made.collector()
        collector.start()
        proxy = Proxy(collector.socket)
        engine = made.engine(proxy.target)
        for _ in range(count):
            time.sleep(rng.uniform(0.2, 0.8))
            with made.fault():
                proxy.cut()
                time.sleep(0.2)
        handed = engine.stop([collector])
        return reconcile("connections reset", made, [handed], [collector.totals()], [engine])


def half_open(count: int, seed: int, seconds: float) -> Books:
    """The network falls silent without closing anything, longer than the keepalive waits."""
    rng = random.Random(seed)
    with world() as made:
        collector = made.collector()
        collector.start()
        proxy = Proxy(collector.socket)
        engine = made.engine(proxy.target)
        for _ in range(count):
            time.sleep(rng.uniform(1.0, 2.0))
            with made.fault():
                proxy.silent = True
                time.sleep(seconds)
                proxy.silent = False
        handed = engine.stop([collector])
        return reconcile("half-open connections", made, [handed], [collector.totals()], [engine])


def stops(count: int, seed: int, seconds: float) -> Books:
    """SIGSTOP of the collector."""
    rng = random.Random(seed)
    with world() as made:
        collector = made.collector()
        collector.start()
        engine = made.engine(f"unix://{collector.socket}")
        for _ in range(count):
            time.sleep(rng.uniform(1.0, 2.0))
            with made.fault():
                collector.signal(signal.SIGSTOP)
                time.sleep(seconds)
                collector.signal(signal.SIGCONT)
        handed = engine.stop([collector])
        return reconcile("collector SIGSTOP", made, [handed], [collector.totals()], [engine])


def engine_deaths(count: int, seed: int) -> Books:
    """The engine is killed between two steps and started again as the same replica."""
    rng = random.Random(seed)
    with world() as made:
        collector = made.collector()
        collector.start()
        engines, handed = [], []
        for _ in range(count):
            engine = made.engine(f"unix://{collector.socket}")
            time.sleep(rng.uniform(0.5, 2.0))
            with made.fault():
                handed.append(engine.die())
            engines.append(engine)
        last = made.engine(f"unix://{collector.socket}")
        time.sleep(1.0)
        # More than this engine's own tokens are there already: those of the dead ones are waited for below.
        handed.append(last.stop([collector]))
        sent = sum(h["tokens"] for h in handed)
        until(lambda: sum(collector.totals().tokens.values()) >= sent, "what all of their exporters held")
        return reconcile("engine killed and restarted", made, handed, [collector.totals()], [*engines, last])


def handovers(count: int, seed: int) -> Books:
    """Two collectors with a state of their own take turns behind one address, each stopped before the next serves."""
    rng = random.Random(seed)
    with world() as made:
        turns = [made.collector("a"), made.collector("b")]
        for collector in turns:
            collector.start()
        proxy = Proxy(turns[0].socket)
        engine = made.engine(proxy.target)
        for i in range(count):
            # Longer than a request lives: one that a collector saw only the two ends of counts its middle as lost.
            time.sleep(rng.uniform(2.0, 3.0))
            with made.fault():
                turns[i % 2].stop()
                proxy.upstream = turns[(i + 1) % 2].socket
                time.sleep(0.3)
            turns[i % 2].start()
        handed = engine.stop(turns)
        return reconcile("two collectors in turn", made, [handed], [c.totals() for c in turns], [engine])


def clock_jumps(count: int, seed: int) -> Books:
    """The collector's wall clock is set by hours, forth and back, and it is killed and started on the other side."""
    rng = random.Random(seed)
    with world() as made:
        offset = made.folder / "offset"
        offset.write_text("0")
        collector = made.collector(clock=str(offset))
        collector.start()
        engine = made.engine(f"unix://{collector.socket}")
        for i in range(count):
            time.sleep(rng.uniform(1.5, 2.5))
            with made.fault():
                # Renamed into place: a read in between must not find it empty.
                later = made.folder / "later"
                later.write_text(str(rng.choice([-1, 1]) * rng.uniform(3600, 86_400)))
                later.replace(offset)
                time.sleep(1.5)
            if i % 2:
                collector.kill()
                collector.start()
        handed = engine.stop([collector])
        return reconcile("clock set by hours", made, [handed], [collector.totals()], [engine])


def full_disks(count: int, seed: int) -> Books:
    """The state's disk is full for a while; once it has room again the collector is killed and goes on from it."""
    rng = random.Random(seed)
    with world() as made, small_disk(made.folder / "disk", mib=16) as (disk, how):
        collector = made.collector()
        collector.state = disk / "state"
        collector.start()
        engine = made.engine(f"unix://{collector.socket}")
        for _ in range(count):
            time.sleep(rng.uniform(0.5, 1.5))
            with made.fault(), filled(disk, collector.process.pid):
                until(lambda: not collector.totals().durable, "the collector to notice")
                time.sleep(1.0)
            until(lambda: collector.totals().durable, "the state to be whole again")
            collector.kill()
            collector.start()
        handed = engine.stop([collector])
        return reconcile(f"state disk full ({how})", made, [handed], [collector.totals()], [engine])


def spooled_deaths(count: int, seed: int) -> Books:
    """Engines with a spool run while no collector is there and die, every other one with its exporter at once."""
    rng = random.Random(seed)
    with world() as made:
        collector = made.collector()
        target = f"unix://{collector.socket}"
        settings = {"LATENTWATCH_SPOOL": str(made.folder / "spool")}
        engines, handed = [], []
        for i in range(count):
            engine = made.engine(target, settings)
            time.sleep(rng.uniform(0.5, 1.5))
            with made.fault():
                handed.append(engine.die("vanish" if i % 2 else "die"))
            engines.append(engine)
        collector.start()
        engines.append(made.engine(target, settings))
        time.sleep(0.5)
        handed.append(engines[-1].stop([collector], earlier=sum(h["tokens"] for h in handed)))
        return reconcile("engine killed, spool", made, handed, [collector.totals()], engines)


def full_spools(count: int, seed: int) -> Books:
    """The spool's disk is full for a while in which the collector is away: what it does not take waits in memory."""
    rng = random.Random(seed)
    with world() as made, small_disk(made.folder / "disk", mib=4) as (disk, how):
        collector = made.collector()
        collector.start()
        engine = made.engine(f"unix://{collector.socket}", {"LATENTWATCH_SPOOL": str(disk / "spool")})
        for _ in range(count):
            time.sleep(rng.uniform(0.5, 1.5))
            writer = engine.exporter
            assert writer is not None
            with made.fault(), filled(disk, writer):
                collector.kill()
                time.sleep(rng.uniform(1.0, 2.0))
                collector.start()
        handed = engine.stop([collector])
        return reconcile(f"spool disk full ({how})", made, [handed], [collector.totals()], [engine])


def outages(seconds: float) -> Books:
    """The collector is away for longer than spool and memory hold."""
    with world() as made:
        collector = made.collector()
        collector.start()
        settings = {
            "LATENTWATCH_SPOOL": str(made.folder / "spool"),
            "LATENTWATCH_SPOOL_MIB": "0.25",
            "LATENTWATCH_BUFFER_MIB": "0.0625",
        }
        engine = made.engine(f"unix://{collector.socket}", settings, requests=64, steps_per_second=200.0)
        time.sleep(1.0)
        with made.fault():
            collector.kill()
            time.sleep(seconds)
        collector.start()
        handed = engine.stop([collector])
        return reconcile("away beyond the bounds", made, [handed], [collector.totals()], [engine])
