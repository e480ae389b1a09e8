"""A verb that needs a package which is not installed says which one, and what to install."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Final

from latentwatch.errors import ConfigRefused, RefusalReason

_ENGINE: Final = ("torch", "triton", "vllm")
_PACKAGES: Final = {
    "yaml": "pyyaml",
    "google": "protobuf",
    "grpc_health": "grpcio-health-checking",
    "grpc": "grpcio",
    "opentelemetry": "opentelemetry-sdk",
    "sklearn": "scikit-learn",
    "sae_lens": "sae-lens",
}
"""Distribution by the name that is imported, where the two differ."""
_SHOWN: Final = ("collector", "engine", "parquet", "otel", "convert", "demo-build", "completion")
"""Extras that a user installs, the likely one first."""


def refusal(verb: str, error: ImportError) -> ConfigRefused | None:
    """What to say of an import that failed; None where it is of our own code, which is a bug."""
    module = (error.name or "").partition(".")[0]
    if not module or module == "latentwatch":
        return None
    package = _PACKAGES.get(module, module)
    return ConfigRefused(
        f"latentwatch {verb}",
        found=f"it needs the package {package}, which cannot be imported ({error})",
        instead=_instead(package),
        reason=RefusalReason.PACKAGE_MISSING,
    )


def _instead(package: str) -> str:
    if package in _ENGINE:
        return "Run it where vLLM is installed, or install a build of torch for this host."
    for extra in _SHOWN:
        if package in _packages_of(extra):
            return f"Run in a clone of the repository: pip install '.[{extra}]'"
    return f"Run: pip install {package}"


def _packages_of(extra: str) -> set[str]:
    try:
        needed = metadata.requires("latentwatch") or []
    except metadata.PackageNotFoundError:
        return set()
    marked = re.compile(rf"""extra\s*==\s*["']{re.escape(extra)}["']""")
    return {re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0].lower() for line in needed if marked.search(line)}
