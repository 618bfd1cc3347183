"""Rank-stabilised adapters in SGLang, without our suite: run beside 0.5.23.

Their scale is alpha over the root of the rank (use_rslora in adapter_config.json, https://arxiv.org/abs/2312.03732).
SGLang does not read that key, and scales every adapter by alpha over rank: at rank 16 by a quarter of what was trained.
"""

from types import SimpleNamespace

import sglang_without_gpu  # noqa: F401
from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_config import LoRAConfig

said = {"peft_type": "LORA", "target_modules": ["experts"], "r": 16, "lora_alpha": 32, "use_rslora": True}
adapter = LoRAAdapter("adapter", LoRAConfig(config_dict=said), SimpleNamespace(num_hidden_layers=0), None, None)
print(f"rank 16, alpha 32, use_rslora: got scale {adapter.scaling}, want {32 / 16**0.5}")
