"""Every shape of both kernels once, small: what compute-sanitizer watches. `python -m tests.gpu.exercise`"""

from __future__ import annotations

import torch
from latentwatch.kernels import compact, score_op, score_triton

from tests.support.kernel_cases import make_case, poisoned_buffers

D = 512


def main() -> None:
    steps = [17, 100, 300, 1100]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for K in (8, 70):
            for T in steps:
                case = make_case(T, D, K, dtype=dtype, norms=[0, 1, 2, 3]).to("cuda")
                case.x_TD[5, 5] = torch.nan
                hi_KD = case.w_KD.bfloat16()
                lo_KD = (case.w_KD - hi_KD.float()).bfloat16()
                act_TK, stat_T3 = poisoned_buffers(T, K, "cuda")
                # Exactly what the longest of these steps needs, so that a store past the end is past an allocation.
                scratch = score_op.scratch(T, [K], D, "cuda")
                arguments = (case.x_TD, case.residual_TD, hi_KD, lo_KD, case.scale_6K, act_TK, stat_T3, scratch)
                torch.ops.latentwatch.score(*arguments)
                for shape in {score_triton.choose(step, K, D, split=True) for step in score_triton.steps(8192)}:
                    roomy = torch.zeros(score_triton.COUNTERS + shape.scratch_words(T, K), device="cuda")
                    if dtype != torch.float32:
                        score_triton.score(*arguments[:-1], roomy, shape)
    for rows, capacity in ((3, 10_000), (40, 100), (700, 2000)):
        acts = [torch.rand(700, K, device="cuda").round() for K in (8, 70)]
        stats = [torch.rand(700, 3, device="cuda") for _ in acts]
        dense_F = torch.arange(78, device="cuda") % 9 == 2
        compactor = compact.Compactor(acts, stats, dense_F, capacity=capacity)
        compactor.run(rows, torch.empty(compactor.layout(rows).words, dtype=torch.int32, device="cuda"))
    torch.cuda.synchronize()
    print("exercised")


if __name__ == "__main__":
    main()
