"""`python -m monitor.exporter JSON`: started by the engine, never by hand."""

import sys

from monitor.errors import Refusal
from monitor.exporter.process import main

try:
    raise SystemExit(main(sys.argv[1]))
except Refusal as refusal:
    raise SystemExit(f"latentwatch exporter: {refusal}") from refusal
