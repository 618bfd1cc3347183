"""Packed experts in SGLang's class around models of transformers, without our suite: run beside 0.5.23.

Text models that SGLang has no class for are run by `TransformersMoEForCausalLM`. Its experts are loaded from one tensor
for each expert; those of a checkpoint with all of a layer in one tensor, as Mistral 4's, are skipped with a warning.
"""

import sglang_without_gpu  # noqa: F401
import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.models.transformers import MoEMixin, TransformersFusedMoE

E, H, F = 4, 8, 4
layer = TransformersFusedMoE(
    num_experts=E, top_k=2, hidden_size=H, intermediate_size=F, layer_id=0, reduce_results=False, quant_config=None,
    prefix="model.layers.0.mlp.experts", activation="silu", with_bias=False,
    expert_mapping=MoEMixin._get_expert_mapping(object.__new__(MoEMixin), E),
)  # fmt: skip
assert isinstance(layer.experts, FusedMoE)
for parameter in layer.parameters():
    parameter.fill_(float("nan"))
packed = [("gate_up_proj", torch.ones(E, 2 * F, H)), ("down_proj", torch.ones(E, H, F))]
print("loaded of a layer in two tensors:", layer.load_weights(packed))
single = [(f"{e}.{part}_proj.weight", torch.ones(F, H)) for e in range(E) for part in ("gate", "up")]
single += [(f"{e}.down_proj.weight", torch.ones(H, F)) for e in range(E)]
print("loaded of a tensor for each expert:", len(layer.load_weights(single)), "of", len(single))
