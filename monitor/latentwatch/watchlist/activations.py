"""Run a Hugging Face model over texts and keep its residual stream: what discover, probe, verify and calibration need.

Legend: R requests, T their tokens one after another, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import safetensors.numpy

from latentwatch import storage
from latentwatch.arrays import F32, I64
from latentwatch.errors import RefusalReason, WatchlistRefused
from latentwatch.names import HookPoint
from latentwatch.watchlist.location import strict_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_LINE_BYTES: Final = 4 << 20
TOKENS_AT_ONCE: Final = 2048
"""Of a forward, padding included."""
MOST_SKIPPED: Final = 64
"""A watchlist can leave out so many first positions."""
ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_NOTES: Final = ("id", "topic", "kind", "near", "label", "source", "category", "tags", "note", "comment", "metadata")
"""Fields of a line that are for people."""


_OTHER_FILES: Final = {b"PAR1": "a Parquet file", b"\x1f\x8b": "a gzip file", b"PK\x03\x04": "a zip file"}
"""First bytes of files that data sets come in, and that are not lines of JSON."""


@dataclass(frozen=True)
class Request:
    """One text or dialogue of a .jsonl file."""

    content: str | tuple[Mapping[str, str], ...]
    """A text as it is, or chat messages for the model's template."""
    group: str
    """Requests of one group stay on one side of a split; each is its own where the file gives none."""


@dataclass(frozen=True)
class Recording:
    """The stream at one hook point over all requests, first positions left out."""

    x_TD: F32
    request_T: I64
    """Ascending."""
    tokens: tuple[tuple[str, ...], ...]
    """The text of the recorded tokens, per request."""
    skip_first: int = 1
    """Positions that are left out at each start."""

    @property
    def starts_R(self) -> I64:
        """The first token of each request in T."""
        return np.searchsorted(self.request_T, np.arange(len(self.tokens)))

    def select(self, wanted_R: Sequence[int]) -> Recording:
        """Some of the requests, renumbered in the order given."""
        bounds = np.append(self.starts_R, len(self.request_T))
        pieces = [np.arange(bounds[r], bounds[r + 1]) for r in wanted_R]
        request_T = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
        tokens = tuple(self.tokens[r] for r in wanted_R)
        return Recording(self.x_TD[np.concatenate(pieces)], request_T, tokens, self.skip_first)


def requests(path: Path) -> list[Request]:
    """Read a .txt file, each line a text, or a .jsonl file of {"text": ...} or {"messages": [{"role", "content"}]},
    each with an optional "group".

    A content is text, or a list of OpenAI's content parts of which one is text and no other stands.

    Blank lines are passed over.

    Raises: WatchlistRefused: the file is missing or empty, or a line is neither or holds what would not reach the
            model: a part that is not text, null, tool calls, an unknown role or field. The line is named.
    """
    found: list[Request] = []
    number = 0
    try:
        with path.open("rb") as stream:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if line.strip():
                    read = _plain if path.suffix == ".txt" else _fields
                    found.append(_request(read(line), f"{path.name}:{number}"))
    except OSError as error:
        raise _refuse(str(path), f"it cannot be read ({error.strerror})", "Give a .jsonl or .txt file.") from error
    except (ValueError, RecursionError) as error:
        instead = "plain text in UTF-8" if path.suffix == ".txt" else '{"text": "..."} or {"messages": [...]}'
        raise _refuse(f"{path.name} line {number}", f"not a request ({error})", f"Write {instead}.") from error
    if not found:
        raise _refuse(str(path), "it holds no requests", "Give one per line.")
    return found


def _fields(line: bytes) -> object:
    """What a line holds. Raises ValueError that says what stands there instead of JSON, or RecursionError."""
    _check_line(line, "lines of JSON")
    return strict_json(line)


def _plain(line: bytes) -> object:
    """A line of a text file, without its end. Raises ValueError."""
    _check_line(line, "lines of text")
    text = line.decode("utf-8").rstrip("\r\n")
    if text.startswith(('{"text"', '{"messages"')):
        raise ValueError("it is JSON, which would be scored as it stands; name the file .jsonl")
    return {"text": text}


def _check_line(line: bytes, wanted: str) -> None:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"it has more than {MAX_LINE_BYTES} bytes")
    for start, what in _OTHER_FILES.items():
        if line.startswith(start):
            raise ValueError(f"this is {what}, not {wanted}")


