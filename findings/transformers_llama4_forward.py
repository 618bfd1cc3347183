"""transformers' multimodal Llama 4 and its own output, without our suite: run beside any release.

5.24.0 reads `image_outputs` of its text model's output, which has none: every forward raises, with images or without.
The text model alone answers; in 5.23.0 both do.
"""

import torch
import transformers
from transformers import Llama4Config, Llama4ForConditionalGeneration

heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
text = {"hidden_size": 32, "intermediate_size": 16, "intermediate_size_mlp": 24, "num_hidden_layers": 2, **heads}
text |= {"num_local_experts": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
vision |= {"image_size": 16, "patch_size": 4, "vision_output_dim": 32}
vision |= {"projector_input_dim": 32, "projector_output_dim": 32}
torch.manual_seed(0)
model = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision)).eval()
for name, part in (("text model", model.language_model), ("whole model", model)):
    try:
        with torch.no_grad():
            answer = f"logits {list(part(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False).logits.shape)}"
    except AttributeError as error:
        answer = f"AttributeError: {error}"
    print(transformers.__version__, f"{name}: {answer}")
