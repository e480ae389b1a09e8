"""Whether the served model is the one that the watchlist was built for, by what lies in its checkpoint's folder.

It costs some hundred small reads of files that the engine has just loaded, at most SECONDS, and never raises: what
cannot be found or read is not compared, and says so.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Final

from latentwatch.engines.vllm.interfaces import VllmConfig
from latentwatch.errors import RefusalReason, WatchlistRefused
from latentwatch.names import ModelMatch
from latentwatch.watchlist import checkpoint
from latentwatch.watchlist.checkpoint import Comparison
from latentwatch.watchlist.file import Watchlist

logger = logging.getLogger("vllm.latentwatch")

SECONDS: Final = 2.0
"""For values of weights: beyond, where every read goes over a network, the rest is not compared."""
NOT_COMPARED: Final = Comparison(ModelMatch.UNKNOWN, "")
"""Of an engine that did not come so far."""
_FROM_THE_FOLDER: Final = ("auto", "hf", "safetensors", "fastsafetensors", "bitsandbytes", "runai_streamer")
"""Ways to load in which the folder's own weights are served."""


def compared(config: VllmConfig, watchlist: Watchlist) -> Comparison:
    """The served model against the watchlist's, told in the log where it is not the same."""
    try:
        found = _compared(config, watchlist)
    except Exception as error:
        # Attributes of vLLM's that another version may lack, a hub's cache in another layout: it costs the comparison.
        logger.debug("latentwatch: the model was not compared", exc_info=True)
        found = Comparison(ModelMatch.UNKNOWN, f"it was not compared ({type(error).__name__}: {error})")
    if found.match is ModelMatch.DIFFERS:
        logger.warning(
            "latentwatch: ANOTHER MODEL than watchlist %r was built for (%s): %s. Its scores mean nothing unless it is "
            "known that the features carry over.",
            watchlist.name,
            watchlist.model.name,
            found.text,
        )
    elif found.match is not ModelMatch.SAME:
        logger.info("latentwatch: whether this is the watchlist's model is not known: %s", found.text)
    return found


def check(found: Comparison, watchlist: Watchlist, *, strict: bool) -> None:
    """For an operator who wants no scores of another model. Raises WatchlistRefused, "watchlist_model"."""
    if strict and found.match is ModelMatch.DIFFERS:
        raise WatchlistRefused(
            f"watchlist for model {watchlist.model.name!r}",
            found=f"the engine serves another one: {found.text}",
            instead="Serve the model that the watchlist was built for, build one for this model, or unset "
            "LATENTWATCH_STRICT_MODEL.",
            reason=RefusalReason.WATCHLIST_MODEL,
        )


def _compared(config: VllmConfig, watchlist: Watchlist) -> Comparison:
    if watchlist.identity is None:
        return checkpoint.compare(None, Path())
    model, load = config.model_config, config.load_config
    load_format = str(getattr(load, "load_format", "auto"))
    if load_format == "dummy":
        return Comparison(ModelMatch.DIFFERS, "its weights are made up (--load-format dummy)")
    folder = _folder(model.model, model.revision, load.download_dir)
    if folder is None:
        return Comparison(ModelMatch.UNKNOWN, "its checkpoint is in no folder of this host")
    until = time.monotonic() + SECONDS
    overrides = model.hf_overrides if isinstance(model.hf_overrides, dict) else {}
    found = checkpoint.compare(watchlist.identity, folder, overrides=overrides, go_on=lambda: time.monotonic() < until)
    if found.match is ModelMatch.SAME and load_format not in _FROM_THE_FOLDER:
        return Comparison(ModelMatch.UNKNOWN, f"weights that come by --load-format {load_format} are not compared")
    return found


def _folder(model: str, revision: str | None, download_dir: str | None) -> Path | None:
    """Where the checkpoint lies: the folder that was given, or the hub's copy of it."""
    if Path(model).is_dir():
        return Path(model)
    import huggingface_hub  # vLLM's own; imported by then, where a model came from the hub

    found = huggingface_hub.try_to_load_from_cache(model, "config.json", cache_dir=download_dir, revision=revision)
    return Path(found).parent if isinstance(found, str) else None
