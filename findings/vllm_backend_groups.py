"""Groups of experts in vLLM's backend for models of transformers, without our suite: run beside vLLM 0.32.0.

The backend takes a router for vLLM's own where it scores, and chooses the best: how groups are scored it does not look
at. Mistral 4 adds up the two best experts of a group; vLLM's router without a selection bias takes the best one.
"""

import os

os.environ |= {"VLLM_LOGGING_LEVEL": "CRITICAL", "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
import torch
import vllm
from transformers import Mistral4Config
from transformers.models.mistral4.modeling_mistral4 import Mistral4TopkRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import grouped_topk
from vllm.model_executor.models.transformers.fusers.moe import MoEBlockFuser

config = Mistral4Config(
    hidden_size=8, num_local_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, norm_topk_prob=True,
    routed_scaling_factor=1.0,
)  # fmt: skip
router = Mistral4TopkRouter(config)
router.weight.data.copy_(torch.eye(8))
x = torch.tensor([[3.0, 0.0, 0.0, 0.0, 2.9, 2.8, 0.0, 0.0]])  # the best expert is in one group, the two best in another
_, _, want = router(x)
_, got = grouped_topk(x, x, 2, True, 2, 1, "softmax")
print(vllm.__version__, "taken for vLLM's own router:", MoEBlockFuser._match_router(router))
print("experts: got", sorted(got[0].tolist()), "| want", sorted(want[0].tolist()))
