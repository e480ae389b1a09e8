"""The exporter process as its engine sees it: started early, told its work when that is known, restarted when it ends.

Starting costs a second of processor time for imports, on a busy machine ten times that, and steps that come before
its first look can only wait in the ring. So it starts while the model loads and waits for its configuration. That is
written to a memory file, which takes any size at once, and announced by one byte in the process's pipe: a pipe takes
64 KiB, and whoever writes more waits for a reader that may still be importing, in the middle of a step after a restart.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from typing import Final

from latentwatch.handover.exporter_config import ExporterConfig
from latentwatch.handover.memory_file import memory_file
from latentwatch.handover.ring import Ring

logger = logging.getLogger("vllm.latentwatch")

READY_SECONDS: Final = 15.0
"""How long the engine's start may wait for the exporter. No request is served yet, and none waits later."""
CHECK_SECONDS: Final = 1.0
MAX_STARTS: Final = 20


class ExporterChild:
    """One worker's exporter. Used from the engine's thread only."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._config_fd = memory_file("latentwatch-exporter-config")
        self._starts = 0
        self._checked = 0.0
        self.process = self._spawn()

    def configure(self, config: ExporterConfig) -> None:
        """Tell the waiting process what to do, and give it READY_SECONDS to take up the ring."""
        with open(self._config_fd, "wb", closefd=False) as file:
            file.write(config.to_json().encode())
        self._announce_config()
        deadline = time.monotonic() + READY_SECONDS
        while not self._ring.attached and self.process.poll() is None:
            if time.monotonic() > deadline:
                logger.warning(
                    "latentwatch: no exporter after %.0f s; serving starts, the ring holds %d steps for it",
                    READY_SECONDS,
                    self._ring.slots,
                )
                return
            time.sleep(0.01)

    def restart_if_ended(self, now: float) -> bool:
        """Start the process again where it has ended; True where that happened. `now`: monotonic seconds."""
        if now - self._checked < CHECK_SECONDS:
            return False
        self._checked = now
        if self.process.poll() is None or self._starts >= MAX_STARTS:
            return False
        logger.error("latentwatch: the exporter ended with code %s; starting it again", self.process.returncode)
        self._ring.count_restart()
        self.process = self._spawn()
        self._announce_config()
        return True

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._starts += 1
        try:
            return self._started(own_session=True)
        except OSError:
            # A sandbox without setsid: a signal for the server's terminal then reaches the exporter too.
            return self._started(own_session=False)

    def _started(self, *, own_session: bool) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            # -P: no file of the server's working folder stands in for a module.
            [sys.executable, "-P", "-m", "latentwatch.exporter", str(self._config_fd)],
            pass_fds=[self._ring.fd, self._config_fd],
            stdin=subprocess.PIPE,
            start_new_session=own_session,
        )

    def _announce_config(self) -> None:
        """One byte into an empty pipe: this never waits for the reader."""
        assert self.process.stdin is not None
        try:
            with self.process.stdin as pipe:
                pipe.write(b"\n")
        except BrokenPipeError:
            logger.error("latentwatch: the exporter ended before it was told its work; it is started again")
