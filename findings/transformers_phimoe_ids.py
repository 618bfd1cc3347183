"""PhiMoE's router and a row of logits without a largest one, without our suite: one expert is chosen twice.

The first argmax is masked by minus infinity for the second. Where all logits are minus infinity, that changes nothing,
and the second argmax is the first again.
"""

import torch
import transformers
from transformers.models.phimoe.modeling_phimoe import sparsemixer

weights, ids = sparsemixer(torch.full((1, 4), -torch.inf), jitter_eps=0.01, training=False)
print(transformers.__version__, "want two different experts, got", ids.tolist(), "weighed", weights.tolist())
