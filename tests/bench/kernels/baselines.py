"""What people would write instead of the kernel, given every help that PyTorch has.

All of them give what the kernel gives (activations and row statistics) but from bfloat16 rows alone: cheaper than the
kernel's two-term rows, and less exact (relative rms 2.9e-3 against 2.4e-6). The comparison is in their favour.

Dimension key: T tokens, D d_model, K features at one hook point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Scorer = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor], None]


def plain(
    x_TD: Tensor, residual_TD: Tensor | None, w_KD: Tensor, scale_6K: Tensor, act_TK: Tensor, stat_T3: Tensor
) -> None:
    """The op in PyTorch, for compilation: JumpReLU features and row statistics."""
    stream_TD = x_TD if residual_TD is None else x_TD + residual_TD
    tau_K, gain_K, bias_K, lo_K = scale_6K[0], scale_6K[1], scale_6K[2], scale_6K[3]
    s_TK = torch.nn.functional.linear(stream_TD, w_KD).float()
    act_TK.copy_(torch.where(s_TK > tau_K, torch.maximum(gain_K * s_TK + bias_K, lo_K), 0.0))
    wide_TD = stream_TD.float()
    stat_T3[:, 0] = wide_TD.square().sum(dim=1).sqrt()
    stat_T3[:, 1] = wide_TD.abs().amax(dim=1)
    stat_T3[:, 2] = (~torch.isfinite(wide_TD)).sum(dim=1).float()


def epilogue(
    x_TD: Tensor, residual_TD: Tensor | None, w_KD: Tensor, scale_6K: Tensor, act_TK: Tensor, stat_T3: Tensor
) -> None:
    """cuBLASLt with its bias and ReLU epilogue; it has no JumpReLU, so this scores ReLU features only."""
    stream_TD = x_TD if residual_TD is None else x_TD + residual_TD
    act_TK.copy_(torch._addmm_activation(scale_6K[2].to(w_KD.dtype), stream_TD, w_KD.t()))
    torch.linalg.vector_norm(stream_TD, dim=1, dtype=torch.float32, out=stat_T3[:, 0])


@contextmanager
def compiled(backends: str) -> Iterator[Scorer]:
    """`plain` under max-autotune with the given GEMM backends ("ATEN,TRITON" or "TRITON"), without its own graphs."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    with inductor.patch(max_autotune_gemm_backends=backends, force_disable_caches=False):
        yield torch.compile(plain, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)


def full_encode(stream_TD: Tensor, w_FD: Tensor, bias_F: Tensor) -> Tensor:
    """What SAE libraries do: encode every feature of the SAE, to look at a few."""
    return torch.relu(torch.nn.functional.linear(stream_TD, w_FD, bias_F))
