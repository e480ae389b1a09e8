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
import subprocess
import sys
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
    """One worker's exporter. Used from the engine's thread only."""

    def __init__(self, ring: Ring, backoff: RestartBackoff | None = None) -> None:
        self._ring = ring
        self._config_fd = memory_file("latentwatch-exporter-config")
        self._configured = False
        self._backoff = backoff or RestartBackoff()
        self._may_log = LogLimit(_LOG_AGAIN_SECONDS, time.monotonic)
        self._checked = 0.0
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

    def restart_if_ended(self, now: float) -> bool:
        """Start the process again where it has ended and it is time; True where that happened.

        However often it ends it is started again. Raises nothing: what the system refuses is tried again later.
        `now`: seconds of a rising clock.
        """
        if now - self._checked < CHECK_SECONDS:
            return False
        self._checked = now
        if self.process is not None and self.process.poll() is None:
            return False
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
        return self.process is not None

    def _spawn(self, now: float) -> None:
        self._backoff.started(now)
        try:
            self.process = self._started()
        except OSError as error:
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
            [sys.executable, "-P", "-m", "latentwatch.exporter", str(self._config_fd)],
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
