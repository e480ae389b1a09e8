"""`latentwatch calibrate`: make a baseline of traffic that someone trusts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from latentwatch.cli import options
from latentwatch.errors import BaselineRefused, ConfigRefused, RefusalReason

if TYPE_CHECKING:
    from latentwatch.arrays import Array
    from latentwatch.collector.drift import DriftSettings
    from latentwatch.drift.baseline import Baseline
    from latentwatch.watchlist.file import Watchlist

HELP = "Make a baseline of traffic that you trust; a collector with it measures drift and knows how rare a value is."
EPILOG = """Several --from are added up: the collectors of a fleet, or recordings of several days; windows that are in
two of them, or in the baseline of --update, count once. Reading evidence is
noted in its folder's audit log. Windows during an
alarm are never among what a collector gives. A baseline changes by --update only, and names what would change.
example:  latentwatch calibrate --from http://127.0.0.1:9464 --model-name llama --out prod.baseline"""

_EXISTS, _VALUE, _FPR = RefusalReason.FILE_EXISTS, RefusalReason.CONFIG_VALUE, RefusalReason.LIMIT_FPR
_TIMEOUT_SECONDS: Final = 60.0
"""A collector sums over all that it has seen."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument(
        "--from",
        dest="sources",
        action="append",
        required=True,
        metavar="URL|FILE|FOLDER",
        help="a collector's address, a file of 'latentwatch record', or the evidence folder of a collector with "
        "--evidence-keep all; may be given more than once",
    )
    parser.add_argument("--model-name", required=True, metavar="NAME", help="as vLLM serves it; one baseline is of one")
    parser.add_argument("--watchlist", type=Path, metavar="FILE", help="needed for files and folders: what was scored")
    parser.add_argument(
        "--canary-key", type=Path, metavar="FILE", help="for files and folders: the collector's, to tell canary runs"
    )
    parser.add_argument("--route", type=options.route, metavar="REGEX", help="for files and folders: the collector's")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="the collectors' --http-token-file, where they have one"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the baseline")
    parser.add_argument("--force", action="store_true", help="overwrite --out")
    parser.add_argument(
        "--limit-fpr",
        type=float,
        metavar="SHARE",
        help="give features without a limit by hand the value that this share of requests lies above, e.g. 0.001 "
        "(default: they get none)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1.05,
        metavar="RATIO",
        help="least change of a rate that may page, above 1; slow movement that was measured widens it "
        "(default: %(default)s)",
    )
    parser.add_argument("--update", type=Path, metavar="FILE", help="add the traffic to this baseline")
    parser.add_argument(
        "--approve",
        action="append",
        default=[],
        metavar="FEATURE|all",
        help="with --update: take over a rate that left the earlier baseline's limits; may be given more than once",
    )
    for name, what in (
        ("revision", "revision of the model"),
        ("quantisation", "quantisation that is served"),
        ("adapter", "adapter that is served"),
        ("tokenizer", "tokenizer or its revision"),
        ("chat-template", "chat template or its hash"),
    ):
        parser.add_argument(
            f"--{name}", default="", metavar="TEXT", help=f"{what}, for the fingerprint; merged baselines must agree"
        )
    parser.add_argument("--notes", default="", metavar="TEXT", help="what this traffic was, for people")


def run(args: argparse.Namespace) -> int:
    """Write the baseline; 1 where an update needs approval."""
    from latentwatch.drift import baseline
    from latentwatch.drift.limits import calibrated_limit
    from latentwatch.drift.show import table

    _check(args)
    earlier = baseline.read(args.update) if args.update else None
    made = _named(_gathered(args), args)
    if earlier is not None:
        earlier.check(made.fingerprint, f"baseline {args.update}")
        together = earlier.merge(made)
        print(_counted(earlier, made, together))
        fresh_FB = together.observed.levels_FB - earlier.observed.levels_FB
        left = [name for name in moved(earlier, fresh_FB) if name not in args.approve and "all" not in args.approve]
        if left:
            print(f"not written: {len(left)} features left the limits of {args.update}: {', '.join(left)}")
            print("If that is the new normal, name them with --approve; an attack must not become one.")
            return 1
        made = _named(together, args)
    made.reference()
    if made.limit_fpr is not None:
        calibrated_limit(made.observed, 0, made.limit_fpr)
    written = baseline.write(made, args.out)
    print(table(written))
    print(f"wrote {args.out} ({written.sha256[:12]})")
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be wrong is said before anything is waited for. Raises ConfigRefused."""
    fpr = args.limit_fpr
    for wrong, what, found, instead, reason in (
        (args.out.exists() and not args.force, "out", "it exists", "Give another name, or --force.", _EXISTS),
        (not args.out.parent.is_dir(), "out", f"there is no folder {args.out.parent}", "Make it.", _VALUE),
        (not args.tolerance > 1, "tolerance", "it is not above 1", "Give 1.05.", _VALUE),
        (fpr is not None and not 0 < fpr < 1, "limit_fpr", "it is no share between 0 and 1", "Give 0.001.", _FPR),
    ):
        if wrong:
            raise ConfigRefused(
                f"--{what.replace('_', '-')} {getattr(args, what)}", found=found, instead=instead, reason=reason
            )


