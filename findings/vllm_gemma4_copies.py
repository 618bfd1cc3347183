"""vLLM's Gemma 4 block and a copy of it, without our suite: run beside 0.20 to 0.30.

Its routing function is a closure over the block that it was built with. A copy routes with the original's scales,
whatever its own are. Later releases have no such closure.
"""

import copy
import json
import os
import tempfile
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "CRITICAL"}
import torch
import vllm
from transformers import Gemma4TextConfig
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs

sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "top_k_experts": 2}
sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "global_head_dim": 32, "vocab_size": 64}
text = Gemma4TextConfig(num_hidden_layers=1, layer_types=["full_attention"], enable_moe_block=True, **sizes)
rest = {"architectures": ["Gemma4ForCausalLM"], "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
folder = Path(tempfile.mkdtemp())
(folder / "config.json").write_text(json.dumps(text.to_dict() | rest))
lengths = {"max_model_len": 64, "max_num_batched_tokens": 64, "max_num_seqs": 4}
made = EngineArgs(str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", **lengths)
config = made.create_engine_config()
with set_current_vllm_config(config), torch.no_grad():
    init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
    initialize_model_parallel(1, 1)
    from vllm.model_executor.models.gemma4 import Gemma4MoE

    twin = copy.deepcopy(Gemma4MoE(text, prefix="model.layers.0.moe"))
    twin.per_expert_scale.fill_(3.0)
    router = getattr(twin.experts, "router", twin.experts)
    weights, _ = router.custom_routing_function(torch.zeros(1, 64), torch.zeros(1, 4), topk=2, renormalize=True)
print(vllm.__version__, f"a copy with scales of 3: weights {weights[0].tolist()}, want [1.5, 1.5]")
