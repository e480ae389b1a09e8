"""Where a decoder layer leaves its residual stream, proven by what the model makes of what the layer returns.

Nothing is inferred from a name or a signature. In one dummy forward the tensors that a watched layer returns are
replaced by known ones, otherwise in each row: one of them moved alone, or two of them moved apart, so that their sum
stays. What follows tells which of them it reads: rows in which only something else was moved come out the same. So

- a tensor is the stream if moving it changes what comes out, and moving anything else that the layer returns does not;
- two tensors are its halves if moving either changes it, and moving both, their sum left as it is, does not.

Anything else is refused: a scaled half, a third tensor that matters, a layer that runs twice, a place that nothing
follows. The known values are small whole numbers, which every dtype and every order of adding gives exactly.

Legend: T rows, D d_model, n tensors that a layer returns, E numbers that come out for a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from latentwatch.engines.vllm import hook
from latentwatch.errors import EngineRefused, RefusalReason

Forward = Callable[[int], object]
"""One dummy forward of the whole model, eager, with this many rows that are alike; returns what the model returns."""

MOVES: Final = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -1, 0), (1, 0, -1), (0, 1, -1))
"""By how many steps each of up to three tensors is moved in a row; none, each alone, each two apart."""
COPIES: Final = 2
"""Of each move: rows that must come out alike say how much noise there is."""
ROWS: Final = len(MOVES) * COPIES
"""That one hook point takes in the forward."""
MOST_NOISE: Final = 0.01
"""Relative; where rows that are alike differ by more than that, nothing can be told."""
CLEARLY: Final = 5.0
"""A change must be that many times larger than what counts as none."""


@dataclass(frozen=True)
class Place:
    """Where the stream of one hook point is read."""

    module: nn.Module
    function: Callable[[nn.Module, object, object], None]
    """One of engines/vllm/hook.py."""
    layer: nn.Module
    indices: tuple[int, ...]
    """Of what the layer returns, those whose sum the stream is; empty where it returns the stream itself."""
    dtype: torch.dtype

    @property
    def residual(self) -> bool:
        """The hook sees the stream as two halves."""
        return self.function is hook.read_sum


def prove(
    layers: nn.ModuleList,
    hooked: Sequence[int],
    d_model: int,
    forward: Forward,
    *,
    norms_of: nn.Module | None,
    max_rows: int,
) -> list[Place]:
    """The places of resid_post.<layer> for the layers `hooked`, in their order. Leaves no hook behind.

    Args:   norms_of: the model, in which a norm behind the layer that gives the sum of its halves may be read instead.
            max_rows: of one forward.
    Raises: EngineRefused, reason "stream_unproven", with the layer, what was compared, and what was found. What the
            forward raises is passed on.
    """
    last = len(layers) - 1
    wanted = sorted({*hooked, last - 1} if last in hooked and last > 0 else {*hooked})
    places: dict[int, Place] = {}
    at_once = max(1, max_rows // ROWS)
    for start in range(0, len(wanted), at_once):
        trials = [
            _Trial(norms_of, layers, layer, d_model, i) for i, layer in enumerate(wanted[start : start + at_once])
        ]
        with ExitStack() as hooks:
            for trial in trials:
                hooks.enter_context(trial.watching())
            out_TE = outcome(forward(ROWS * len(trials)), ROWS * len(trials))
        places.update({trial.layer: trial.place(out_TE) for trial in trials})
        for trial in trials:
            # What only the model's end reads of a layer may be something that was made for it, as a normed stream. A
            # layer of the same kind before it has a layer behind it, which reads what is carried on.
            if trial.layer == last > 0 and type(layers[last]) is type(layers[last - 1]):
                trial.agree(places[last].indices, places[last - 1].indices)
    return [places[layer] for layer in hooked]


def chains(lists: Mapping[str, nn.ModuleList], forward: Forward) -> list[str]:
    """Of these lists, those whose modules run in order, each given a tensor that the one before it returned."""
    place_of = {id(module): (name, i) for name, modules in lists.items() for i, module in enumerate(modules)}
    returned: dict[tuple[str, int], list[Tensor]] = {}
    broken: set[str] = set()

    def see(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        name, i = place_of[id(module)]
        given = {id(value) for value in (*args, *kwargs.values())}
        if (name, i) in returned or (i and not given & {id(value) for value in returned.get((name, i - 1), [])}):
            broken.add(name)
        parts = output if isinstance(output, tuple) else (output,)
        returned[name, i] = [part for part in parts if isinstance(part, Tensor)]

    handles = [m.register_forward_hook(see, with_kwargs=True) for modules in lists.values() for m in modules]
    try:
        forward(1)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in lists if name not in broken and (name, len(lists[name]) - 1) in returned]


def outcome(returned: object, rows: int) -> Tensor:
    """Everything that a forward returned for its rows, float32 [rows, E] on the host."""
    tensors = [returned] if isinstance(returned, Tensor) else list(returned) if isinstance(returned, tuple) else []
    found = [as_rows(tensor) for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point()]
    parts = [part.float().cpu() for part in found if part is not None and part.shape[0] == rows]
    return torch.cat(parts, dim=1) if parts else torch.zeros(rows, 0)


def as_rows(tensor: Tensor) -> Tensor | None:
    """[T, D] of [T, D] or [1, T, D], None of any other shape."""
    if tensor.dim() == 3 and tensor.shape[0] == 1:
        return tensor[0]
    return tensor if tensor.dim() == 2 else None


def whole_numbers(rows: int, d_model: int, *, seed: int, most: int) -> Tensor:
    """Reproducible integers of up to `most` either way, none of them zero, float32 [rows, D]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, most + 1, (rows, d_model), generator=generator)
    signs = torch.randint(0, 2, (rows, d_model), generator=generator) * 2 - 1
    return (sizes * signs).float()


