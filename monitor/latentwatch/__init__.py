"""latentwatch: see what a served model is thinking, while it serves.

For notebooks and scripts: `load` a built watchlist, `score` texts offline, `plot` one, `read_evidence`. They are
imported when they are first asked for: the plugin imports this package too, and has nothing to do with them.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "plot", "read_evidence", "score"]
_RESEARCH = {"load": "scoring", "plot": "picture", "read_evidence": "stored", "score": "scoring"}


def __getattr__(name: str) -> Any:
    if name not in _RESEARCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"latentwatch.research.{_RESEARCH[name]}"), name)
