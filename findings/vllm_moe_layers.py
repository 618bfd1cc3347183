"""Layers that have experts in vLLM though the config says otherwise, without our suite: run beside 0.28 or later.

- Gemma 4: `enable_moe_block: false` is not read; a config that has the number of experts beside it is built with them.
- Llama 4: `moe_layers` is not read; layers follow `interleave_moe_layer_step` alone.
- Laguna, 0.28.0: `mlp_layer_types` is not read; `mlp_only_layers` and `decoder_sparse_step` are.

The classes of these families in transformers read these keys. Published checkpoints of the first two say the same by
either key.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "CRITICAL"}
import vllm
from transformers import Gemma4TextConfig, Llama4TextConfig
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model

sizes = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
sizes |= {"intermediate_size": 64, "vocab_size": 64}
gemma4 = Gemma4TextConfig(**sizes, enable_moe_block=False, num_experts=4, top_k_experts=2, moe_intermediate_size=32)
llama4 = Llama4TextConfig(**sizes, num_local_experts=4, moe_layers=[0, 3], interleave_moe_layer_step=2)
laguna = {
    **sizes, "model_type": "laguna", "mlp_layer_types": ["dense", "sparse"] * 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    "decoder_sparse_step": 1,
}  # fmt: skip
init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/store", 0, "gloo")
for config, name, want in (
    (gemma4.to_dict(), "Gemma4ForCausalLM", []),
    (llama4.to_dict(), "Llama4ForCausalLM", [0, 3]),
    (laguna, "LagunaForCausalLM", [1, 3]),
):
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    asked = {"max_model_len": 64, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    made = EngineArgs(str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", **asked)
    vllm_config = made.create_engine_config()
    with set_current_vllm_config(vllm_config):
        if name == "Gemma4ForCausalLM":
            initialize_model_parallel(1, 1)
        model = initialize_model(vllm_config)
    got = [i for i, layer in enumerate(model.model.layers) if any("experts" in n for n, _ in layer.named_parameters())]
    print(vllm.__version__, name, "got experts in layers", got, "want", want)
