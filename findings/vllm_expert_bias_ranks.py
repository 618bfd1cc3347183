"""Biases of experts under tensor parallelism in vLLM's loader, without our suite: run beside any release from 0.28 on.

Each rank computes a slice of an expert's width, and their outputs are added up. The loader of the expert layer gives
every rank the whole second bias, so that two ranks add it twice. gpt-oss has a loader of its own, which leaves it out
on all ranks but the first; models of vLLM's transformers backend have not.
"""

import json
import os
import tempfile
from pathlib import Path
from unittest.mock import patch

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "CRITICAL"}
import torch
import vllm
import vllm.model_executor.layers.fused_moe as fused_moe
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import config as fused_moe_config

text = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 64}
text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
folder = Path(tempfile.mkdtemp())
(folder / "config.json").write_text(json.dumps(text | {"num_local_experts": 1, "max_position_embeddings": 256}))
lengths = {"max_model_len": 128, "max_num_batched_tokens": 128, "max_num_seqs": 4}
arguments = EngineArgs(str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", **lengths)
held = []
with set_current_vllm_config(arguments.create_engine_config()):
    init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
    initialize_model_parallel(1, 1)
    for rank in (0, 1):
        sizes = {"num_experts": 1, "top_k": 1, "hidden_size": 64, "intermediate_size": 64, "has_bias": True}
        build = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE
        with patch.object(fused_moe_config, "get_tensor_model_parallel_rank", lambda rank=rank: rank):
            layer = build(**sizes, params_dtype=torch.float32, tp_size=2, prefix=f"model.layers.{rank}.experts")
        bias = getattr(layer, "routed_experts", layer).w2_bias
        bias.weight_loader(bias, torch.ones(64), "experts.w2_bias", shard_id="w2", expert_id=0)
        held.append(bias[0, 0].item())
print(vllm.__version__, f"w2_bias 1 of the checkpoint: ranks of two hold {held}, which add up to {sum(held)}")
