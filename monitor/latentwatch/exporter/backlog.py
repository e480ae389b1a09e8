"""What earlier boots left in the spool goes first, each as the boot that it came from; then the stream of this one.

In this order because a collector takes the hello of a boot that it does not know for the end of the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from latentwatch.errors import RefusalReason
from latentwatch.transport.hello import Hello
from latentwatch.transport.sender import Sender
from latentwatch.transport.spool import Spool, SpoolFolder

log = logging.getLogger("latentwatch.exporter")

IN_USE_SECONDS: Final = 10.0
"""How long to wait for the exporter of an engine that just ended: twice what it has to deliver the rest itself."""
_LOOK_SECONDS: Final = 0.05
_FINAL_REFUSALS: Final = frozenset(
    {
        RefusalReason.WATCHLIST_MISMATCH,  # the engine was started with another watchlist since, and the collector too
        RefusalReason.BOOT_CHANGED,
        RefusalReason.MALFORMED_HELLO,
        RefusalReason.PROTOCOL_VERSION,
        RefusalReason.REPLICA_IDENTITY,
        RefusalReason.REPLICA_NAME,
    }
)
"""Refusals that are of the boot, not of the moment."""


class BacklogDelivery:
    """A thread that delivers what earlier boots of a replica left, and then starts the sender of this boot."""

    def __init__(
        self, folder: SpoolFolder, sender: Sender, boot_id: str, make_sender: Callable[[Hello, Spool], Sender]
    ) -> None:
        """Begin.

        Args: sender: of this boot, not started yet.   make_sender: one for the hello and the spool of another boot.
        """
        self._folder = folder
        self._sender = sender
        self._boot_id = boot_id
        self._make_sender = make_sender
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="latentwatch-backlog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave on the disk what is not delivered yet. The sender of this boot is started in any case."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            deadline = time.monotonic() + IN_USE_SECONDS
            while self._folder.in_use(self._boot_id) and time.monotonic() < deadline:
                if self._stop.wait(_LOOK_SECONDS):
                    break
            for spool in self._folder.earlier(self._boot_id):
                if self._stop.is_set() or not self._deliver(spool):
                    spool.close()
        except Exception:
            # This boot's scores do not wait for a bug here.
            log.exception("latentwatch: what earlier boots left in the spool could not be delivered")
        finally:
            self._sender.start()

    def _deliver(self, spool: Spool) -> bool:
        """Whether the spool was set aside, and has to stay open."""
        if spool.hello is None or spool.empty:
            return False
        log.info("delivering %d tokens that an earlier boot left in %s", spool.waiting_tokens, spool.path)
        sender = self._make_sender(spool.hello, spool)
        sender.start()
        refusal = None
        while not spool.empty and not self._stop.wait(_LOOK_SECONDS):
            refusal = sender.stats().last_refusal
            if refusal is not None and refusal.reason in _FINAL_REFUSALS:
                break
            refusal = None
        self._folder.discarded_tokens += sender.close(0).dropped_tokens
        if refusal is not None:
            self._folder.set_aside(spool, refusal)
        return refusal is not None
