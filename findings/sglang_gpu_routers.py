"""SGLang's routers of a GPU, without our suite: run beside 0.5.23; its Triton kernels are interpreted.

ERNIE 4.5 hands a softmax and a selection bias to TopK, and on CUDA fused_topk hands no bias on to the kernel: experts
are chosen without it. The kernel of grouped routers takes the second best of a group from those below the best: two
experts equally good count as one. The kernel of DeepSeek-V4's table (ROCm) takes log(1 + x), which loses small scores.
"""

from unittest.mock import patch

import sglang_without_gpu  # noqa: F401
import torch
from sglang.kernels.ops.moe import moe_fused_gate, triton_hash_topk
from sglang.srt.layers.moe import topk

logits, bias = torch.tensor([[1.0, 2.0, 3.0, 0.0]]), torch.tensor([9.0, 0.0, 0.0, 0.0])
x = torch.zeros(1, 1)
with patch.object(moe_fused_gate, "is_arch_support_pdl", lambda: False), patch.object(topk, "_is_cuda", True):
    weights, ids = topk.fused_topk(x, logits, 1, False, correction_bias=bias, scoring_func="softmax")
    print("softmax with a bias of 9 for expert 0: got", ids.tolist(), "want [[0]]")
    # Group 0 has 2 and 2, group 1 has 3 and 0.
    scores = torch.logit(torch.tensor([[0.5, 0.5, 0.75, 0.05]]))
    _, ids = moe_fused_gate.moe_fused_gate(scores, torch.zeros(4), 1, num_expert_group=2, topk_group=1)
    _, want = topk.biased_grouped_topk_impl(x, scores, torch.zeros(4), 1, True, 2, 1)
    print("groups of 0.5 + 0.5 and 0.75 + 0.05: got", ids.tolist(), "torch's has", want.tolist())
small = torch.tensor([[-9.0, 2.0]])
table, tokens = torch.tensor([[0, 1]], dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
got, _ = triton_hash_topk.hash_topk_triton(small, tokens, table, 0, 1.0, "sqrtsoftplus")
score = torch.nn.functional.softplus(small.double()).sqrt()
print(f"a small score: got {got[0, 0]:.9f}, want {(score / score.sum())[0, 0]:.9f}")
