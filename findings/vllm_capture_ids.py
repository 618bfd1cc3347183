"""vLLM's routed-experts capturer and ids that do not fit, without our suite: run beside any release from 0.19 on.

0.20 and 0.28 write layer -1 into the last layer, and 0.20 ignores layer 3 of 3. 0.32 refuses both, reads expert 263
back as 7, and -1, which is no expert, as 255. 0.33 does the same. What keeps rows by slot on the host, from 0.22 to
0.31, writes slot -1 into the last one.
"""

import inspect
import os
from types import SimpleNamespace as NS

os.environ["VLLM_LOGGING_LEVEL"] = "CRITICAL"
import numpy as np
import torch
import vllm
import vllm.model_executor.layers.fused_moe.routed_experts_capturer as module
from vllm.forward_context import override_forward_context

text = NS(num_hidden_layers=3, num_experts_per_tok=2, num_experts=250, model_type="x")
sizes = {"get_total_num_hidden_layers": lambda: 3, "get_num_experts": lambda: 250, "get_num_experts_per_tok": lambda: 2}
ranks = NS(data_parallel_rank=0, data_parallel_size=1, tensor_parallel_size=1)
config = NS(model_config=NS(hf_text_config=text, **sizes), instance_id="by-hand", parallel_config=ranks)
if hasattr(module.RoutedExpertsCapturer, "init_buffer"):
    module.get_tensor_model_parallel_rank = lambda: 1  # no shared memory
    capturer = module.RoutedExpertsCapturer()
    capturer.init_buffer(8, 8, config)
    read = lambda: capturer._device_buffer[0]  # noqa: E731
else:
    module.get_routed_experts_attn_gid = lambda _: 0  # of 0.28, which asks for a KV cache
    wanted = inspect.signature(module.RoutedExpertsCapturer).parameters
    capturer = module.RoutedExpertsCapturer(8, config, *[None] * ("kv_cache_config" in wanted))
    read = lambda: getattr(capturer, "snapshot_routing_data", lambda n: capturer.device_buffer[:n])(1)[0]  # noqa: E731
with override_forward_context(NS(dp_metadata=None, batch_descriptor=None)):
    for layer, ids in ((2, [5, 6]), (-1, [7, 8]), (3, [9, 9]), (0, [263, 1]), (1, [-1, 1])):
        try:
            capturer.capture(layer, torch.tensor([ids]))
            print(vllm.__version__, f"capture(layer {layer}, {ids}): layers now hold", read().tolist())
        except (IndexError, AssertionError) as error:
            print(vllm.__version__, f"capture(layer {layer}, {ids}): {error}")
if hasattr(module, "RoutedExpertsManager"):
    module.get_routed_experts_attn_gid = lambda _: 0
    groups = [NS(kv_cache_spec=NS(block_size=1))]
    manager = module.RoutedExpertsManager(config, NS(num_blocks=3, kv_cache_groups=groups))
    manager.store_batch(np.full((1, 3, 2), 9, dtype=np.uint8), np.array([-1]))
    print(vllm.__version__, "store_batch(slot -1): slots hold", manager.routed_experts_by_slot[:, 0, 0].tolist())
