"""`latentwatch watchlist record|discover|probe`: find or train features on two sets of requests."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

from latentwatch.errors import ConfigRefused, RefusalReason

if TYPE_CHECKING:
    from latentwatch.arrays import Bool
    from latentwatch.names import HookPoint
    from latentwatch.watchlist.activations import Recording
    from latentwatch.watchlist.discover import Found
    from latentwatch.watchlist.probing import Probe

_RECORD = """Run a model over requests and write the residual stream at a hook point: what 'verify --activations' and
the calibration of TopK gates read. Requests are lines of {"text": ...} or {"messages": [...]}."""
_DISCOVER = """Run a model over two sets of requests, rank every feature of an SAE by how well its largest activation
tells them apart, and write a watchlist.yaml of those that pass to edit. Half of the requests choose, the other half
measure; q is from permuted labels and holds for all features together. Exit code 1 when none passes."""
_PROBE = """Train a logistic probe on the tokens of two sets of requests, measure it on a held-out half, and write
probe.safetensors and a watchlist.yaml beside it."""


class _Source(TypedDict):
    format: str
    path: str
    options: NotRequired[Mapping[str, object]]
    features: Sequence[Mapping[str, object]]


def add_arguments(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The three actions, added to those of `watchlist`."""
    raw = argparse.RawDescriptionHelpFormatter
    record = actions.add_parser(
        "record",
        help="write a model's residual stream on some requests",
        description=_RECORD,
        epilog="example:  latentwatch watchlist record --model MODEL --hook-point resid_post.12 --requests a.jsonl "
        "--out x.safetensors",
        formatter_class=raw,
    )
    _model_arguments(record)
    record.add_argument(
        "--requests",
        type=Path,
        required=True,
        metavar="FILE",
        help="requests to run: .jsonl, or .txt with a text a line",
    )
    record.add_argument("--out", type=Path, required=True, metavar="PATH", help="activations file to write")
    discover = actions.add_parser(
        "discover",
        help="find features that tell two sets of requests apart",
        description=_DISCOVER,
        epilog="example:  latentwatch watchlist discover --model MODEL --sae saes/layer12 --hook-point resid_post.12 "
        "--positive lies.jsonl --negative truths.jsonl --out found.yaml",
        formatter_class=raw,
    )
    _model_arguments(discover)
    _contrast_arguments(discover)
    discover.add_argument("--sae", required=True, metavar="PATH", help="the SAE's folder, file or hf: reference")
    discover.add_argument("--format", default="saelens", help="of the SAE (default: %(default)s)")
    discover.add_argument(
        "--options",
        default="{}",
        metavar="YAML",
        help="what the SAE's files do not say, as under 'options' in a watchlist.yaml: {trained_on: resid_post.12}",
    )
    discover.add_argument("--top", type=int, default=20, metavar="N", help="features to write (default: %(default)s)")
    discover.add_argument("--permutations", type=int, default=1000, metavar="N", help="default: %(default)s")
    discover.add_argument("--out", type=Path, required=True, metavar="PATH", help="watchlist.yaml to write")
    probe = actions.add_parser(
        "probe",
        help="train a probe that tells two sets of requests apart",
        description=_PROBE,
        epilog="example:  latentwatch watchlist probe --model MODEL --hook-point resid_post.12 --name deceives "
        "--positive lies.jsonl --negative truths.jsonl --out probes/deceives",
        formatter_class=raw,
    )
    _model_arguments(probe)
    _contrast_arguments(probe)
    probe.add_argument("--name", required=True, help="id of the probe: letters, digits, '.', '_' and '-'")
    probe.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")


def run(args: argparse.Namespace) -> int:
    """Run one of the three."""
    return {"record": _record, "discover": _discover, "probe": _probe}[str(args.action)](args)


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a Hugging Face model's folder or name")
    parser.add_argument(
        "--hook-point",
        required=True,
        metavar="resid_post.N",
        help="the stream after layer N; blocks.N.hook_resid_post means the same",
    )
    parser.add_argument(
        "--skip-first",
        type=int,
        metavar="N",
        help="positions to leave out at each start (default: the tokens that all requests share, such as a chat "
        "template's system prompt, and at least one)",
    )
    parser.add_argument("--force", action="store_true", help="replace what --out names when it exists")


