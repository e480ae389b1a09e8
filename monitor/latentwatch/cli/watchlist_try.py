"""`latentwatch watchlist try`: what a built watchlist makes of a text, without a server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from latentwatch.cli import options
from latentwatch.errors import ConfigRefused, RefusalReason

if TYPE_CHECKING:
    from latentwatch.research.scoring import Scored, Text

_TRY = """Score texts with a built watchlist and a Hugging Face model, without a server. For each text
the strongest features, by their limits where they have one, and the token that each was strongest on. A text is all
prompt; with --answer it is what the user says, and the answer is output, which is what most limits are on."""
_SHOWN = 12


def add_arguments(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The action, added to those of `watchlist`."""
    tried = actions.add_parser(
        "try",
        help="score a text with a built file, without a server",
        description=_TRY,
        epilog="example:  latentwatch watchlist try prod.safetensors --model MODEL --text 'How do I pick a lock?' "
        "--html tried.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tried.add_argument("file", type=Path, metavar="FILE", help="a built watchlist file")
    tried.add_argument("--model", required=True, help="a Hugging Face model's folder or name")
    tried.add_argument("--text", action="append", default=[], help="a text to score; may be given more than once")
    tried.add_argument("--answer", metavar="TEXT", help="with one --text: what the model answered to it")
    tried.add_argument(
        "--requests", type=Path, metavar="FILE", help="score those of a .jsonl file, or the lines of a .txt file"
    )
    tried.add_argument("--feature", metavar="ID", help="show this feature alone")
    tried.add_argument("--html", type=Path, metavar="PATH", help="write the tokens of one text, coloured, to PATH")


def run(args: argparse.Namespace) -> int:
    """Print a block for each text."""
    from latentwatch.research import scoring

    watchlist = scoring.load(args.file)
    texts = _texts(args)
    ids = [feature.id for feature in watchlist.features]
    if args.feature is not None and args.feature not in ids:
        raise _refuse(
            f"--feature {args.feature}", "the watchlist has no such feature", f"It has {', '.join(ids[:20])}."
        )

    def progress(done: int) -> None:
        if len(texts) > 10 and done % 50 == 0:
            print(f"{done} forwards", file=sys.stderr)

    found = scoring.score(watchlist, args.model, texts, progress)
    for number, one in enumerate(found, 1):
        print("\n".join([f"text {number}: {_sizes(one)}", *_lines(one, args.feature)]))
    if args.html is not None:
        options.write_page(args.html, found[0].html(args.feature))
        print(args.html)
    return 0


def _texts(args: argparse.Namespace) -> list[Text]:
    """What to score. Raises ConfigRefused: nothing, or options that do not fit together."""
    from latentwatch.watchlist import activations

    texts: list[Text] = list(args.text)
    if args.answer is not None:
        if len(texts) != 1 or args.requests is not None:
            raise _refuse("--answer", f"there are {len(texts)} texts", "Give it with one --text and no --requests.")
        texts = [[{"role": "user", "content": args.text[0]}, {"role": "assistant", "content": args.answer}]]
    if args.requests is not None:
        texts += [request.content for request in activations.requests(args.requests)]
    if not texts:
        raise _refuse("watchlist try", "there is no text", "Give --text or --requests.")
    if args.html is not None and len(texts) != 1:
        raise _refuse(f"--html {args.html}", f"there are {len(texts)} texts", "It shows one: give one.")
    return texts


def _sizes(one: Scored) -> str:
    exceeded = one.exceeded()
    over = f"over the limit: {', '.join(exceeded)}" if exceeded else "nothing over a limit"
    return f"{one.prompt_tokens} prompt and {len(one.tokens) - one.prompt_tokens} output tokens, {over}"


def _lines(one: Scored, feature: str | None) -> list[str]:
    from latentwatch.evidence.heatmap import printable

    statistics, exceeded = one.statistics(), one.exceeded()
    lines = []
    for shown in one.as_request().activations:
        if feature not in (None, shown.feature) or not shown.values:
            continue
        at = max(range(len(shown.values)), key=shown.values.__getitem__)
        position = shown.positions[at]
        value = statistics[shown.feature]
        compared = "no token that its limit counts" if value != value else f"{value:.4g}"
        limit = "no limit" if shown.limit is None else f"limit {shown.limit:g}"
        mark = "OVER " if shown.feature in exceeded else ""
        where = "prompt" if position < one.prompt_tokens else "output"
        token = printable(one.tokens[position])
        lines.append(
            f"  {shown.feature:<20} {mark}{compared}, {limit}; most {shown.values[at]:.4g} on {token!r} "
            f"({where}, position {position}): {shown.label}"
        )
    left = len(lines) - _SHOWN
    return [*lines[:_SHOWN], *([f"  and {left} more that fire; --feature ID shows one"] if left > 0 else [])]


def _refuse(what: str, found: str, instead: str) -> ConfigRefused:
    return ConfigRefused(what, found=found, instead=instead, reason=RefusalReason.CONFIG_VALUE)
