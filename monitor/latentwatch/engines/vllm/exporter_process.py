"""The exporter process as its engine sees it: started early, told its work when that is known, restarted when it ends.

Starting costs a second of processor time for imports, on a busy machine ten times that, and steps that come before
its first look can only wait in the ring. So it starts while the model loads and waits for its configuration. That is
written to a memory file, which takes any size at once, and announced by one byte in the process's pipe: a pipe takes
64 KiB, and whoever writes more waits for a reader that may still be importing, in the middle of a step after a restart.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Final

from latentwatch.handover.exporter_config import ExporterConfig
from latentwatch.handover.memory_file import memory_file
from latentwatch.handover.ring import Ring
from latentwatch.log_limit import LogLimit

logger = logging.getLogger("vllm.latentwatch")

READY_SECONDS: Final = 15.0
"""How long the engine's start may wait for the exporter. No request is served yet, and none waits later."""
CHECK_SECONDS: Final = 1.0
STUCK_SECONDS: Final = 120.0
"""For which steps may wait while none is read: more than the imports take on any machine. An exporter that is stopped,
or waits for itself, would else never be missed."""
_LOOK_COUNTS_SECONDS: Final = 2.0
"""At most, towards that: between two looks of an engine that was idle the exporter had nothing to do."""
_LOG_AGAIN_SECONDS: Final = 600.0


@dataclass
class RestartBackoff:
    """When an exporter that ended is started again: at once, then after waits that double up to a bound, and never not.

    One that lived for `healthy_seconds` is forgiven all that came before. Pure: times are seconds of a rising clock.
    """

    first_seconds: float = 1.0
    longest_seconds: float = 60.0
    """A cause that goes away by itself (memory, a full disk, a limit on processes) costs at most so much more."""
    healthy_seconds: float = 60.0
    _failures: int = 0
    _started: float = -math.inf
    _due: float = -math.inf

    def started(self, now: float) -> None:
        """A process was started, or that was tried in vain."""
        self._started = now
        self._due = math.inf

    def ended(self, now: float) -> None:
        """It was found to have ended. Whoever looks again before the next start changes nothing."""
        if self._due < math.inf:
            return
        if now - self._started >= self.healthy_seconds:
            self._failures = 0
        # The exponent is capped because an engine may run for years, and floats overflow.
        wait = self.first_seconds * 2.0 ** min(self._failures - 1, 64) if self._failures else 0.0
        self._failures += 1
        self._due = now + min(wait, self.longest_seconds)

    def is_due(self, now: float) -> bool:
        """Whether to start the next one."""
        return now >= self._due