def _request(fields: object, own_group: str) -> Request:
    if not isinstance(fields, dict):
        raise ValueError(f"{_kind(fields)}, not an object")
    if unknown := sorted(set(fields) - {"text", "messages", "group", *_NOTES}):
        raise ValueError(f"field {unknown[0]!r} is not read, and may belong to the prompt")
    if ("text" in fields) == ("messages" in fields):
        raise ValueError("it has both text and messages" if "text" in fields else "it has neither text nor messages")
    group = fields.get("group")
    if isinstance(group, bool) or not isinstance(group, str | int | None):
        raise ValueError(f"its group is {_kind(group)}")
    content = _text(fields["text"], "text") if "text" in fields else _messages(fields["messages"])
    return Request(content, own_group if group is None else str(group))


def _messages(messages: object) -> tuple[Mapping[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages is {_kind(messages)}, not a list of messages")
    return tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))


def _message(message: object, place: str) -> Mapping[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"{place} is {_kind(message)}, not an object")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{place}.role is {str(role)[:40]!r}, not one of {', '.join(ROLES)}")
    for name, value in message.items():
        if name not in ("role", "content") and value not in (None, []):
            raise ValueError(f"{place} has {name!r}, which would not reach the model's template")
    if "content" not in message:
        raise ValueError(f"{place} has no content")
    return {"role": role, "content": _content(message["content"], f"{place}.content")}


def _content(content: object, place: str) -> str:
    """The text of a message; how several parts are joined depends on the template, so that only one is read."""
    if not isinstance(content, list):
        return _text(content, place)
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = repr(str(part.get("type"))[:40]) if isinstance(part, dict) else _kind(part)
            raise ValueError(f"{place}[{i}] is a part of type {kind}, not text")
        if more := sorted(set(part) - {"type", "text"}):
            raise ValueError(f"{place}[{i}] has {more[0]!r}, which would not reach the model")
    if len(content) != 1:
        raise ValueError(f"{place} has {len(content)} parts; write them as one text, as your template joins them")
    return _text(content[0].get("text"), f"{place}[0].text")


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place} is {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} has half a character, {value[error.start]!r}, which no tokenizer reads") from error
    return value


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")


def record(
    model: str,
    wanted: Sequence[Request],
    hook_point: HookPoint,
    *,
    skip_first: int | None = 1,
    max_tokens: int = 512,
    progress: Callable[[int], None] = lambda _: None,
) -> Recording:
    """Run the model over the requests, many at a time, and keep the stream after a layer.

    Args:    model: a Hugging Face model's folder or name.   skip_first: positions to leave out at each start; None for
             the tokens that all requests share, as a chat template's system prompt, and at least one.
             max_tokens: longer requests are cut.   progress: called with the number of requests done.
    Raises:  WatchlistRefused: the model cannot be loaded, or lacks the layer.
    """
    import torch

    network, tokenizer = _load(model)
    decoder = network.get_decoder()  # without the head, whose logits would be the largest tensor by far
    layers = decoder.layers
    if hook_point.layer >= len(layers):
        raise _refuse(f"model {model}", f"it has {len(layers)} layers, no {hook_point}", "Name a layer that it has.")
    ids_R = [token_ids(tokenizer, request)[:max_tokens] for request in wanted]
    skipped = max(1, min(shared_start(ids_R), MOST_SKIPPED)) if skip_first is None else skip_first
    for number, ids in enumerate(ids_R):
        if len(ids) <= skipped:
            found = f"it has {len(ids)} tokens, of which the first {skipped} are left out"
            raise _refuse(f"request {number + 1}", found, "Leave it out.")
    streams: dict[int, F32] = {}
    with torch.inference_mode(), _outputs(layers[hook_point.layer]) as outputs:
        for batch in batches(ids_R):
            outputs.clear()
            longest = max(len(ids_R[r]) for r in batch)
            # Padding stands behind a text, where a causal model does not see it.
            padded = torch.tensor([[*ids_R[r], *[ids_R[r][-1]] * (longest - len(ids_R[r]))] for r in batch])
            decoder(input_ids=padded.to(network.device))
            for r, x_TD in zip(batch, outputs[0], strict=True):
                streams[r] = x_TD[skipped : len(ids_R[r])].float().cpu().numpy()
            progress(len(streams))
    tokens = tuple(tuple(tokenizer.decode([i]) for i in ids[skipped:]) for ids in ids_R)
    request_T = np.repeat(np.arange(len(wanted)), [len(of_request) for of_request in tokens])
    return Recording(np.concatenate([streams[r] for r in range(len(wanted))]), request_T, tokens, skipped)


