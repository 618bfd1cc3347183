"""LFM2's router in vLLM and the 1e-6 of its own code, without our suite: run beside 0.28 or later.

The model's own code divides the chosen scores by their sum and 1e-6 more. vLLM's routers divide by the sum alone, on a
CPU and on a GPU: where all scores are small, the weights are too large. The model cannot ask for anything else: it
hands its expert layer sigmoid scores in one group.
"""

import os
from types import SimpleNamespace as NS

os.environ |= {"VLLM_LOGGING_LEVEL": "CRITICAL", "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
import torch
import vllm
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeTopKRouter
from vllm.model_executor.layers.fused_moe.router import grouped_topk_router, router_factory

logits, bias = torch.tensor([[-14.0, -14.5, -15.0, -16.0]]), torch.nn.Parameter(torch.zeros(4), requires_grad=False)
sizes = {"num_experts_per_tok": 2, "num_experts": 4, "hidden_size": 4, "routed_scaling_factor": 1.0}
own = Lfm2MoeTopKRouter(NS(**sizes, norm_topk_prob=True, use_expert_bias=True))
own.weight.data = torch.eye(4)
want = own(logits, bias)[1]
method = {"num_expert_group": 1, "topk_group": 1, "scoring_func": "sigmoid", "e_score_correction_bias": bias}
router = router_factory.create_fused_moe_router(top_k=2, global_num_experts=4, use_grouped_topk=True, **method)
for name, route in (
    (type(router).__name__, lambda: router.select_experts(hidden_states=logits, router_logits=logits)),
    ("grouped_topk", lambda: grouped_topk_router.grouped_topk(logits, logits, 2, True, **method)),
):
    got = route()[0].sort(descending=True).values
    print(vllm.__version__, f"{name}: weights {got[0].tolist()}, want {want[0].tolist()}")
