"""Adapters of experts by rank-stabilised LoRA in vLLM, without our suite: run beside 0.28 or later.

Their scale is alpha over the root of the rank (use_rslora in adapter_config.json). 0.28 packs adapters of experts with
alpha over rank instead (vllm#55545).
"""

import os

os.environ["VLLM_LOGGING_LEVEL"] = "CRITICAL"
import torch
import vllm
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper

helper = PEFTHelper(r=16, lora_alpha=32, target_modules=["experts"], use_rslora=True)
scale = helper.vllm_lora_scaling_factor
parts = [LoRALayerWeights(w, 16, 32, torch.ones(16, 4), torch.ones(4, 16), scale) for w in ("w1", "w2", "w3")]
packed = PackedLoRALayerWeights.pack_moe(parts, "experts").optimize()
got = [b.flatten()[0].item() for b in packed.lora_b]
print(vllm.__version__, f"rank 16, alpha 32: B of ones is packed as {got}, want {[32 / 16**0.5] * 3}")