def _counted(earlier: Baseline, made: Baseline, together: Baseline) -> str:
    """How much of the traffic is new, in words: what a collector gives includes what it gave before."""
    new = together.observed.requests - earlier.observed.requests
    if new == made.observed.requests:
        return f"{new} requests are new"
    return f"{new} of {made.observed.requests} requests are new; the others are in the earlier baseline and count once"


def moved(earlier: Baseline, total_FB: Array) -> list[str]:
    """Features whose rate in later traffic lies outside the earlier baseline's limits; none where there is no traffic.

    Args: total_FB: requests of the later traffic by score bucket, [F, B].
    """
    import numpy as np

    from latentwatch.aggregate.counts import above

    reference = earlier.reference()
    active_F = above(total_FB)[np.arange(len(total_FB)), reference.level_F]
    total_F = total_FB.sum(axis=1)
    rate_F = active_F / np.maximum(total_F, 1)
    outside_F = (total_F > 0) & ((rate_F > reference.high_HF.max(axis=0)) | (rate_F < reference.low_HF.min(axis=0)))
    return [earlier.features[i] for i in np.flatnonzero(outside_F)]


def _gathered(args: argparse.Namespace) -> Baseline:
    from latentwatch.drift import baseline

    made: Baseline | None = None
    for source in args.sources:
        if source.startswith(("http://", "https://")):
            part = baseline.parse(_fetched(source, args.model_name, args.token_file), f"collector {source}")
        else:
            part = _of_files(Path(source), args)
        made = part if made is None else made.merge(part)
    assert made is not None
    return made


def _fetched(url: str, model_name: str, token_file: Path | None) -> bytes:
    from latentwatch import secrets
    from latentwatch.cli.http_client import Web
    from latentwatch.drift import baseline

    token = secrets.read_token(token_file, "--token-file") if token_file else ""
    web = Web(url, token, timeout_seconds=_TIMEOUT_SECONDS, max_bytes=baseline.MAX_FILE_BYTES)
    try:
        return web.get("/v1/drift/observed", model_name=model_name)
    except ConfigRefused as refusal:
        raise BaselineRefused(
            f"collector {url}",
            found=f"it gave nothing for model {model_name!r} ({refusal.found})",
            instead="Give the address of its live page, and the model's name as it stands there.",
            reason=RefusalReason.BASELINE_SOURCE,
        ) from refusal


def _of_files(path: Path, args: argparse.Namespace) -> Baseline:
    from latentwatch.watchlist import file as watchlist_file

    if args.watchlist is None:
        found = "a folder of evidence" if path.is_dir() else "a recording"
        raise ConfigRefused(
            f"--from {path}", found=found, instead="Give its --watchlist too.", reason=RefusalReason.CONFIG_VALUE
        )
    watchlist = watchlist_file.read(args.watchlist)
    settings = options.drift_settings(None, args.canary_key, args.route)
    return (_of_evidence if path.is_dir() else _of_recording)(path, watchlist, args.model_name, settings)


def _of_evidence(folder: Path, watchlist: Watchlist, model_name: str, settings: DriftSettings) -> Baseline:
    import time

    from latentwatch.collector.calibration import of_evidence

    what = f"evidence {folder}"
    with options.opened_evidence(folder) as (archive, audit):
        if others := archive.watchlists() - {watchlist.sha256}:
            raise BaselineRefused(
                what,
                found=f"it was seen with watchlist {', '.join(sorted(others))}, but this is {watchlist.sha256}",
                instead="Give that watchlist, or a folder that was begun with this one.",
                reason=RefusalReason.BASELINE_MISMATCH,
            )
        made = of_evidence(watchlist, model_name, archive.ended(model_name), settings, what)
        audit.add(time.time(), options.actor(), "calibrate", made.observed.requests, subject=f"model={model_name}")
    return made


def _of_recording(path: Path, watchlist: Watchlist, model_name: str, settings: DriftSettings) -> Baseline:
    from latentwatch.collector.core import Core
    from latentwatch.collector.replay import replay
    from latentwatch.transport import recording

    core = Core(watchlist, drift=settings)
    done = replay(core, recording.read(path))
    observed = core.drift.observed(model_name, done.last_seconds)
    if observed is None:
        raise BaselineRefused(
            f"recording {path}",
            found=f"it holds nothing of model {model_name!r}",
            instead="Give the name that the model was served under.",
            reason=RefusalReason.BASELINE_SOURCE,
        )
    return observed


def _named(made: Baseline, args: argparse.Namespace) -> Baseline:
    import dataclasses

    names = ("revision", "quantisation", "adapter", "tokenizer", "chat_template")
    said = {name: getattr(args, name) for name in names if getattr(args, name)}
    return dataclasses.replace(
        made,
        fingerprint=dataclasses.replace(made.fingerprint, **said),
        options=dataclasses.replace(made.options, tolerance=args.tolerance),
        limit_fpr=args.limit_fpr,
        notes=args.notes or made.notes,
    )
