"""The two projections of all experts, pair by pair: row t K + k is what expert ids[t, k] makes of its input.

The same numbers as in `routed_experts` before the sum: what a grouped kernel leaves between its launches. As in a
kernel, a pair with an id out of range has no expert (experts.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.model.specs import MLPSpec
from moe_conformance.reference_impl.experts import activate


def gate_up(
    x: Tensor, w: Tensor, spec: MLPSpec, ids: Tensor, *, bias: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """What enters w2, activation and all. x: [T, D]; w: [E, 2F, D], or [E, F, D] without a gate; ids: [T, K].

    bias: [E, 2F] or [E, F]. weights: [T, K], where spec.weight_on is "input" or "w2_input".
    returns [T K, F] in x's dtype, NaN in rows whose id is not in [0, E).
    """
    rows = x.repeat_interleave(ids.shape[1], dim=0)  # [T K, D]
    weight = None if weights is None else weights.reshape(-1, 1).to(x.dtype)
    if weight is not None and spec.weight_on == "input":
        rows = rows * weight
    hidden = activate(_by_expert(rows, w, ids, bias), spec)
    return hidden * weight if weight is not None and spec.weight_on == "w2_input" else hidden


def down(hidden: Tensor, w: Tensor, ids: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Each pair's own expert output, without its weight. hidden: [T K, F]; w: [E, D, F]; bias: [E, D].

    returns [T K, D] in hidden's dtype, NaN in rows whose id is not in [0, E).
    """
    return _by_expert(hidden, w, ids, bias)


def _by_expert(rows: Tensor, w: Tensor, ids: Tensor, bias: Tensor | None) -> Tensor:
    expert_of_row = ids.flatten()
    output = torch.full((len(rows), w.shape[1]), torch.nan, dtype=rows.dtype, device=rows.device)
    for expert in range(len(w)):
        own = expert_of_row == expert
        output[own] = F.linear(rows[own], w[expert], None if bias is None else bias[expert])
    return output
