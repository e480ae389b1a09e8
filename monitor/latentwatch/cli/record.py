"""`latentwatch record`: write down what engines send, to calibrate from it or to replay it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from latentwatch.errors import ConfigRefused, RefusalReason

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from latentwatch.transport.recording import RecordingSink

HELP = "Stand in for a collector and write every batch to a file, to calibrate from it or to replay it."
EPILOG = """It stops on Ctrl-C. The file holds scores and request ids, and no text. How far it is stands on
standard error.
example:  latentwatch record --listen unix:///run/latentwatch/collector.sock --out monday.recording"""

_PROGRESS_SECONDS: Final = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument(
        "--listen", action="append", required=True, metavar="ADDRESS", help="where engines connect, as for a collector"
    )
    parser.add_argument(
        "--insecure", action="store_true", help="listen on addresses that other hosts reach: it asks for no token"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new file")


def run(args: argparse.Namespace) -> int:
    """Record until SIGINT or SIGTERM."""
    import asyncio
    import signal
    import time

    from latentwatch.transport.address import check_guarded
    from latentwatch.transport.receiver import Receiver
    from latentwatch.transport.recording import RecordingSink

    check_guarded("--listen", args.listen, args.insecure, "")
    try:
        sink = RecordingSink(args.out)
    except OSError as error:
        raise ConfigRefused(
            f"--out {args.out}",
            found=error.strerror or str(error),
            instead="Give a file that does not exist yet, in a folder that does.",
            reason=RefusalReason.FILE_EXISTS,
        ) from error

    async def serve() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        receiver = Receiver(sink, args.listen, clock=time.time, on_refused=lambda reason: print(f"refused: {reason}"))
        await receiver.start()
        print(f"latentwatch record: engines connect to {' '.join(args.listen)}", flush=True)
        await _until(stop, lambda: f"{receiver.live_streams} streams, {_written(sink)}")
        await receiver.stop(2.0)

    asyncio.run(serve())
    sink.close()
    print(f"{_written(sink)} in {args.out}")
    return 0


async def _until(stop: asyncio.Event, said: Callable[[], str]) -> None:
    """Wait until it is set, and say meanwhile how far it is."""
    import asyncio
    import contextlib
    import time

    from latentwatch.cli.terminal import Progress

    progress = Progress(time.monotonic)
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _PROGRESS_SECONDS)
        progress.show(f"latentwatch record: {said()}")
    progress.end()


def _written(sink: RecordingSink) -> str:
    return f"{sink.batches} batches, {sink.requests} ended requests, {sink.bytes} bytes"
