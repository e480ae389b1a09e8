"""A GGUF file of Gemma 3 becomes the Hugging Face folder that it was made of."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from latentwatch.demo.build import from_gguf
from latentwatch.errors import ConfigRefused

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD, INNER = 7, 16, 2, 1, 8, 24
BYTES = [f"<0x{i:02X}>" for i in range(256)]
PIECES = {"▁": -50.0, "a": -51.0, "b": -52.0, "c": -53.0, "bc": -2.0, "ab": -3.0, "▁a": -4.0, "abc": -9.0}
"""Of "abc" the piece bc comes first, since its score is higher, and then abc."""
OWN = ["\n\n", "  "]
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *OWN, *BYTES, *PIECES]
KINDS = [3, 3, 3, 2, 4, 4, *[6] * 256, *[1] * len(PIECES)]
SCORES = [0.0] * (len(TOKENS) - len(PIECES)) + list(PIECES.values())


def small_file(path: Path, *, space_prefix: bool = False, key: str = "") -> dict[str, np.ndarray]:
    """A Gemma 3 as llama.cpp's converter writes it; returns its weights under their names at Hugging Face."""
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(str(path), "gemma3")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(8)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types(KINDS)
    writer.add_token_scores(SCORES)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(space_prefix)
    if key:
        writer.add_string(key, "linear")
    shapes = {
        "attn_q": (HEADS * HEAD, WIDTH),
        "attn_k": (KV_HEADS * HEAD, WIDTH),
        "attn_v": (KV_HEADS * HEAD, WIDTH),
        "attn_output": (WIDTH, HEADS * HEAD),
        "ffn_gate": (INNER, WIDTH),
        "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER),
        "attn_q_norm": (HEAD,),
        "attn_k_norm": (HEAD,),
        **dict.fromkeys(("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), (WIDTH,)),
    }
    weights: dict[str, np.ndarray] = {}

    def add(name: str, there: str, shape: tuple[int, ...]) -> None:
        # Whole eighths, so that adding one and taking it away again is exact.
        value = weights[there] = np.float32(rng.integers(-16, 16, shape) / 8)
        writer.add_tensor(name, value + np.float32(name.endswith("norm.weight")))

    add("token_embd.weight", "model.embed_tokens.weight", (len(TOKENS), WIDTH))
    add("output_norm.weight", "model.norm.weight", (WIDTH,))
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            there = f"model.layers.{layer}.{from_gguf.GEMMA3.layer[name]}.weight"
            add(f"blk.{layer}.{name}.weight", there, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("gemma3")
    weights = small_file(folder / "small.gguf")
    return from_gguf.folder_of(folder / "small.gguf", folder / "cache"), weights


def test_every_weight_comes_back_with_norms_as_hugging_face_adds_one(made: tuple[Path, dict[str, np.ndarray]]) -> None:
    from safetensors.numpy import load_file

    folder, expected = made
    found = load_file(folder / "model.safetensors")
    assert set(found) == set(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_transformers_loads_it_with_every_sixth_layer_over_the_whole_context(
    made: tuple[Path, dict[str, np.ndarray]],
) -> None:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(made[0], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    config = model.config
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5]
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert (config.sliding_window, config.query_pre_attn_scalar, config.head_dim) == (8, HEAD, HEAD)
    assert config.vocab_size == len(TOKENS) and config.rms_norm_eps == 1e-6
    assert type(model).__name__ == "Gemma3ForCausalLM"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("abc", ["<bos>", "abc"]),
        ("ab", ["<bos>", "ab"]),
        ("b a", ["<bos>", "b", "▁a"]),
        ("a  b\n\nc", ["<bos>", "a", "▁▁", "b", "\n\n", "c"]),
        ("é", ["<bos>", "<0xC3>", "<0xA9>"]),
    ],
)
def test_text_is_cut_by_score_and_what_is_no_piece_goes_as_bytes(
    made: tuple[Path, dict[str, np.ndarray]], text: str, pieces: list[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made[0])
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"key": "gemma3.rope.scaling.type"}, "gemma3.rope.scaling.type"),
        ({"space_prefix": True}, "puts a space before the text"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, change: dict[str, str], named: str) -> None:
    small_file(tmp_path / "small.gguf", **change)
    with pytest.raises(ConfigRefused, match=named):
        from_gguf.folder_of(tmp_path / "small.gguf", tmp_path / "cache")