def known_halves(place: Place, rows: int, d_model: int, *, seed: int) -> list[Tensor]:
    """Known numbers for each tensor whose sum the stream is, float32 [rows, D]."""
    return [whole_numbers(rows, d_model, seed=seed + n, most=8) for n in range(max(1, len(place.indices)))]


@contextmanager
def injected(place: Place, known: Sequence[Tensor]) -> Iterator[None]:
    """For as long as this lasts, the layer returns these as the parts of its stream, before any hook reads them."""

    def replace(_module: nn.Module, _args: object, output: Any) -> object:
        if not place.indices:
            return known[0].to(output).reshape(output.shape)
        parts = list(output)
        for index, half in zip(place.indices, known, strict=True):
            parts[index] = half.to(parts[index]).reshape(parts[index].shape)
        return tuple(parts)

    handle = place.layer.register_forward_hook(replace, prepend=True)
    try:
        yield
    finally:
        handle.remove()


class _Trial:
    """One hook point in the forward: its layer, its rows, and what was seen."""

    def __init__(self, model: nn.Module | None, layers: nn.ModuleList, layer: int, d_model: int, group: int) -> None:
        self.layer = layer
        self._layer = layers[layer]
        self._d_model = d_model
        self._rows = slice(group * ROWS, (group + 1) * ROWS)
        self._behind = [] if model is None else _behind(model, layers, layer)
        self._runs = 0
        self._found = ""
        self._returned: tuple[Tensor, ...] = ()
        self._kept: tuple[Tensor, ...] = ()
        """Copies of them, for norms work in place."""
        self._bare = False
        self._calls: dict[int, int] = {}
        self._sums: list[nn.Module] = []
        self._indices: list[int] = []
        self._length = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [self._layer.register_forward_hook(self._replace)]
        for module in self._behind:
            handles.append(module.register_forward_pre_hook(self._count))
            handles.append(module.register_forward_hook(self._see, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _replace(self, _module: nn.Module, _args: object, output: object) -> object:
        """The layer's output, its rows replaced by known ones."""
        self._runs += 1
        returned = [output] if isinstance(output, Tensor) else list(output) if isinstance(output, tuple) else None
        if returned is None:
            self._found = f"it returns a {type(output).__name__}"
            return None
        indices = [i for i, value in enumerate(returned) if isinstance(value, Tensor) and value.is_floating_point()]
        odd = [tuple(returned[i].shape) for i in indices if not self._are_rows(returned[i])]
        if odd or not 0 < len(indices) <= len(MOVES[0]):
            self._found = f"it returns {len(indices)} tensors of numbers" + (
                f", of shapes like {odd[0]} and not [rows, {self._d_model}]" if odd else ""
            )
            return None
        self._bare, self._indices, self._length = isinstance(output, Tensor), indices, len(returned)
        for n, i in enumerate(indices):
            returned[i] = self._known(returned[i], n)
        self._returned = tuple(returned[i] for i in indices)
        copies = [as_rows(tensor) for tensor in self._returned]
        self._kept = tuple(rows.float().clone() for rows in copies if rows is not None)
        return returned[0] if self._bare else tuple(returned)

    def _are_rows(self, value: Tensor) -> bool:
        rows = as_rows(value)
        return rows is not None and rows.shape[0] >= self._rows.stop and rows.shape[1] == self._d_model

    def _known(self, value: Tensor, n: int) -> Tensor:
        """A copy of the layer's n-th tensor with this trial's rows replaced."""
        base = whole_numbers(1, self._d_model, seed=1 + n, most=8)
        step = whole_numbers(1, self._d_model, seed=11, most=4)
        moves = torch.tensor([move[n] for move in MOVES] * COPIES, dtype=torch.float32)
        copy = value.clone()
        rows = as_rows(copy)
        assert rows is not None  # _are_rows
        rows[self._rows] = (base + moves[:, None] * step).to(rows)
        return copy

    def _count(self, module: nn.Module, _args: object) -> None:
        self._calls[id(module)] = self._calls.get(id(module), 0) + 1

    def _see(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        """Note a module that is given the very tensors that the layer returned, and returns their sum."""
        if len(self._returned) != 2 or not isinstance(output, tuple) or len(output) != 2:
            return
        given = [id(value) for value in (*args, *kwargs.values())]
        if not all(id(tensor) in given for tensor in self._returned) or not isinstance(output[1], Tensor):
            return
        total, rows = self._kept[0] + self._kept[1], as_rows(output[1])
        if rows is None or rows.shape != total.shape or not rows.is_floating_point():
            return
        if _apart(rows[self._rows].float(), total[self._rows]) <= _nothing(rows.dtype):
            self._sums.append(module)

    def place(self, out_TE: Tensor) -> Place:
        """What this trial proved. Raises: EngineRefused."""
        if self._runs != 1:
            raise self._refused(f"the layer runs {self._runs} times in one forward")
        if self._found:
            raise self._refused(self._found)
        indices = self._deciding(out_TE[self._rows])
        dtype = self._returned[0].dtype
        if len(indices) == 2:
            for module in self._sums:
                if self._calls[id(module)] == 1:
                    return Place(module, hook.read_second, self._layer, indices, dtype)
        functions = {(0,): hook.read_first, (1,): hook.read_second, (0, 1): hook.read_sum}
        if self._bare:
            return Place(self._layer, hook.read_whole, self._layer, (), dtype)
        if indices not in functions or (indices != (0,) and self._length != 2):
            raise self._refused(f"the stream is in the tensors {indices} of the {self._length} that it returns")
        return Place(self._layer, functions[indices], self._layer, indices, dtype)

    def _deciding(self, out_RE: Tensor) -> tuple[int, ...]:
        """Which of the tensors that the layer returns are the stream, or its halves. Raises: EngineRefused."""
        verdict = _judge(out_RE, len(self._indices), self._returned[0].dtype)
        alone, apart = verdict.alone, verdict.apart
        deciding = tuple(n for n, change in enumerate(alone) if change)
        halves = len(deciding) == 2 and apart.get(deciding) is False
        if verdict.problem or None in alone or not (len(deciding) == 1 or halves):
            raise self._refused(
                verdict.problem
                or f"moving its {len(alone)} tensors alone changes what follows by {verdict.said}, so that neither one "
                "of them nor the sum of two is all that is read"
            )
        return tuple(self._indices[n] for n in deciding)

    def agree(self, indices: tuple[int, ...], before: tuple[int, ...]) -> None:
        """Raises: EngineRefused: the layer before has its stream in another place."""
        if indices != before:
            raise self._refused(f"the stream is in the tensors {indices} of the last layer, and {before} of the others")

    def _refused(self, found: str) -> EngineRefused:
        return EngineRefused(
            f"residual stream at resid_post.{self.layer} ({type(self._layer).__name__})",
            found=f"in a dummy forward at the start, {found}",
            instead="What would be scored there is not proven to be the stream: watch another layer, or report it with "
            "the model's name.",
            reason=RefusalReason.STREAM_UNPROVEN,
        )


def _behind(model: nn.Module, layers: nn.ModuleList, layer: int) -> list[nn.Module]:
    """What may read a layer's two halves and give their sum: modules in the next layer, or those behind all layers."""
    last = layer + 1 == len(layers)
    elsewhere = {id(module) for module in (layers.modules() if last else layers)}
    within = model if last else layers[layer + 1]
    return [module for module in within.modules() if id(module) not in elsewhere]


@dataclass
class _Verdict:
    """What moving a layer's tensors did to what comes out: True changed it, False did not, None cannot be told."""

    alone: list[bool | None] = field(default_factory=list)
    apart: dict[tuple[int, ...], bool | None] = field(default_factory=dict)
    said: str = ""
    problem: str = ""


def _judge(out_RE: Tensor, tensors: int, dtype: torch.dtype) -> _Verdict:
    """Args: out_RE: what came out of the rows of MOVES, COPIES times. tensors: how many the layer returned."""
    verdict = _Verdict()
    if out_RE.shape[1] == 0 or not bool(torch.isfinite(out_RE).all()) or not bool(out_RE[0].any()):
        verdict.problem = "the model returned nothing finite for these rows, so that nothing can be told from it"
        return verdict
    base_E = out_RE[0]
    unmoved = [i for i, move in enumerate(MOVES * COPIES) if not any(move[:tensors])]
    noise = max(_apart(out_RE[i], base_E) for i in unmoved)
    if noise > MOST_NOISE:
        verdict.problem = f"rows that are alike came out {noise:.2g} apart, so that nothing can be told from them"
        return verdict
    nothing = _nothing(dtype) + 4 * noise

    def changed(move: int) -> tuple[bool | None, float]:
        sizes = [_apart(out_RE[move + copy * len(MOVES)], base_E) for copy in range(COPIES)]
        if max(sizes) <= nothing:
            return False, max(sizes)
        return (True if min(sizes) >= CLEARLY * nothing else None), min(sizes)

    said = []
    for i, move in enumerate(MOVES):
        touched = tuple(n for n, steps in enumerate(move) if steps)
        if not touched or touched[-1] >= tensors:
            continue
        answer, size = changed(i)
        said.append(f"{size:.2g}" + (" (two apart)" if len(touched) == 2 else ""))
        if len(touched) == 1:
            verdict.alone.append(answer)
        else:
            verdict.apart[touched] = answer
    verdict.said = ", ".join(said)
    return verdict


def _nothing(dtype: torch.dtype) -> float:
    """The relative difference up to which two results of a dtype count as one."""
    return max(torch.finfo(dtype).eps / 2, 1e-5)


def _apart(a: Any, b: Any) -> float:
    """Relative difference in Euclidean norm."""
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
