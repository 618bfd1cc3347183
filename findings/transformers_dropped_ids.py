"""transformers' experts and the id one beyond all experts, which expert parallelism hands out, without our suite.

In 5.23.0 the eager experts of most families skip such pairs. Those of three raise: gpt_oss and openai_privacy_filter
leave no class for it in their one-hot mask, nemotron_h indexes its weights with it.
"""

from importlib import import_module

import torch
import transformers

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_local_experts": 3}
NEMOTRON = {"hidden_size": 8, "moe_intermediate_size": 8, "n_routed_experts": 3, "moe_latent_size": None}
ids, weights = torch.tensor([[0, 3], [2, 1]]), torch.tensor([[0.5, 0.0], [0.5, 0.5]])
for name in ("Mixtral", "GptOss", "OpenAIPrivacyFilter", "NemotronH"):
    config = getattr(transformers, f"{name}Config")(**(NEMOTRON if name == "NemotronH" else SIZES))
    config._experts_implementation = "eager"
    experts = import_module(type(config).__module__.replace("configuration_", "modeling_"))
    module = getattr(experts, f"{name}Experts")(config)
    module._is_expert_parallel = True
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    try:
        shape = list(module(torch.randn(2, 8), ids, weights).shape)
        print(transformers.__version__, name, "ids [[0, 3], [2, 1]] of 3 experts: output", shape)
    except (RuntimeError, IndexError) as error:
        print(transformers.__version__, name, f"{type(error).__name__}: {error}")
