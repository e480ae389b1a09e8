"""A GGUF file's tokenizer as tokenizer.json, tokenizer_config.json and chat_template.jinja."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of token, as llama.cpp numbers them."""
SPACE: Final = "\u2581"
Facts = Mapping[str, Any]
"""The file's key-value pairs."""


def _smollm() -> pre_tokenizers.PreTokenizer:
    """GPT-2's, but every digit by itself."""
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return pre_tokenizers.Sequence(parts)


BYTE_PAIR: Final[Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]]] = {"smollm": _smollm}
"""How text is cut before byte pairs are merged, by the file's `tokenizer.ggml.pre`."""


class UnknownPart(ValueError):
    """Something in a whole file that is not known here; its text says what."""


def tokenizer_of(facts: Facts) -> Tokenizer:
    """The tokenizer that the file describes. Raises UnknownPart, KeyError: the file does not say what is needed."""
    model, pre = facts["tokenizer.ggml.model"], facts.get("tokenizer.ggml.pre", "default")
    if model == "llama" and pre == "default":
        return _sentence_pieces(facts)
    if model != "gpt2" or pre not in BYTE_PAIR:
        raise UnknownPart(f"tokenizer {model!r} with the pre-tokenizer {pre!r}")
    texts: Sequence[str] = facts["tokenizer.ggml.tokens"]
    kinds: Sequence[int] = facts["tokenizer.ggml.token_type"]
    if strange := sorted(set(kinds) - {NORMAL, CONTROL, USER_DEFINED, UNUSED}):
        raise UnknownPart(f"tokens of type {strange[0]} in a tokenizer of byte pairs")
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=merges))
    made.pre_tokenizer = BYTE_PAIR[pre]()
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(_added(texts, kinds, CONTROL))
    made.add_tokens(_added(texts, kinds, USER_DEFINED))
    return made


def _sentence_pieces(facts: Facts) -> Tokenizer:
    """SentencePiece's byte pairs, as Gemma's: the pair of highest score goes first, what is no piece goes as bytes.

    A space is written as U+2581 in the pieces; llama.cpp's converter writes it as a space in the user-defined ones.
    """
    if facts.get("tokenizer.ggml.add_space_prefix", True):
        raise UnknownPart("a tokenizer of sentence pieces that puts a space before the text")
    kinds: Sequence[int] = facts["tokenizer.ggml.token_type"]
    texts = [text.replace(" ", SPACE) for text in facts["tokenizer.ggml.tokens"]]
    vocab = {text: i for i, text in enumerate(texts)}
    if len(vocab) != len(texts):
        raise UnknownPart("a tokenizer of sentence pieces in which two tokens are the same")
    unknown = texts[facts["tokenizer.ggml.unknown_token_id"]]
    made = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(texts, vocab, kinds, facts["tokenizer.ggml.scores"]),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(_added(texts, kinds, CONTROL))
    made.add_tokens(_added(texts, kinds, USER_DEFINED, normalized=True))
    if facts.get("tokenizer.ggml.add_bos_token", False):
        first = texts[facts["tokenizer.ggml.bos_token_id"]]
        made.post_processor = processors.TemplateProcessing(
            single=[first, "$A"], pair=[first, "$A", f"{first}:1", "$B:1"], special_tokens=[(first, vocab[first])]
        )
    return made


def _merges(
    texts: Sequence[str], vocab: Mapping[str, int], kinds: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to make a piece of two, pieces of highest score first; of one piece, the shortest beginning first."""
    made = sorted((i for i, kind in enumerate(kinds) if kind == NORMAL), key=lambda i: -scores[i])
    return [
        (text[:cut], text[cut:])
        for text in (texts[i] for i in made)
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]


def write_tokenizer(facts: Facts, folder: Path) -> None:
    """The files that transformers and vLLM read. Raises as tokenizer_of, OSError."""
    tokenizer_of(facts).save(str(folder / "tokenizer.json"))
    texts = facts["tokenizer.ggml.tokens"]
    named = {
        name: texts[facts[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in facts
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": facts[f"{facts['general.architecture']}.context_length"],
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": text for name, text in named.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if template := facts.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _added(texts: Sequence[str], kinds: Sequence[int], kind: int, *, normalized: bool = False) -> list[AddedToken]:
    return [
        AddedToken(text, special=kind == CONTROL, normalized=normalized)
        for text, its in zip(texts, kinds, strict=True)
        if its == kind
    ]