class ExporterChild:
    """One worker's exporter. Used from the engine's thread only; after `watch` a thread of this class restarts it.

    The two share no lock: the engine's thread reads a count.
    """

    def __init__(self, ring: Ring, backoff: RestartBackoff | None = None) -> None:
        self._ring = ring
        self._config_fd = memory_file("latentwatch-exporter-config")
        self._configured = False
        self._backoff = backoff or RestartBackoff()
        self._may_log = LogLimit(_LOG_AGAIN_SECONDS, time.monotonic)
        self._checked = 0.0
        self._given_back, self._stuck_seconds = 0, 0.0
        self._watched = False
        self._restarts = self._restarts_told = 0
        self.process: subprocess.Popen[bytes] | None = None
        """None where the system would not start one, until it does."""
        self._spawn(time.monotonic())

    def configure(self, config: ExporterConfig) -> None:
        """Tell the waiting process what to do, and give it READY_SECONDS to take up the ring."""
        with open(self._config_fd, "wb", closefd=False) as file:
            file.write(config.to_json().encode())
        self._configured = True
        self._announce_config()
        deadline = time.monotonic() + READY_SECONDS
        while not self._ring.attached and self.process is not None and self.process.poll() is None:
            if time.monotonic() > deadline:
                logger.warning(
                    "latentwatch: no exporter after %.0f s; serving starts, the ring holds %d steps for it",
                    READY_SECONDS,
                    self._ring.slots,
                )
                return
            time.sleep(0.01)

    def watch(self) -> None:
        """Restart it from now on also while the engine makes no step: what the ring holds would wait for the next one.

        The thread ends with the engine or the ring, and a fork of the engine has none. Raises nothing.
        """
        try:
            threading.Thread(target=self._watch, name="latentwatch-exporter", daemon=True).start()
            self._watched = True
        except RuntimeError as error:
            # A limit on threads: `was_restarted` looks, then.
            logger.error("latentwatch: no thread watches the exporter (%s); an idle engine does not restart it", error)

    def was_restarted(self, now: float) -> bool:
        """Whether it was started again since this was last asked. For each step; `now` as in `restart_if_ended`."""
        if not self._watched:
            self.restart_if_ended(now)
        told, self._restarts_told = self._restarts_told, self._restarts
        return self._restarts_told > told

    def _watch(self) -> None:
        while not self._ring.closed:
            time.sleep(CHECK_SECONDS)
            try:
                self.restart_if_ended(time.monotonic())
            except Exception:
                # Without this thread nothing would be exported again, and it is not the engine's to see.
                if self._may_log("watch"):
                    logger.exception("latentwatch: looking after the exporter failed; it is tried again")

    def restart_if_ended(self, now: float) -> bool:
        """Start the process again where it has ended and it is time; True where that happened.

        However often it ends it is started again; one that reads no more is ended, and the next one is started once it
        is gone: two would share the ring. Raises nothing: what the system refuses is tried again later.
        `now`: seconds of a rising clock.
        """
        if now - self._checked < CHECK_SECONDS:
            return False
        since, self._checked = now - self._checked, now
        if self.process is not None and self.process.poll() is None:
            self._end_if_stuck(self.process, since)
            return False
        if self._ring.closed:
            return False  # it ended because the engine says no more
        self._backoff.ended(now)
        if not self._backoff.is_due(now):
            return False
        if self.process is not None and self._may_log("ended"):
            logger.error(
                "latentwatch: the exporter ended with code %s; starting it again (start %d). Its own log says why.",
                self.process.returncode,
                self._ring.restarts + 2,
            )
        self._ring.count_restart()
        self._spawn(now)
        if self._configured:
            self._announce_config()
        self._restarts += self.process is not None
        return self.process is not None

    def _end_if_stuck(self, process: subprocess.Popen[bytes], since: float) -> None:
        """Nothing that it holds is lost: the next one goes on from its checkpoint."""
        given_back, unread = self._ring.given_back, self._ring.unread
        stands = unread and given_back == self._given_back
        self._given_back = given_back
        self._stuck_seconds = self._stuck_seconds + min(since, _LOOK_COUNTS_SECONDS) if stands else 0.0
        if self._stuck_seconds < STUCK_SECONDS:
            return
        self._stuck_seconds = 0.0
        if self._may_log("stuck"):
            logger.error("latentwatch: the exporter has not read for minutes, with %d steps waiting; ending it", unread)
        with contextlib.suppress(OSError):
            process.kill()

    def _spawn(self, now: float) -> None:
        self._backoff.started(now)
        self._stuck_seconds = 0.0
        try:
            self.process = self._started()
        except Exception as error:
            # Whatever an interpreter that is embedded somewhere cannot tell or do: it costs monitoring, never a step.
            self.process = None
            if self._may_log("start"):
                logger.error("latentwatch: the system does not start an exporter (%s); it is tried again", error)

    def _started(self) -> subprocess.Popen[bytes]:
        with contextlib.suppress(OSError):
            return self._popen(own_session=True)
        # A sandbox without setsid: a signal for the server's terminal then reaches the exporter too.
        return self._popen(own_session=False)

    def _popen(self, *, own_session: bool) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            # -P: no file of the server's working folder stands in for a module.
            [sys.executable, "-P", "-m", "latentwatch.exporter", str(self._config_fd), str(os.getpid())],
            pass_fds=[self._ring.fd, self._config_fd],
            stdin=subprocess.PIPE,
            start_new_session=own_session,
        )

    def _announce_config(self) -> None:
        """One byte into an empty pipe: this never waits for the reader."""
        if self.process is None or self.process.stdin is None:
            return
        try:
            with self.process.stdin as pipe:
                pipe.write(b"\n")
        except BrokenPipeError:
            if self._may_log("pipe"):
                logger.error("latentwatch: the exporter ended before it was told its work; it is started again")
