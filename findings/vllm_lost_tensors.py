"""Checkpoint tensors that vLLM's loaders lose, without our suite: run beside any release; shown on 0.32.0.

- DBRX, 0.28.0 and 0.32.0: its loader looks for `experts.w13_weight`, which is `experts.routed_experts.w13_weight` by
  then: KeyError. 0.20.0 loads it.
- Aria, 0.28.0: no form of its packed experts is loaded, "has no parameter 'w13_weight.weight'".
- Laguna, 0.32.0: `mlp.experts.e_score_correction_bias`, by which its router chooses, is dropped without a word. The
  check of what was loaded excuses every parameter of a layer that is processed after loading.
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
from vllm.model_executor.model_loader.utils import initialize_model

E, H, F = 4, 64, 32
dbrx = {
    "architectures": ["DbrxForCausalLM"], "model_type": "dbrx", "d_model": H, "n_heads": 2, "n_layers": 1,
    "vocab_size": 64, "max_seq_len": 128, "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
    "ffn_config": {"moe_num_experts": E, "moe_top_k": 2, "ffn_hidden_size": F},
}  # fmt: skip
laguna = {
    "architectures": ["LagunaForCausalLM"], "model_type": "laguna", "hidden_size": H, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_hidden_layers": 1, "mlp_layer_types": ["sparse"], "mlp_only_layers": [],
    "vocab_size": 64, "intermediate_size": F, "moe_intermediate_size": F, "shared_expert_intermediate_size": F,
    "num_experts": E, "num_experts_per_tok": 2, "max_position_embeddings": 128,
}  # fmt: skip
text = {
    "model_type": "aria_text", "hidden_size": H, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64,
    "num_hidden_layers": 1, "intermediate_size": F, "moe_num_experts": E, "moe_topk": 2, "moe_num_shared_experts": 1,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
}  # fmt: skip
image = {"hidden_size": H, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": F, "image_size": 980}
aria = {
    "architectures": ["AriaForConditionalGeneration"], "model_type": "aria", "text_config": text,
    "vision_config": {"model_type": "idefics3_vision", "patch_size": 14, **image},
    "projector_patch_to_query_dict": {"1225": 128, "4900": 256},
}  # fmt: skip
started = False
for config, name, shape in (
    (laguna, "model.layers.0.mlp.experts.e_score_correction_bias", (E,)),
    (aria, "language_model.model.layers.0.mlp.experts.fc1.weight", (E, H, 2 * F)),
    (dbrx, "transformer.blocks.0.ffn.experts.mlp.w1", (E * F, H)),
):
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(config))
    asked = {"max_model_len": 64, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    try:
        made = EngineArgs(str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", **asked)
        vllm_config = made.create_engine_config()
    except Exception as error:
        print(vllm.__version__, name, "no such model:", str(error).splitlines()[0])
        continue
    with set_current_vllm_config(vllm_config):
        if not started:
            init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
            initialize_model_parallel(1, 1)
            started = True
        model = initialize_model(vllm_config)
        for parameter in model.parameters():
            parameter.data.zero_()
        try:
            model.load_weights(iter([(name, torch.full(shape, 7.0))]))
        except (AttributeError, KeyError, ValueError) as error:
            print(vllm.__version__, name, type(error).__name__, str(error)[:100])
            continue
    there = [own for own, parameter in model.named_parameters() if (parameter == 7).any()]
    print(vllm.__version__, name, "is in", ", ".join(there) or "no parameter")