def _contrast_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--label", metavar="TEXT", help="what it stands for; default: which files it tells apart")
    parser.add_argument(
        "--positive",
        type=Path,
        required=True,
        metavar="FILE",
        help="requests with the behaviour: .jsonl, or .txt with a text a line",
    )
    parser.add_argument("--negative", type=Path, required=True, metavar="FILE", help="requests without it")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the permutations (default: %(default)s)")


def _hook_point(args: argparse.Namespace) -> HookPoint:
    from latentwatch.watchlist.places import hook_point

    if args.out.exists() and not args.force:
        raise ConfigRefused(
            f"--out {args.out}",
            found="it exists",
            instead="Add --force to replace it.",
            reason=RefusalReason.OUT_EXISTS,
        )
    return hook_point(args.hook_point)


def _recorded(args: argparse.Namespace, paths: list[Path]) -> tuple[Recording, list[int], list[str]]:
    """The recording of all files together, how many requests each has, and each request's group."""
    from latentwatch.watchlist import activations

    hook_point = _hook_point(args)
    sets = [activations.requests(path) for path in paths]
    wanted = [request for one in sets for request in one]

    def progress(done: int) -> None:
        print(f"recorded {done} of {len(wanted)} requests", file=sys.stderr)

    recording = activations.record(args.model, wanted, hook_point, skip_first=args.skip_first, progress=progress)
    print(f"the first {recording.skip_first} positions of each request are left out", file=sys.stderr)
    return recording, [len(one) for one in sets], [request.group for request in wanted]


def _record(args: argparse.Namespace) -> int:
    from latentwatch.watchlist import activations

    recording, _, _ = _recorded(args, [args.requests])
    activations.save(recording, args.out, _hook_point(args))
    print(f"{args.out}: {len(recording.x_TD)} tokens of width {recording.x_TD.shape[1]}")
    return 0


def _discover(args: argparse.Namespace) -> int:
    import numpy as np

    from latentwatch.watchlist.discover import discover
    from latentwatch.watchlist.location import Location
    from latentwatch.watchlist.selection import options_of
    from latentwatch.watchlist.sources import open_source

    options = options_of(args.options, "--options")
    source = open_source(args.format, Location(args.sae, Path()), _hook_point(args), options)
    recording, (positive, negative), groups = _recorded(args, [args.positive, args.negative])
    positive_R = np.arange(positive + negative) < positive
    found = discover(
        source,
        recording,
        positive_R,
        groups,
        output_T=_output_tokens(args, recording),
        permutations=args.permutations,
        seed=args.seed,
    )
    for one in found[: args.top]:
        token = one.top_tokens[0]
        shown = f"{token['before']}[{token['token']}]{token['after']}"
        figures = f"AUROC {one.auroc:.3f}  TPR at 1 % FPR {one.tpr_at_fpr_1pct:.2f}  q {one.q_value:.4f}"
        print(f"{one.index:>8}  {figures}  {one.where}: {shown!r}")
    print(f"{len(found)} of {source.about.width} features pass q < 0.05")
    if not found:
        return 1
    path = args.sae if args.sae.startswith("hf:") else os.path.relpath(args.sae, args.out.resolve().parent)
    features = [_feature_of(one, args, recording) for one in found[: args.top]]
    stated = {name: value for name, value in vars(options).items() if value not in (None, ())}
    chosen: _Source = {"format": args.format, "path": path, "features": features}
    if stated:
        chosen["options"] = {name: list(value) if name == "ignore" else value for name, value in stated.items()}
    _write_yaml(args, args.out, chosen)
    return 0


def _label(args: argparse.Namespace) -> str:
    return args.label or f"tells {args.positive.stem} from {args.negative.stem}"


def _output_tokens(args: argparse.Namespace, recording: Recording) -> Bool:
    """Which of the recorded tokens belong to the last answer of a dialogue."""
    import numpy as np

    from latentwatch.watchlist import activations

    wanted = [request for path in (args.positive, args.negative) for request in activations.requests(path)]
    prompt_R = np.array(activations.prompt_tokens(args.model, wanted)) - recording.skip_first
    position_T = np.arange(len(recording.request_T)) - recording.starts_R[recording.request_T]
    return np.asarray(position_T >= prompt_R[recording.request_T])


