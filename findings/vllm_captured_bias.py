"""The selection bias of a router in vLLM cannot be replaced, without our suite: run beside 0.28 or later.

The router holds the Parameter that it was built with. torch.func.functional_call, and a Parameter put in its place,
give the block another bias, and it chooses experts by the first one.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "CRITICAL"}
import torch
import vllm
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.models.deepseek_v2 import DeepseekV2MoE

E, H, F = 8, 64, 32
config = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": H, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": F, "moe_intermediate_size": F,
    "n_routed_experts": E, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 0, "vocab_size": 64, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
folder = Path(tempfile.mkdtemp())
(folder / "config.json").write_text(json.dumps(config))
asked = {"max_model_len": 64, "max_num_batched_tokens": 64, "max_num_seqs": 4, "enable_prefix_caching": False}
made = EngineArgs(str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", **asked)
vllm_config = made.create_engine_config()
with set_current_vllm_config(vllm_config), torch.no_grad():
    init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
    initialize_model_parallel(1, 1)
    # Alone, for a build for CPUs of 0.28 has no attention for the model.
    hf_config = vllm_config.model_config.hf_config
    block = DeepseekV2MoE(hf_config, vllm_config.parallel_config, prefix="model.layers.0.mlp")
    torch.manual_seed(0)
    for parameter in block.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.2)
    process_weights_after_loading(block, vllm_config.model_config, torch.device("cpu"))
    name, other, x = "gate.e_score_correction_bias", torch.randn(E), torch.randn(4, H)
    bias = block.get_parameter(name)
    with set_forward_context(None, vllm_config):
        first = block(x.clone())
        called = torch.func.functional_call(block, {name: other}, (x.clone(),))
        block.gate.e_score_correction_bias = torch.nn.Parameter(other)
        replaced = block(x.clone())
        bias.copy_(other)
        want = block(x.clone())
for what, got in (("functional_call", called), ("a new Parameter", replaced)):
    as_before, off = bool((got == first).all()), float((got - want).abs().max())
    print(vllm.__version__, f"{what}: as with the first bias {as_before}; off by {off}")
