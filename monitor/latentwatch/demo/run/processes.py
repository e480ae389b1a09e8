"""The demo's child processes: one process group, logs in files, ended whatever happens.

The group's leader is a small guard that waits on a pipe from this process. When the pipe closes, for whatever reason
(kill -9 included), it ends the group. Children get no terminal signal of their own, so that Ctrl-C reaches only this
process and the order of ending is ours.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from latentwatch.errors import Refusal, RefusalReason

GUARD: Final = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdin.buffer.read()
os.killpg(0, signal.SIGTERM)
time.sleep(10)
os.killpg(0, signal.SIGKILL)
"""
TAIL_LINES: Final = 15


class ChildFailed(Refusal):
    """A child process ended before it should have, or never became ready. `log_tail` is the end of its log."""

    def __init__(self, what: str, *, found: str, instead: str, log_tail: str) -> None:
        super().__init__(what, found=found, instead=instead, reason=RefusalReason.CHILD_FAILED)
        self.log_tail = log_tail


@dataclass(frozen=True)
class Child:
    """A started process and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    grace_seconds: float
    """How long it may take to end after SIGTERM."""

    def tail(self) -> str:
        """The last TAIL_LINES lines of its log."""
        lines = self.log.read_text("utf-8", errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])

    def check(self) -> None:
        """Raises ChildFailed when the process has ended."""
        code = self.process.poll()
        if code is not None:
            raise self.failed(f"it ended with {_ending(code)}")

    def failed(self, found: str) -> ChildFailed:
        """The error that names this child, with the end of its log."""
        return ChildFailed(self.name, found=found, instead=f"Its whole log is {self.log}.", log_tail=self.tail())


class ProcessGroup:
    """Context of all children. Leaving it ends them, newest first, then kills what is left of the group."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def __enter__(self) -> Self:
        self._guard = subprocess.Popen([sys.executable, "-I", "-c", GUARD], stdin=subprocess.PIPE, process_group=0)
        return self

    def start(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        grace_seconds: float = 5.0,
    ) -> Child:
        """Start a child with `env` added to our environment, its output going to `log`.

        Raises: ChildFailed: the program could not be started at all.
        """
        with log.open("wb") as out:
            try:
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **(env or {})},
                    process_group=self._guard.pid,
                )
            except OSError as error:
                found = f"{argv[0]} cannot be started ({error.strerror})"
                raise ChildFailed(name, found=found, instead="Check that it is installed.", log_tail="") from error
        child = Child(name, process, log, grace_seconds)
        self._children.append(child)
        return child

    def check(self) -> None:
        """Raises ChildFailed when any child has ended."""
        for child in self._children:
            child.check()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A second Ctrl-C must not leave children behind; what follows is bounded by the grace times.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for child in reversed(self._children):
                _end(child)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._guard.pid, signal.SIGKILL)
            self._guard.communicate()
            for child in self._children:
                child.process.wait()
            signal.signal(signal.SIGINT, previous)


def free_ports(count: int) -> list[int]:
    """Ports on 127.0.0.1 that were free just now; held together while choosing, so that no two are the same."""
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]


def _end(child: Child) -> None:
    child.process.terminate()
    deadline = time.monotonic() + child.grace_seconds
    while child.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
