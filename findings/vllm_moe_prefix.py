"""vLLM's Gemma 4 loader and expert names that have `.moe.` already, without our suite: run beside any release.

0.20 looks for `.moe.moe.experts` (vllm#41206). 0.21 to 0.30 load them. 0.31 and 0.32 know no module `layers.0.moe`.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "CRITICAL"}
import torch
import vllm
import vllm._custom_ops  # its own libraries first
from transformers import Gemma4TextConfig
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs

sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "top_k_experts": 2}
heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "global_head_dim": 32}
text = Gemma4TextConfig(num_hidden_layers=2, enable_moe_block=True, vocab_size=64, **sizes, **heads).to_dict()
text |= {"architectures": ["Gemma4ForCausalLM"], "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
folder = Path(tempfile.mkdtemp())
(folder / "config.json").write_text(json.dumps(text))
lengths = {"max_model_len": 128, "max_num_batched_tokens": 128, "max_num_seqs": 4}
config = EngineArgs(str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", **lengths)
config = config.create_engine_config()
if not hasattr(torch.ops._C, "gelu_tanh_and_mul"):  # sources over another release's binaries
    torch.library.define("_C::gelu_tanh_and_mul", "(Tensor! out, Tensor input) -> ()")
with set_current_vllm_config(config):
    init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
    initialize_model_parallel(1, 1)
    from vllm.model_executor.models.gemma4 import Gemma4ForCausalLM

    model = Gemma4ForCausalLM(vllm_config=config)
    for name in ("model.layers.0.experts.1.down_proj.weight", "model.layers.0.moe.experts.1.down_proj.weight"):
        try:
            model.load_weights(iter([(name, torch.ones(64, 32))]))
            print(vllm.__version__, name, "loads")
        except (KeyError, ValueError) as error:
            print(vllm.__version__, name, type(error).__name__, str(error)[:120])
