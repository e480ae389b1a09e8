"""`python -m latentwatch.exporter FD PID`: by the engine PID, which writes its configuration there; never by hand."""

import os
import sys

from latentwatch import host

host.prepare_process()

# vLLM pins its CPU worker to cores and keeps them busy, and a child inherits the pinning: there even the imports below
# would take half a minute. On the other cores, where there are any, nothing here ever stands in the forward's way.
with host.optional("a choice of processors"):
    os.sched_setaffinity(0, set(range(os.cpu_count() or 1)) - os.sched_getaffinity(0) or range(os.cpu_count() or 1))

from latentwatch.errors import Refusal  # noqa: E402, imported on the other cores
from latentwatch.exporter.process import main  # noqa: E402, as above

try:
    raise SystemExit(main(int(sys.argv[1]), int(sys.argv[2])))
except Refusal as refusal:
    raise SystemExit(f"latentwatch exporter: {refusal}") from refusal
