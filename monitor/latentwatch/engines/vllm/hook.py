"""The forward hooks that put the score op into the model's graph, one for each way in which a module gives the stream.

Dynamo traces these functions into vLLM's compiled graph, and vLLM recompiles when a traced file changes: keep this
file small, and keep everything that is not traced out of it. Which of them reads the stream of a model is not known
here: engines/vllm/proof.py finds it out. Of anything else than what was proven nothing is scored, and the step is
counted as unseen: none of them raises, whatever a module returns.
"""

from __future__ import annotations

from typing import Final

import torch

BUFFERS: Final = ("w_hi", "w_lo", "scale", "act", "stat", "scratch")
PREFIX: Final = "_latentwatch_"
"""Buffer names on the hooked module: the op's arguments, in the order of BUFFERS."""


def read_whole(module: torch.nn.Module, _args: object, output: object) -> None:
    """On a decoder layer that returns resid_post itself."""
    if isinstance(output, torch.Tensor):
        _score(module, output, None)


def read_first(module: torch.nn.Module, _args: object, output: object) -> None:
    """On a decoder layer that returns resid_post and something beside it."""
    if isinstance(output, tuple) and len(output) > 0 and isinstance(output[0], torch.Tensor):
        _score(module, output[0], None)


def read_second(module: torch.nn.Module, _args: object, output: object) -> None:
    """On the norm that follows the watched layer: it returns (normed, residual), and residual is resid_post itself.

    Reading it costs one tensor, adds none to the graph, and leaves the fusion of all-reduce and norm as it is.
    """
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], torch.Tensor):
        _score(module, output[1], None)


def read_sum(module: torch.nn.Module, _args: object, output: object) -> None:
    """On a decoder layer that returns (hidden, residual), whose sum resid_post is."""
    if not isinstance(output, tuple) or len(output) != 2:
        return
    if isinstance(output[0], torch.Tensor) and isinstance(output[1], torch.Tensor):
        _score(module, output[0], output[1])


def _score(module: torch.nn.Module, x_TD: torch.Tensor, residual_TD: torch.Tensor | None) -> None:
    if torch.compiler.is_compiling():
        _call(module, x_TD, residual_TD)
        return
    try:
        _call(module, x_TD, residual_TD)
    except Exception:
        # An eager forward runs this itself, and nothing of ours may leave it (I4). The rows stay unwritten, which is
        # counted; the op has said why, unless it was the copy below that found no memory.
        return


def _call(module: torch.nn.Module, x_TD: torch.Tensor, residual_TD: torch.Tensor | None) -> None:
    if x_TD.is_cpu and x_TD.is_floating_point():
        # The CPU engine compiles one graph for the whole model, in which the stream need not exist as a bfloat16
        # tensor. Were it the op's input, it would, and what follows would read it rounded: other answers than without
        # the monitor. Its float32 copy is nobody else's. On a GPU the stream leaves each piece of the graph anyway.
        x_TD = x_TD.float()
        residual_TD = None if residual_TD is None else residual_TD.float()
    torch.ops.latentwatch.score(
        x_TD,
        residual_TD,
        module._latentwatch_w_hi,
        module._latentwatch_w_lo,
        module._latentwatch_scale,
        module._latentwatch_act,
        module._latentwatch_stat,
        module._latentwatch_scratch,
    )
