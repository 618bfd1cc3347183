"""transformers' experts and the id -1, which other engines use for "no expert", without our suite.

No router of transformers gives it, so it is a matter of what happens where something else does. In 5.23.0 eager raises;
batched_mm takes -1 for the last expert; grouped_mm miscounts the rows of each expert, which spoils other tokens too.
Every expert answers with its number here, so the first token should get 0.5 * 1 and the second 0.5 * 2 + 0.5 * 1.
"""

import torch
import transformers
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

ids, weights = torch.tensor([[0, -1], [1, 0]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
for implementation in ("eager", "batched_mm", "grouped_mm"):
    config = MixtralConfig(hidden_size=8, intermediate_size=8, num_local_experts=3)
    config._experts_implementation = implementation
    module = MixtralExperts(config)
    for parameter in module.parameters():
        torch.nn.init.ones_(parameter)
    for number in range(3):
        module.down_proj.data[number].fill_((number + 1) / 8 / (torch.nn.functional.silu(torch.tensor(8.0)) * 8))
    try:
        with torch.no_grad():
            got = module(torch.ones(2, 8), ids, weights)[:, 0]
        print(transformers.__version__, implementation, "want [0.5, 1.5], got", [round(v, 3) for v in got.tolist()])
    except RuntimeError as error:
        print(transformers.__version__, implementation, "RuntimeError:", error)
