"""A GGUF file becomes the Hugging Face folder that it was made of; what is not known is refused by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from latentwatch.demo.build import from_gguf
from latentwatch.errors import ConfigRefused

from tests.support.real_model import smollm2

LAYERS, WIDTH, HEADS, KV_HEADS, INNER = 2, 16, 4, 2, 24
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghij0123456789", "Ġ", "ab", "12"]
MERGES = ["a b", "1 2"]


def small_file(
    path: Path, *, architecture: str = "llama", pre: str = "smollm", tensor: str = "", key: str = ""
) -> dict[str, np.ndarray]:
    """A llama of 2 layers as GGUF; returns its weights under their names at Hugging Face."""
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    if key:
        writer.add_string(key, "linear")
    kv = WIDTH // HEADS * KV_HEADS
    shapes = {
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (kv, WIDTH),
        "attn_v": (kv, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (INNER, WIDTH),
        "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER),
        "attn_norm": (WIDTH,),
        "ffn_norm": (WIDTH,),
    }
    weights = {
        "model.embed_tokens.weight": rng.normal(size=(len(TOKENS), WIDTH)),
        "model.norm.weight": rng.normal(size=WIDTH),
    }
    writer.add_tensor("token_embd.weight", np.float32(weights["model.embed_tokens.weight"]))
    writer.add_tensor("output_norm.weight", np.float32(weights["model.norm.weight"]))
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            value = weights[f"model.layers.{layer}.{from_gguf.LLAMA.layer[name]}.weight"] = rng.normal(size=shape)
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name)
            if heads:  # as llama.cpp's own convert_hf_to_gguf.py writes them
                value = value.reshape(heads, 2, shape[0] // heads // 2, shape[1]).swapaxes(1, 2).reshape(shape)
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.float32(value))
    if tensor:
        writer.add_tensor(tensor, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: np.float32(value) for name, value in weights.items()}


def test_every_weight_comes_back_where_hugging_face_has_it(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    expected = small_file(tmp_path / "small.gguf")
    folder = from_gguf.folder_of(tmp_path / "small.gguf", tmp_path / "cache")
    found = load_file(folder / "model.safetensors")
    assert set(found) == set(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_transformers_loads_it_and_every_digit_is_a_token(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small_file(tmp_path / "small.gguf")
    folder = from_gguf.folder_of(tmp_path / "small.gguf", tmp_path / "cache")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.num_key_value_heads == KV_HEADS and model.config.rms_norm_eps == 1e-5
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # "12" is in the vocabulary and is a merge, as "ab" is.
    assert tokenizer.tokenize("<|im_start|>ab12") == ["<|im_start|>", "ab", "1", "2"]
    assert tokenizer.decode(tokenizer("ab 12")["input_ids"]) == "ab 12"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def test_queries_turn_by_the_same_angles_in_either_order() -> None:
    rng = np.random.default_rng(1)
    n, heads = 8, 2
    weight, stream, angle = rng.normal(size=(heads * n, 5)), rng.normal(size=5), rng.normal(size=n // 2)
    turned = np.exp(1j * angle)
    pairs = (weight @ stream).reshape(heads, n // 2, 2)
    ours = (from_gguf.halved(np.float32(weight), heads) @ stream).reshape(heads, 2, n // 2)
    np.testing.assert_allclose((ours[:, 0] + 1j * ours[:, 1]) * turned, (pairs @ [1, 1j]) * turned, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'"),
        ({"pre": "qwen2"}, "pre-tokenizer 'qwen2'"),
        ({"tensor": "rope_freqs.weight"}, "tensor rope_freqs.weight"),
        ({"tensor": "blk.0.attn_q.bias"}, "tensor blk.0.attn_q.bias"),
        ({"key": "llama.rope.scaling.type"}, "key llama.rope.scaling.type"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, change: dict[str, str], named: str) -> None:
    small_file(tmp_path / "small.gguf", **change)
    with pytest.raises(ConfigRefused, match=named):
        from_gguf.folder_of(tmp_path / "small.gguf", tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([], [".lock"])


@pytest.mark.parametrize("length", [0, 3, 40, 2000, -200])
def test_a_file_that_is_cut_is_refused(tmp_path: Path, length: int) -> None:
    small_file(tmp_path / "small.gguf")
    data = (tmp_path / "small.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:length])
    with pytest.raises(ConfigRefused, match="not a whole GGUF file"):
        from_gguf.folder_of(tmp_path / "cut.gguf", tmp_path / "cache")


def test_a_package_that_is_not_installed_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigRefused, match=r"not installed in this environment\. Run 'make demo'"):
        from_gguf.installed_file("latentwatch-no-such-package")


def test_what_is_converted_is_found_again_and_a_kill_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    small_file(tmp_path / "small.gguf")
    killed = (
        "import os, signal, sys; from pathlib import Path; from latentwatch.demo.build import from_gguf\n"
        "from_gguf.save_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from_gguf.folder_of(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    argv = [sys.executable, "-c", killed, str(tmp_path / "small.gguf"), str(tmp_path / "cache")]
    assert subprocess.run(argv, env=os.environ, timeout=60, check=False).returncode == -signal.SIGKILL
    assert any(path.suffix == ".partial" for path in (tmp_path / "cache").iterdir())
    folder = from_gguf.folder_of(tmp_path / "small.gguf", tmp_path / "cache")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert from_gguf.folder_of(tmp_path / "small.gguf", tmp_path / "cache") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert not any(path.suffix == ".partial" for path in (tmp_path / "cache").iterdir())


def test_the_real_model_answers_as_it_should() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=2, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(answer).startswith(" Paris")