def batches(ids_R: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Requests that run together, those of like length, at most TOKENS_AT_ONCE with their padding or one alone."""
    batch: list[int] = []
    for r in sorted(range(len(ids_R)), key=lambda r: len(ids_R[r])):
        if batch and (len(batch) + 1) * len(ids_R[r]) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(r)
    if batch:
        yield batch


def shared_start(ids_R: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with; at least one token of each is its own."""
    shortest = min(map(len, ids_R), default=1) - 1
    for at in range(shortest):
        if any(ids[at] != ids_R[0][at] for ids in ids_R):
            return at
    return max(shortest, 0)


def prompt_tokens(model: str, wanted: Sequence[Request]) -> list[int]:
    """How many tokens of each request are prompt: all, but for the last answer of a dialogue that ends with one.

    Raises: WatchlistRefused: the model's tokenizer cannot be loaded.
    """
    tokenizer = _tokenizer(model)
    return [_prompt_tokens(tokenizer, request) for request in wanted]


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, request: Request) -> int:
    whole = token_ids(tokenizer, request)
    if isinstance(request.content, str) or request.content[-1]["role"] != "assistant" or len(request.content) < 2:
        return len(whole)
    before = [dict(message) for message in request.content[:-1]]
    text = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
    prompt = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # Where the template writes the prompt of an answer differently, or a token spans both: as far as they agree.
    return next((i for i, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), len(prompt))


@contextmanager
def _outputs(layer: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """What the layer returns in each forward, until the context is left.

    By a hook and not by `hidden_states`, of which the last entry is behind the final norm.
    """
    outputs: list[torch.Tensor] = []

    def add(_module: torch.nn.Module, _inputs: object, output: tuple[torch.Tensor, ...] | torch.Tensor) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).detach())

    handle = layer.register_forward_hook(add)
    try:
        yield outputs
    finally:
        handle.remove()


def save(recording: Recording, path: Path, hook_point: HookPoint) -> None:
    """Write an activations file, as `verify --activations` and TopK calibration read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.atomic_write(path) as file:
        file.write(safetensors.numpy.save({"x": recording.x_TD}, {"hook_point": str(hook_point)}))


def _load(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = _tokenizer(model)
    with _named(model):
        import torch
        from transformers import AutoModelForCausalLM

        network = AutoModelForCausalLM.from_pretrained(model).eval()
        return network.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    with _named(model):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model)


@contextmanager
def _named(model: str) -> Iterator[None]:
    """What goes wrong in here, by the model's name. Raises WatchlistRefused."""
    try:
        yield
    except ImportError as error:
        raise _refuse(
            f"model {model}", f"package {error.name!r} is missing", "Install torch and transformers."
        ) from error
    except (OSError, ValueError) as error:
        found = f"it cannot be loaded ({' '.join(str(error).split())[:200]})"
        raise _refuse(f"model {model}", found, "Give a Hugging Face model's folder or name.") from error


def token_ids(tokenizer: PreTrainedTokenizerBase, request: Request) -> list[int]:
    """As it is served: a text as it is, a dialogue by the chat template, with the prompt for the model's answer where
    somebody else spoke last.
    """
    if isinstance(request.content, str):
        return list(tokenizer(request.content)["input_ids"])
    asks = request.content[-1]["role"] != "assistant"
    messages = [dict(m) for m in request.content]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False)
    # The template writes the special tokens itself; the tokenizer would add them a second time.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def model_name(model: str) -> str:
    """A model by its folder or name, for people; with the folder above where its own only says that it is a model."""
    path = Path(model).resolve()
    says_little = Path(model).is_dir() and path.name in ("model", "hf", "checkpoint")
    return f"{path.parent.name}/{path.name}" if says_little else path.name


def _refuse(what: str, found: str, instead: str) -> WatchlistRefused:
    return WatchlistRefused(what, found=found, instead=instead, reason=RefusalReason.RECORDING)
