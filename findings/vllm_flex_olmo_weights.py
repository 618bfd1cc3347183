"""FlexOlmo's routing weights in vLLM and `norm_topk_prob`, without our suite: run beside 0.19 to 0.28.

Its class in transformers divides the weights by their sum where the config says so. vLLM's never asks for that. Later
releases have no class of their own for it.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "CRITICAL"}
import vllm
import vllm.model_executor.models.flex_olmo as flex_olmo
from torch import nn
from transformers import FlexOlmoConfig
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs

built = next(name for name in ("FusedMoEFactory", "FusedMoE") if hasattr(flex_olmo, name))
asked = {}
setattr(flex_olmo, built, lambda **given: asked.update(given) or nn.Identity())
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/store", 0, "gloo")
for norm in (True, False):
    config = FlexOlmoConfig(**sizes, num_experts=4, num_experts_per_tok=2, vocab_size=64, norm_topk_prob=norm)
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["FlexOlmoForCausalLM"]}))
    lengths = {"max_model_len": 64, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    made = EngineArgs(str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", **lengths)
    vllm_config = made.create_engine_config()
    with set_current_vllm_config(vllm_config):
        if norm:
            initialize_model_parallel(1, 1)
        flex_olmo.FlexOlmoMoE(vllm_config=vllm_config)
    print(vllm.__version__, f"norm_topk_prob {norm}: its experts are asked to renormalize:", asked["renormalize"])
