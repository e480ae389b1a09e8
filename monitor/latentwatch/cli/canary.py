"""`latentwatch canary`: the same safe prompts again and again, to tell a change of the model from one of its input."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from latentwatch.cli import options
from latentwatch.errors import ConfigRefused, RefusalReason

if TYPE_CHECKING:
    from latentwatch.cli.http_client import Web

HELP = "Send the same prompts to the server on a schedule, so that the collector sees when the model itself changes."
EPILOG = """The prompts stand in a file, one a line, at most 64. Each request is signed, asks for one token at
temperature 0, and has a cache salt of its own, so that the server computes it anew. How far it is stands on standard
error.
example:  latentwatch canary --server http://127.0.0.1:8000 --model llama --prompts safe.txt --key canary.key"""

_TIMEOUT_SECONDS: Final = 60.0
"""A busy server lets a prompt wait."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("--server", required=True, metavar="URL", help="vLLM's OpenAI-compatible server")
    parser.add_argument("--model", required=True, metavar="NAME", help="the model's name as it is served")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="safe prompts, one a line")
    parser.add_argument(
        "--key", type=Path, required=True, metavar="FILE", help="what the collector has as --canary-key"
    )
    parser.add_argument("--make-key", action="store_true", help="write a new key to --key first")
    parser.add_argument(
        "--every", type=float, default=5.0, metavar="SECONDS", help="between two requests (default: %(default)g)"
    )
    secret = parser.add_mutually_exclusive_group()
    secret.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="show the server the API key in this file",
    )
    secret.add_argument(
        "--api-key-env", metavar="NAME", help="the same from this environment variable; it is never printed"
    )
    parser.add_argument("--runs", type=options.count, metavar="N", help="stop after N requests (default: never)")


def run(args: argparse.Namespace) -> int:
    """Send until told to stop; 1 where the last request failed."""
    import itertools
    import time

    from latentwatch.cli.http_client import Web
    from latentwatch.cli.terminal import Progress
    from latentwatch.drift import canary

    prompts = _prompts(args.prompts)
    if args.make_key:
        _make_key(args.key)
    key = canary.read_key(args.key)
    web = Web(args.server, _api_key(args), timeout_seconds=_TIMEOUT_SECONDS)
    numbers = itertools.count() if args.runs is None else range(args.runs)
    of = "" if args.runs is None else f" of {args.runs}"
    progress, failures, failed = Progress(time.monotonic), 0, False
    for number in numbers:
        if number:
            time.sleep(args.every)
        prompt = number % len(prompts)
        error = _sent(web, args.model, key, prompt, prompts[prompt])
        if error and not failed:
            progress.end()
            print(f"latentwatch canary: prompt {prompt}: {error}", flush=True)
        failed = bool(error)
        failures += failed
        progress.show(f"latentwatch canary: {number + 1}{of} sent, {failures} not answered")
    progress.end()
    return int(failed)


def _api_key(args: argparse.Namespace) -> str:
    """What the server is shown; empty for nothing. Raises ConfigRefused, "token_unusable"."""
    if args.api_key_file:
        what, key = f"--api-key-file {args.api_key_file}", _word(args.api_key_file)
    elif args.api_key_env:
        what, key = f"--api-key-env {args.api_key_env}", os.environ.get(args.api_key_env, "")
    else:
        return ""
    if not key or not key.isascii() or not key.isprintable() or len(key.split()) != 1:
        raise ConfigRefused(
            what,
            found=f"its {len(key)} characters are no key" if key else "it is empty or not set",
            instead="Give one word of printable ASCII characters.",
            reason=RefusalReason.TOKEN_UNUSABLE,
        )
    return key


def _word(path: Path) -> str:
    from latentwatch import secrets

    return secrets.read(path, "--api-key-file", RefusalReason.TOKEN_UNUSABLE).decode("utf-8", "replace")


def _prompts(path: Path) -> list[str]:
    from latentwatch.drift.sums import CANARIES

    try:
        prompts = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
        found = f"it holds {len(prompts)} prompts"
    except (OSError, UnicodeDecodeError) as error:
        prompts, found = [], str(error)
    if not 1 <= len(prompts) <= CANARIES:
        raise ConfigRefused(
            f"--prompts {path}",
            found=found,
            instead=f"Give 1 to {CANARIES}, one a line.",
            reason=RefusalReason.CANARY_PROMPTS,
        )
    return prompts


def _make_key(path: Path) -> None:
    from latentwatch.drift import canary

    try:
        canary.make_key(path)
    except OSError as error:
        raise ConfigRefused(
            f"--key {path}",
            found=error.strerror or str(error),
            instead="Leave out --make-key.",
            reason=RefusalReason.CANARY_KEY,
        ) from error


def _sent(web: Web, model: str, key: bytes, prompt: int, text: str) -> str:
    """Send one canary; the error in words, empty where it was answered."""
    from latentwatch.drift import canary

    nonce = os.urandom(8).hex()
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 1,
        "temperature": 0,
        "cache_salt": nonce,
    }
    try:
        web.post("/v1/chat/completions", body, {"x-request-id": canary.canary_id(key, prompt, nonce)})
    except ConfigRefused as refusal:
        return refusal.found
    return ""
