"""The residual stream of every token at several layers, out of a running engine: what probes are trained on.

It reads where serving reads: the places are proven as for a watchlist (engines/vllm/proof.py), and rows are attributed
by the same map. What is read is copied at once, since the norm behind a layer works in place. For an engine that does
nothing else: eager, in one process, and it may fail.

Legend: T rows, D d_model, L layers.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch

from latentwatch.arrays import F16, F32
from latentwatch.engines.vllm import arming, hook, lone_forward, proof, row_map
from latentwatch.engines.vllm.interfaces import SchedulerOutput, Worker

_SMALLEST: Final = 1e-30
"""A row of zeros is divided by it."""


class Capture:
    """Attached to one worker for as long as its engine lives."""

    def __init__(self, worker: Worker, layers: Sequence[int], skip_first: int) -> None:
        """Raises: EngineRefused: the layers cannot be found, or where their stream is cannot be proven."""
        self._worker = worker
        self._skip_first = skip_first
        self._step: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(layers)
        self._found: dict[str, list[tuple[F16, F32]]] = defaultdict(list)
        for index, place in enumerate(_places(worker, layers)):
            place.module.register_forward_hook(functools.partial(self._read, index, place.function))
        self._wrap_steps(worker)

    def pop(self, request_id: str) -> tuple[F16, F32]:
        """What a request left, [L, T, D] relative to the largest element of each row, [L, T]. Raises KeyError."""
        pieces = self._found.pop(request_id)
        return np.concatenate([x for x, _ in pieces], axis=1), np.concatenate([s for _, s in pieces], axis=1)

    @property
    def request_ids(self) -> list[str]:
        """The engine's ids of the requests that are not popped yet."""
        return list(self._found)

    def _read(self, index: int, function: Callable[..., None], _module: object, _args: object, output: object) -> None:
        x_TD = _stream(function, output)
        largest_T = x_TD.abs().amax(dim=1).clamp_min(_SMALLEST)
        self._step[index] = (x_TD / largest_T[:, None]).half(), largest_T

    def _wrap_steps(self, worker: Worker) -> None:
        original = worker.execute_model  # type: ignore[attr-defined]  # only the hook's own wrapping is in the protocol

        def execute_model(scheduler_output: SchedulerOutput, *args: object, **kwargs: object) -> object:
            result = original(scheduler_output, *args, **kwargs)
            if scheduler_output.total_num_scheduled_tokens:
                self._attribute(scheduler_output)
            return result

        worker.execute_model = execute_model  # type: ignore[attr-defined]  # as above

    def _attribute(self, scheduler_output: SchedulerOutput) -> None:
        rows = row_map.read(self._worker.model_runner, scheduler_output)
        step = [one for one in self._step if one is not None]
        x_LTD = torch.stack([x for x, _ in step]).cpu().numpy()
        largest_LT = torch.stack([largest for _, largest in step]).float().cpu().numpy()
        first = 0
        for name, start, count in zip(rows.request_ids, rows.start, rows.count, strict=True):
            skipped = min(max(self._skip_first - int(start), 0), int(count))
            wanted = slice(first + skipped, first + int(count))
            first += int(count)
            if wanted.start < wanted.stop:
                self._found[name].append((x_LTD[:, wanted].copy(), largest_LT[:, wanted].copy()))


def _places(worker: Worker, layers: Sequence[int]) -> list[proof.Place]:
    text = worker.model_config.hf_config.get_text_config()
    forward = functools.partial(lone_forward.run, worker)
    model = worker.model_runner.get_model()
    return proof.prove(
        arming.find_layers(model, text.num_hidden_layers, forward),
        layers,
        text.hidden_size,
        forward,
        norms_of=None if lone_forward.needs_embeddings(worker) else model,
        max_rows=worker.vllm_config.scheduler_config.max_num_batched_tokens,
    )


def _stream(function: Callable[..., None], output: object) -> torch.Tensor:
    """resid_post as the op sees it through `function` of engines/vllm/hook.py: halves are added in float32."""
    if function is hook.read_whole:
        assert isinstance(output, torch.Tensor)
        return output.float()
    assert isinstance(output, tuple)
    if function is hook.read_sum:
        return torch.add(output[0].float(), output[1].float())
    whole: torch.Tensor = output[0 if function is hook.read_first else 1]
    return whole.float()
