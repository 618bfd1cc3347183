"""Which layers of Qwen's and ERNIE's models have experts in SGLang, without our suite: run beside 0.5.23.

Qwen2-MoE, Qwen3-MoE, Qwen3-VL-MoE, Qwen3-Omni and Qwen3-Next leave experts out of the layers in `mlp_only_layers`, and
of all but every `decoder_sparse_step`-th. SGLang's classes read neither. ERNIE 4.5 counts `moe_layer_interval` from
layer 0; SGLang counts it from `moe_layer_start_index`. Llama 4's `moe_layers` is not read. Published configs have
experts in every layer from the start on, and Llama 4's say the same twice.
"""

from types import SimpleNamespace

import sglang_without_gpu  # noqa: F401
import torch
from sglang.srt.models.ernie4 import Ernie4DecoderLayer
from sglang.srt.models.llama4 import Llama4DecoderLayer
from sglang.srt.models.qwen3_moe import Qwen3MoeDecoderLayer
from sglang.srt.utils import make_layers
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig, Qwen3MoeConfig

SIZES = {
    "num_hidden_layers": 6, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 8, "moe_intermediate_size": 8, "intermediate_size": 8,
}  # fmt: skip
qwen = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=2, mlp_only_layers=[3])
ernie = Ernie4_5_MoeConfig(
    **SIZES, moe_num_experts=4, moe_k=2, moe_layer_start_index=2, moe_layer_end_index=5, moe_layer_interval=2
)
for config, layer in ((qwen, Qwen3MoeDecoderLayer), (ernie, Ernie4DecoderLayer)):
    with torch.device("meta"):
        layers = make_layers(6, lambda idx, prefix, of=(config, layer): of[1](of[0], idx, prefix=prefix), prefix="l")
        model = AutoModelForCausalLM.from_config(config).model
    sparse = [[n for n, one in enumerate(of) if hasattr(one.mlp, "gate")] for of in (layers, model.layers)]
    print(f"{config.model_type}: experts in layers", sparse[0], "| want", sparse[1])
llama = SimpleNamespace(config=SimpleNamespace(interleave_moe_layer_step=4, moe_layers=[2, 3]))
found = [n for n in range(6) if Llama4DecoderLayer._is_moe_layer(llama, n)]
print("llama4: experts in layers", found, "| want", llama.config.moe_layers)
