"""The demo model: a byte-level BPE tokenizer and a small Llama, both trained here on generated dialogues.

Shape legend: B dialogues in a batch, T tokens, D d_model, L layers.

On disk it is an ordinary Hugging Face folder (config, bfloat16 safetensors, tokenizer with a chat template), so that
`vllm serve FOLDER` needs nothing from this package. Training is seeded; another CPU or torch build may still round
sums differently, so weights agree in kind and not in the last bit.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch.nn import functional

from latentwatch.demo.build.dialogues import Dialogue, Turn

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLE_TOKENS: Final = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCAB: Final = 1536
"""Small on purpose: unseen names then fall into pieces that the model has seen often."""
PROMPT_WEIGHT: Final = 0.3
"""Loss weight of system and user tokens; the assistant's weigh 1."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TrainPlan:
    """How the language model is trained."""

    tokens: int = 4_500_000
    batch_tokens: int = 4_000
    learning_rate: float = 3e-3
    warmup_share: float = 0.05
    weight_decay: float = 0.05


@dataclass(frozen=True)
class Encoded:
    """A dialogue as token ids, and where its last assistant turn lies."""

    ids: tuple[int, ...]
    """<bos>, then per turn its role token, its content and <end>."""
    weights: tuple[float, ...]
    """Loss weight of predicting each id."""
    output_start: int
    """Index of the first token of the last turn's content: what the model would have generated starts here."""


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with single digits, as a transformers fast tokenizer with the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, END, *ROLE_TOKENS.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=END, pad_token=PAD, model_max_length=1024
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[Dialogue]) -> list[Encoded]:
    """Token ids of whole dialogues; equal to `apply_chat_template` on their messages."""
    texts = [turn.content for dialogue in dialogues for turn in dialogue.turns]
    contents = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    roles = {role: tokenizer.convert_tokens_to_ids(token) for role, token in ROLE_TOKENS.items()}
    return [
        _join(
            [(turn, next(contents)) for turn in dialogue.turns], roles, tokenizer.bos_token_id, tokenizer.eos_token_id
        )
        for dialogue in dialogues
    ]


def _join(turns: Sequence[tuple[Turn, list[int]]], roles: dict[str, int], bos: int, end: int) -> Encoded:
    ids, weights, start = [bos], [0.0], 0
    for turn, content in turns:
        start = len(ids) + 1
        ids += [roles[turn.role], *content, end]
        weight = 1.0 if turn.role == "assistant" else PROMPT_WEIGHT
        weights += [0.0, *([weight] * (len(content) + 1))]
    return Encoded(tuple(ids), tuple(weights), start)


def new_model(vocab_size: int, *, seed: int) -> LlamaForCausalLM:
    """An untrained LlamaForCausalLM of the demo's shape, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=1024,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
            initializer_range=0.05,
        )
    )


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    dialogues: Iterator[Dialogue],
    plan: TrainPlan,
    *,
    progress: Progress,
) -> float:
    """Train in place, in float32, on fresh dialogues.

    Returns: the mean loss over the last twentieth of the steps, nats a token, prompt tokens weighing PROMPT_WEIGHT.
    """
    model.float().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=plan.weight_decay
    )
    seen, started, step, losses = 0, time.monotonic(), 0, []
    for batch in batches(tokenizer, dialogues, plan.batch_tokens):
        if seen >= plan.tokens:
            break
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * _schedule(seen / plan.tokens, plan.warmup_share)
        loss = _loss(model, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += sum(len(row.ids) for row in batch)
        step += 1
        losses.append(loss.item())
        if step % 100 == 0:
            pace = seen / (time.monotonic() - started)
            progress(f"model: {seen / plan.tokens:4.0%}, loss {np.mean(losses[-50:]):.3f} nats, {pace:,.0f} tokens/s")
    return float(np.mean(losses[-max(1, step // 20) :]))


def batches(
    tokenizer: PreTrainedTokenizerFast, dialogues: Iterator[Dialogue], batch_tokens: int
) -> Iterator[list[Encoded]]:
    """Batches of dialogues of similar length, at most `batch_tokens` tokens each with padding."""
    while chunk := list(itertools.islice(dialogues, 1024)):
        rows = sorted(encode(tokenizer, chunk), key=lambda row: len(row.ids))
        cut: list[list[Encoded]] = [[]]
        for row in rows:
            if cut[-1] and (len(cut[-1]) + 1) * len(row.ids) > batch_tokens:
                cut.append([])
            cut[-1].append(row)
        # A fixed shuffle, so that a chunk does not go from short dialogues to long ones.
        yield from (cut[i] for i in np.random.default_rng(len(cut)).permutation(len(cut)))


def pad(rows: Sequence[Encoded]) -> torch.Tensor:
    """Ids as int64 [B, T], padded on the right; causal attention never looks there."""
    width = max(len(row.ids) for row in rows)
    return torch.tensor([[*row.ids, *([0] * (width - len(row.ids)))] for row in rows])


def _loss(model: LlamaForCausalLM, rows: Sequence[Encoded]) -> torch.Tensor:
    ids_BT = pad(rows)
    weights_BT = torch.zeros(ids_BT.shape)
    for i, row in enumerate(rows):
        weights_BT[i, : len(row.ids)] = torch.tensor(row.weights)
    with torch.autocast("cpu", torch.bfloat16):
        logits_BTV = model(ids_BT[:, :-1]).logits
    nats_BT = functional.cross_entropy(logits_BTV.float().transpose(1, 2), ids_BT[:, 1:], reduction="none")
    return (nats_BT * weights_BT[:, 1:]).sum() / weights_BT[:, 1:].sum()


def _schedule(done: float, warmup: float) -> float:
    """Share of the peak learning rate: a linear rise, then a cosine down to a twentieth."""
    if done < warmup:
        return (done + 1e-3) / (warmup + 1e-3)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / (1 - warmup))))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the Hugging Face folder in bfloat16."""
    model.to(torch.bfloat16)
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model, in bfloat16 as it is served, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), AutoTokenizer.from_pretrained(
        folder
    )


@torch.inference_mode()
def generate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[Turn]],
    *,
    max_tokens: int,
    temperature: float,
    batch: int = 192,
) -> list[str]:
    """Replies to prompts, in their order: greedy at temperature 0, else sampled with torch's global generator."""
    messages = [[{"role": turn.role, "content": turn.content} for turn in prompt] for prompt in prompts]
    ids = [tokenizer.apply_chat_template(m, add_generation_prompt=True)["input_ids"] for m in messages]
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    replies = [""] * len(ids)
    for cut in range(0, len(order), batch):
        chosen = order[cut : cut + batch]
        width = max(len(ids[i]) for i in chosen)
        prompt_BT = torch.tensor([[0] * (width - len(ids[i])) + ids[i] for i in chosen])
        mask_BT = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in chosen])
        out_BT = model.generate(prompt_BT, attention_mask=mask_BT, max_new_tokens=max_tokens, **sampling)
        for i, text in zip(chosen, tokenizer.batch_decode(out_BT[:, width:], skip_special_tokens=True), strict=True):
            replies[i] = text
    return replies
