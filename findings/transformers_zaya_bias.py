"""transformers' ZAYA and a bias of its checkpoint, without our suite: run beside any release that has it.

save_pretrained writes the last balancing bias of each router (that of skipping the experts) as it is. from_pretrained
reads it and then sets it to -1: `_init_weights` assigns to an entry of the loaded tensor.
"""

import tempfile

import torch
import transformers
from safetensors.torch import load_file
from transformers import ZayaConfig, ZayaForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_experts": 6, "num_experts_per_tok": 1}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_query_groups": 2}
model = ZayaForCausalLM(ZayaConfig(moe_intermediate_size=16, router_hidden_size=16, **sizes, **heads))
name = "model.layers.0.mlp.gate.balancing_biases"
model.get_buffer(name).fill_(0.25)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    written = load_file(f"{folder}/model.safetensors")
    key = next(key for key in written if key.endswith("balancing_biases") and ".0." in key)
    read = ZayaForCausalLM.from_pretrained(folder).get_buffer(name)
print(transformers.__version__, "in the file:", written[key].tolist())
print(transformers.__version__, "after from_pretrained:", read.tolist())
