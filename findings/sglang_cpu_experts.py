"""SGLang's experts on a CPU without AMX, without our suite: run beside 0.5.23.

moe_forward_native raises for an id of -1, which its dispatcher writes for experts of other ranks, its routers for
rows of padding and LongCat for its identity experts, and for a batch of no tokens. It ignores the limits that
DeepSeek-V4 and Step-3.5 hand to experts. By "gelu" it computes the approximation by tanh, where a GPU's code computes
the exact function.
"""

import sglang_without_gpu  # noqa: F401
import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import StandardTopKOutput


def experts(x, ids, **arguments):
    layer = FusedMoE(2, 4, 4, layer_id=0, top_k=1, params_dtype=torch.float32, uses_expert_location=False, **arguments)
    layer.w13_weight.data.copy_(torch.eye(4).repeat(2, 1))  # gate = up = x
    layer.w2_weight.data.copy_(torch.eye(4))
    ids = torch.tensor(ids, dtype=torch.int32)
    return layer(x.clone(), StandardTopKOutput(torch.ones(ids.shape), ids, None))


def said(call):
    try:
        return f"{call()[0, 0]:.6f}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


x = torch.full((1, 4), 2.0)
print("an id of -1:", said(lambda: experts(x, [[-1]])), "| want 0")
print("no tokens:", said(lambda: experts(x[:0], torch.empty(0, 1).tolist() or [[]])), "| want no rows")
silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu
half, two = torch.tensor(0.5), torch.tensor(2.0)
print("swiglu_limit=0.5:", said(lambda: experts(x, [[0]], swiglu_limit=0.5)), f"| want {silu(half) * 0.5:.6f}")
print("gemm1_clamp_limit=0.5:", said(lambda: experts(x, [[0]], gemm1_clamp_limit=0.5)), f"| want {0.5 * 0.5:.6f}")
print("gelu:", said(lambda: experts(x, [[0]], activation="gelu")), f"| exact {gelu(two) * 2:.6f}")
