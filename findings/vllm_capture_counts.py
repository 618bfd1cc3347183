"""vLLM's routed-experts capturer and a batch that fits no layout, without our suite: run beside 0.28 or later.

233 rows come to rank 0 of two, which have 171 and 233 tokens: neither 404 (all), 171 (its own) nor 86 (its half). It
refuses them in each release; 0.33 no longer says which numbers would fit.
"""

import inspect
import os
from types import SimpleNamespace as NS

os.environ["VLLM_LOGGING_LEVEL"] = "CRITICAL"
import torch
import vllm
import vllm.model_executor.layers.fused_moe.routed_experts_capturer as module
from vllm.forward_context import override_forward_context

text = NS(num_hidden_layers=3, num_experts_per_tok=2, num_experts=250, model_type="x")
sizes = {"get_total_num_hidden_layers": lambda: 3, "get_num_experts": lambda: 250, "get_num_experts_per_tok": lambda: 2}
ranks = NS(data_parallel_rank=0, data_parallel_size=2, tensor_parallel_size=2)
config = NS(model_config=NS(hf_text_config=text, **sizes), instance_id="by-hand", parallel_config=ranks)
module.get_routed_experts_attn_gid = lambda _: 0  # of 0.28, which asks for a KV cache
wanted = inspect.signature(module.RoutedExpertsCapturer).parameters
capturer = module.RoutedExpertsCapturer(512, config, *[None] * ("kv_cache_config" in wanted))
tokens = NS(num_tokens_across_dp_cpu=torch.tensor([171, 233]), local_sizes=None)
with override_forward_context(NS(dp_metadata=tokens, batch_descriptor=NS(num_tokens=171))):
    try:
        capturer.capture(0, torch.zeros(233, 2, dtype=torch.int32))
        print(vllm.__version__, "233 rows were taken")
    except AssertionError as error:
        print(vllm.__version__, f"233 rows: {error}")
