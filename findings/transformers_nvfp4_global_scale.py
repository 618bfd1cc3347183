"""transformers' NVFP4 experts of compressed-tensors, without our suite: needs transformers and compressed-tensors.

Experts are written as compressed-tensors' own compressor writes them, and read with dequantize=True. Its decompressor
divides by weight_global_scale; transformers hands it codes and block scales alone, so that every weight of an expert
comes out too large by that factor, without a word.
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from transformers import CompressedTensorsConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

FORMAT = "nvfp4-pack-quantized"
torch.manual_seed(0)
sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 50}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1}
config = Qwen3MoeConfig(intermediate_size=96, **sizes, **heads)
plain = Qwen3MoeForCausalLM(config).state_dict()

weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), format=FORMAT)
compressor = BaseCompressor.get_value_from_registry(FORMAT)
block = "model.layers.0.mlp.experts"
tensors = {name: tensor.clone() for name, tensor in plain.items() if ".experts." not in name}
for expert in range(4):
    gate, up = plain[f"{block}.gate_up_proj"][expert].chunk(2)
    for part, weight in {"gate_proj": gate, "up_proj": up, "down_proj": plain[f"{block}.down_proj"][expert]}.items():
        whole = 448 * 6 / weight.abs().max().reshape(1)
        scale = (weight.unflatten(-1, (-1, 16)).abs().amax(-1) / 6 * whole).clamp(max=448)
        given = {"weight": weight.clone(), "weight_scale": scale, "weight_global_scale": whole}
        stored = compressor.compress(given, scheme)
        tensors |= {f"{block}.{expert}.{part}.{end}": tensor.contiguous() for end, tensor in stored.items()}
names = (f"{block}.0.gate_proj.{end}" for end in ("weight_packed", "weight_scale", "weight_global_scale"))
first = {name.rpartition(".")[2]: tensors[name] for name in names}

said = {"quant_method": "compressed-tensors", "format": FORMAT, "quantization_status": "compressed"}
said |= {"ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp[.]gate$"]}
said |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": FORMAT}}}
with tempfile.TemporaryDirectory() as folder:
    written = config.to_dict() | {"architectures": ["Qwen3MoeForCausalLM"], "quantization_config": said}
    (Path(folder) / "config.json").write_text(json.dumps(written, default=str))
    save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})
    asked = CompressedTensorsConfig(dequantize=True)
    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=asked)
print("compressed-tensors itself:", compressor.decompress(first, scheme)["weight"][0, :4].tolist())
print(transformers.__version__, "from_pretrained:", model.state_dict()[f"{block}.gate_up_proj"][0, 0, :4].tolist())
print("weight_global_scale:", first["weight_global_scale"].tolist())
