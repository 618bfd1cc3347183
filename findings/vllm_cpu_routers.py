"""What vLLM's router for a CPU leaves out, without our suite: run beside 0.28 or later.

- ERNIE 4.5 hands over a softmax and a bias that chooses; the bias is ignored, and other experts are chosen.
- MiniMax-M2 and Laguna hand over a sigmoid without groups, which is an assertion without words.
- DeepSeek-V4's router by token id computes softplus as log(1 + exp): small scores lose their last bits.
"""

import os

os.environ |= {"VLLM_LOGGING_LEVEL": "CRITICAL", "VLLM_CPU_KVCACHE_SPACE": "1"}
import torch
import vllm
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

# What chooses experts on a CPU: a function before 0.31, a router since.
choose = getattr(cpu_moe, "select_experts", None)
bias = torch.nn.Parameter(torch.tensor([0.0, 0.0, 0.0, 1.0]), requires_grad=False)
logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
for model, asked in (
    ("ERNIE 4.5", {"e_score_correction_bias": bias}),
    ("MiniMax-M2", {"e_score_correction_bias": bias, "scoring_func": "sigmoid"}),
):
    given = {"hidden_states": logits, "router_logits": logits}
    try:
        if choose:
            _, ids = choose(**given, top_k=2, use_grouped_topk=False, renormalize=True, **asked)
        else:
            _, ids = create_fused_moe_router(top_k=2, global_num_experts=4, **asked).select_experts(**given)
        print(vllm.__version__, model, "experts", sorted(ids[0].tolist()), "want [0, 3]")
    except AssertionError as error:
        print(vllm.__version__, model, type(error).__name__, error)

chosen = torch.tensor([-9.0, 0.0, 0.0, 0.0, 0.0, 0.0])
scores = torch.nn.functional.softplus(chosen.double()).sqrt()
want = (scores / scores.sum())[0].item()
if hasattr(torch.ops._C, "hash_topk_cpu"):
    row, ids = torch.cat((chosen, torch.zeros(250)))[None], torch.arange(6, dtype=torch.int32)[None]
    got = torch.ops._C.hash_topk_cpu(row, ids, 6, "sqrtsoftplus", 0, 256, 1.0)[0][0, 0].item()
    print(vllm.__version__, f"DeepSeek-V4: weight of a logit of -9 among zeros: got {got:.8f}, want {want:.8f}")
