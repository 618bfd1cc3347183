"""PhiMoE's router names an expert twice for a row of minus infinity, without our suite.

The router takes two maxima in turn, and masks the first with minus infinity, which is what every other logit of such a
row is already: the second maximum is the first expert again.
"""

import torch
import transformers
from transformers.models.phimoe import modeling_phimoe

logits = torch.full((1, 4), float("-inf"))
weights, ids = modeling_phimoe.sparsemixer(logits, jitter_eps=0.01, training=False)
print(transformers.__version__, "logits", logits.tolist(), "-> experts", ids.tolist(), "weights", weights.tolist())