def _label_of(found: Found, args: argparse.Namespace) -> str:
    """The one that was given; else what it fires on, where, and what it was found by, in one line."""
    if args.label:
        return str(args.label)
    tokens = (" ".join(token["token"].split())[:24] for token in found.top_tokens)
    seen = " ".join(f"{token!r}" for token in dict.fromkeys(tokens) if token) or "blanks"
    return f"fires on {seen} {found.where}; tells {args.positive.stem} from {args.negative.stem}"[:300]


def _feature_of(found: Found, args: argparse.Namespace, recording: Recording) -> dict[str, object]:
    """Its entry in watchlist.yaml."""
    from latentwatch.watchlist.activations import MOST_SKIPPED

    return {
        "index": found.index,
        "id": f"f{found.index}",
        "label": _label_of(found, args),
        "severity": "info",
        "skip_first_positions": min(recording.skip_first, MOST_SKIPPED),
        "evidence": found.evidence | {"measured_on": f"{args.positive.name} against {args.negative.name}"},
    }


def _probe(args: argparse.Namespace) -> int:
    import numpy as np

    from latentwatch.watchlist import probing

    hook_point = _hook_point(args)
    recording, (positive, negative), groups = _recorded(args, [args.positive, args.negative])
    probe = probing.train(recording, np.arange(positive + negative) < positive, groups, seed=args.seed)
    for name, figures in probe.figures.items():
        print(
            f"{name:>13}  AUROC {figures['auroc']:.3f}  TPR at 1 % FPR {figures['tpr_at_fpr_1pct']:.2f}, "
            f"at 0.1 % {figures['tpr_at_fpr_0_1pct']:.2f}"
        )
    probing.save(probe, args.out / "probe.safetensors", args.name, hook_point)
    _write_yaml(
        args,
        args.out / "watchlist.yaml",
        {
            "format": "linear_probe",
            "path": "probe.safetensors",
            "features": [_feature_of_probe(probe, args, recording)],
        },
    )
    return 0


def _feature_of_probe(probe: Probe, args: argparse.Namespace, recording: Recording) -> dict[str, object]:
    """Its entry in watchlist.yaml."""
    from latentwatch.watchlist.activations import MOST_SKIPPED
    from latentwatch.watchlist.probing import WINDOW_TOKENS

    best = probe.figures[probe.best]
    window = {"window_tokens": WINDOW_TOKENS} if probe.best == "rolling_mean" else {}
    return {
        "name": args.name,
        "id": args.name,
        "label": _label(args),
        "severity": "warning",
        "skip_first_positions": min(recording.skip_first, MOST_SKIPPED),
        "limit": {"statistic": probe.best, "value": round(best["threshold"], 4), **window},
        "evidence": {
            "auroc": round(best["auroc"], 4),
            "tpr_at_fpr_1pct": round(best["tpr_at_fpr_1pct"], 4),
            "tpr_at_fpr_0_1pct": round(best["tpr_at_fpr_0_1pct"], 4),
            "n": probe.n,
            "n_positive": probe.n_positive,
            "split": "half of the requests, held out by group",
            "aggregation": f"{probe.best} over tokens",
            "measured_on": f"{args.positive.name} against {args.negative.name}",
            "remarks": "The limit is at 1 % false positives of the held-out half; set it on your own traffic.",
        },
    }


def _write_yaml(args: argparse.Namespace, path: Path, source: _Source) -> None:
    """A watchlist.yaml with one source; the model's sizes come from its own config where that lies on disk."""
    import yaml

    from latentwatch import storage
    from latentwatch.watchlist import activations
    from latentwatch.watchlist.places import hook_point

    local = Path(args.model).is_dir()
    config = os.path.relpath(args.model, path.resolve().parent) if local else f"hf:{args.model}"
    content = {
        "name": path.stem if path.stem != "watchlist" else path.parent.name,
        "model": {"name": activations.model_name(args.model), "config": config, "dtypes": ["bfloat16", "float32"]},
        "hook_points": [{"hook_point": str(hook_point(args.hook_point)), "sources": [source]}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.atomic_write(path, private=False) as file:
        file.write(yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())
    print(f"{path}: {len(source['features'])} features; edit it, then build it")
