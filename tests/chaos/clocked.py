"""`python -m tests.chaos.clocked FILE ARGUMENTS...`: latentwatch with a wall clock that FILE sets off by seconds.

Setting the machine's own clock would break everything else that runs on it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from monitor.cli import main

_true_time = time.time


def _set_off() -> float:
    try:
        return _true_time() + float(_OFFSET.read_text())
    except (OSError, ValueError):
        return _true_time()


if __name__ == "__main__":
    _OFFSET = Path(sys.argv[1])
    time.time = _set_off
    sys.exit(main(sys.argv[2:]))
