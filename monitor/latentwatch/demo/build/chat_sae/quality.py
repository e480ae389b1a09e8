"""How well an SAE stands for the stream, on chats that it was not trained on.

Shape legend: B pieces of a batch, C tokens of a piece, N tokens of all pieces together, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypedDict

import torch
from torch.nn import functional

from latentwatch.demo.build.chat_sae.chats import Piece
from latentwatch.demo.build.chat_sae.stream import SINK_NORM
from latentwatch.demo.build.sae import Encoder
from latentwatch.names import HookPoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_PIECES = 4
Splice = Callable[[torch.Tensor], torch.Tensor]


class Losses(TypedDict):
    """Next-token loss of the model on the same tokens, nats a token."""

    loss_nats: float
    """As it is."""
    loss_spliced_nats: float
    """With the SAE's reconstruction in place of the stream."""
    loss_ablated_nats: float
    """With zeros in place of the stream."""
    loss_recovered: float
    """Share of the loss by ablation that the reconstruction takes back: 1 is as good as the stream itself."""


@torch.inference_mode()
def spliced_losses(
    model: PreTrainedModel, hook_point: HookPoint, encoder: Encoder, pieces: Sequence[Piece], median_norm: float
) -> Losses:
    """Losses over the tokens behind the template's prefix; the prefix and attention sinks stay as they are."""

    def rebuilt(x_ND: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(encoder.activations(x_ND)) @ encoder.w_dec_FD + encoder.b_dec_D

    plain, with_sae, without = (
        _loss(model, hook_point, pieces, splice, SINK_NORM * median_norm)
        for splice in (None, rebuilt, torch.zeros_like)
    )
    return {
        "loss_nats": plain,
        "loss_spliced_nats": with_sae,
        "loss_ablated_nats": without,
        "loss_recovered": (without - with_sae) / (without - plain),
    }


def _loss(
    model: PreTrainedModel, hook_point: HookPoint, pieces: Sequence[Piece], splice: Splice | None, sink_norm: float
) -> float:
    total, count, first = 0.0, 0, pieces[0].first
    with _spliced(model, hook_point, splice, first, sink_norm):
        for cut in range(0, len(pieces), BATCH_PIECES):
            ids_BC = torch.tensor([piece.ids for piece in pieces[cut : cut + BATCH_PIECES]])
            logits = model(input_ids=ids_BC, use_cache=False).logits[:, first:-1].float()
            said = ids_BC[:, first + 1 :]
            total += float(functional.cross_entropy(logits.flatten(0, 1), said.flatten(), reduction="sum"))
            count += said.numel()
    return total / count


@contextmanager
def _spliced(
    model: PreTrainedModel, hook_point: HookPoint, splice: Splice | None, first: int, sink_norm: float
) -> Iterator[None]:
    """The model with another stream after a layer, behind the first tokens of each piece."""

    def changed(_module: torch.nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        assert splice is not None
        x_BCD = output.float().clone()
        chosen_BC = x_BCD.norm(dim=-1) <= sink_norm
        chosen_BC[:, :first] = False
        x_BCD[chosen_BC] = splice(x_BCD[chosen_BC])
        return x_BCD.to(output.dtype)

    handle = model.model.layers[hook_point.layer].register_forward_hook(changed) if splice else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
