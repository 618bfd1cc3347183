"""How SGLang's Gemma 4 is loaded, without our suite: run beside 0.5.23.

Packed experts whose names have `.moe.` without `.experts.` are not read. An expert that the config does not have, and
one that is narrower or wider than it says, are ignored, or taken and cut to size. At most a warning says so.
"""

import json
import tempfile
from pathlib import Path

import sglang_without_gpu  # noqa: F401
import torch
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader import loader

text = {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "num_hidden_layers": 1, "vocab_size": 64}
text |= {"layer_types": ["full_attention"], "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
text |= {"num_key_value_heads": 1, "num_global_key_value_heads": 1, "head_dim": 32, "global_head_dim": 32}
text |= {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8}
text |= {"hidden_size_per_layer_input": 0, "allow_global_per_layer_attribute_access": True, "num_kv_shared_layers": 0}
folder = Path(tempfile.mkdtemp())
(folder / "config.json").write_text(json.dumps(text))
model = loader._initialize_model(ModelConfig(str(folder), dtype="float32"), LoadConfig())
experts = model.model.layers[0].moe.experts
for name, rows in {
    "experts.gate_up_proj": (2, 16, 32), "moe.gate_up_proj": (2, 16, 32), "experts.0.gate_proj.weight": (6, 32),
    "experts.1.gate_proj.weight": (12, 32), "experts.5.gate_proj.weight": (8, 32),
}.items():  # fmt: skip
    experts.w13_weight.data.fill_(torch.nan)
    try:
        model.load_weights(iter([(f"model.layers.0.{name}", torch.ones(rows))]))
        print(name, rows, "is taken;", int(experts.w13_weight.isnan().sum()), "of 1024 numbers are left unwritten")
    except Exception as error:
        print(name, rows, f"{type(error).__name__}: {error}")
