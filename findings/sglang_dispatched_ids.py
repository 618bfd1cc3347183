"""SGLang's dispatcher under expert parallelism and pairs of no expert, without our suite: run beside 0.5.20.

-1 stands for no expert (padding, and pairs that are dropped). 0.5.20 looks it up in its map of experts, where it is the
last one: on the rank that has that, padding is computed. 0.5.23 keeps it.
"""

from types import SimpleNamespace

import sglang_without_gpu  # noqa: F401
import torch
from sglang.srt.layers.moe import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.runtime_context import get_parallel

groups = {"moe_ep_group": SimpleNamespace(world_size=2), "moe_tp_group": SimpleNamespace(world_size=1)}
sizes = {"moe_ep_size": 2, "moe_ep_rank": 1, "moe_tp_size": 1, "moe_tp_rank": 0, "tp_size": 2, "tp_rank": 1}
with get_parallel().override(**sizes, **groups):
    dispatcher = StandardDispatcher(MoeRunnerConfig(num_experts=4, num_local_experts=2, num_fused_shared_experts=0))
    ids = torch.tensor([[0, 3], [2, -1]], dtype=torch.int32)
    sent = dispatcher.dispatch(torch.zeros(2, 1), StandardTopKOutput(torch.ones(2, 2), ids, None)).topk_output
print("rank 1 of 2, which has experts 2 and 3: want [[-1, 1], [0, -1]], got", sent.topk_ids.tolist())
