"""vLLM's experts on a CPU and swiglu_limit, without our suite: run beside 0.28 or later.

EXAONE-MoE and Bailing-MoE-V3 hand swiglu_limit to their expert layer. The kernel for a CPU accepts the layer and
computes silu without the limit; Triton's experts clamp gate and up.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "CRITICAL"}
import torch
import vllm
import vllm.model_executor.layers.fused_moe as fused_moe
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import create_forward_context, override_forward_context

text = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 64}
text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
folder = Path(tempfile.mkdtemp())
(folder / "config.json").write_text(json.dumps(text | {"num_local_experts": 1, "max_position_embeddings": 256}))
lengths = {"max_model_len": 128, "max_num_batched_tokens": 128, "max_num_seqs": 4}
arguments = EngineArgs(str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", **lengths)
config = arguments.create_engine_config()
with set_current_vllm_config(config):
    init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
    initialize_model_parallel(1, 1)
    sizes = {"num_experts": 1, "top_k": 1, "hidden_size": 64, "intermediate_size": 64, "params_dtype": torch.float32}
    layer = fused_moe.FusedMoEFactory(**sizes, prefix="model.layers.0.experts", swiglu_limit=0.5)
    experts = layer.routed_experts
    experts.w13_weight.data.copy_(torch.eye(64).repeat(2, 1))  # gate = up = x
    experts.w2_weight.data.copy_(torch.eye(64))
    experts.quant_method.process_weights_after_loading(experts)
    x = torch.full((1, 64), 2.0)
    with override_forward_context(create_forward_context(None, config)):
        got = layer(hidden_states=x.clone(), router_logits=torch.zeros(1, 1))[0, 0]
silu = torch.nn.functional.silu
kernel = type(experts.quant_method.moe_kernel.fused_experts).__name__
want, unclamped = silu(torch.tensor(0.5)) * 0.5, silu(torch.tensor(2.0)) * 2
print(vllm.__version__, f"{kernel} with limit 0.5: got {got:.4f}, want {want:.4f}; without a limit {unclamped:.4f}")
