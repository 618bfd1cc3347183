"""What an expert does between its two projections, with its roundings."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moe_conformance.model.specs import MLPSpec
from moe_conformance.oracle.precision import wide
from moe_conformance.oracle.storage import Storage
from moe_conformance.oracle.value import Value

# Roundings inside one activation evaluated in one precision: exp or tanh to 2 ulp (4 u each), its argument, a sum, a
# product, a quotient. Those of the argument, and of 1 + tanh where it cancels, show as a share of the argument.
INSIDE = 8

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda v: v * v.sigmoid(),
    "gelu": lambda v: v * torch.special.ndtr(v),
    "gelu_tanh": lambda v: v * torch.sigmoid(1.5957691216057308 * (v + 0.044715 * v**3)),  # 2 sqrt(2 / pi)
    "relu": lambda v: v.clamp(min=0),
    "relu2": lambda v: v.clamp(min=0) ** 2,
}


def activated(gate: Value, up: Value | None, spec: MLPSpec, storage: Storage) -> Value:
    """What enters w2: f(gate, up), or act(gate) where up is None; gate and up [T, F] as w13 gives them.

    Errors of gate and up pass through the function itself (`Value.through`). Its own: INSIDE in `compute`, for
    one kernel that computes it all; and what a path of single operations stores in storage.activation: the activation;
    with alpha also alpha g and the sigmoid; with tanh three for each softcap. A store of an argument shows at most as
    half of u |g| (|z sigmoid'(z)| <= 0.23 and |z tanh'(z)| <= 0.45 for all z), any other as u times the result.
    """
    act, limit = ACTIVATIONS[spec.activation], spec.limit
    up_limit = spec.up_limit or limit

    def curve(g: Tensor) -> Tensor:
        if spec.clamp == "tanh":
            return limit * torch.tanh(g / limit) * torch.sigmoid(g)
        g = act(spec.alpha * (g.clamp(max=limit) if spec.clamp == "before" else g)) / spec.alpha
        return g.clamp(max=limit) if spec.clamp == "after" else g

    single = wide(storage.activation) if spec.dtype == "float32" else storage.activation
    results, arguments = (4, 1) if spec.clamp == "tanh" else (2, 1) if spec.alpha != 1 else (1, 0)
    argument = (gate.exact.clamp(max=limit) if spec.clamp == "before" else gate.exact).abs() / 2
    value = gate.through(curve).erring(argument, INSIDE, storage.compute).stored(storage.compute, INSIDE)
    value = value.erring(argument, arguments, single).stored(single, results - 1)
    if up is None:
        return value.stored(storage.activated)
    if spec.clamp == "tanh":
        up = up.through(lambda u: up_limit * torch.tanh(u / up_limit)).stored(storage.compute, INSIDE)
        up = up.stored(single, 3)
    elif spec.clamp != "no":
        up = up.through(lambda u: u.clamp(-up_limit, up_limit))
    if spec.up_offset:
        up = (up + Value.of(spec.up_offset)).stored(single)
    return (value.stored(single) * up).stored(storage.activated)
