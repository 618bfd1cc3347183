"""How far a correct engine may be from the exact output of an MoE layer: each stored tensor counted, nothing tuned.

The layer of a `LayerSpec` is computed in float64 on `Value`s, which carry the spread of their rounding errors along.
Written apart from reference_impl, so that a fault there is not repeated here: `layer_value` is a second opinion on
what a layer computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moe_conformance.model.specs import LayerSpec, MLPSpec, SharedSpec
from moe_conformance.oracle.tolerance import Bound, Contract, Value, wide

Tensors = Mapping[str, Tensor]

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


def layer_bound(
    x: Tensor,
    spec: LayerSpec,
    tensors: Tensors,
    ids: Tensor,
    weights: Tensor | Value,
    contract: Contract,
    shared_weights: Tensor | Value | None = None,
) -> Bound:
    """The largest error of the output [T, H] of an engine that keeps the contract; arguments as `layer_value`."""
    value = layer_value(x, spec, tensors, ids, weights, contract, shared_weights)
    kept = f"sums in {contract.compute}, gate and up stored in {contract.hidden}, running sum in {contract.total}"
    return value.bound(f"roundings carried through the layer: {kept}, result in {contract.result}")


def layer_value(
    x: Tensor,
    spec: LayerSpec,
    tensors: Tensors,
    ids: Tensor,
    weights: Tensor | Value,
    contract: Contract,
    shared_weights: Tensor | Value | None = None,
) -> Value:
    """The exact output [T, H] of the layer at this routing, with its spread under the contract.

    x: [T, H], as the router sees it; tensors: as `LayerSpec.tensors` names them; ids: [T, K] integer, the first one
    beyond all experts is a dropped pair and adds 0; weights: [T, K], a Value where the engine's own may differ from
    them; shared_weights: [T, n], for SharedSpec.weighted.
    """
    whole, compute, store = Value.of(x), contract.compute, contract.result
    output = _routed(whole, spec, tensors, ids, _value(weights).stored(contract.weights), contract)
    if spec.shared is not None:
        also = _shared(whole, spec.shared, _under(tensors, "shared"), shared_weights, contract)
        output = (output + also).stored(wide(store) if spec.combine_dtype == "float32" else store)
        if spec.shared.combine == "average":
            output = output * Value.of(0.5)
    if spec.dense is not None:
        output = (output + _dense(whole, spec, tensors, contract)).stored(store)
    if spec.output_bias:
        output = (output + Value.of(tensors["output.bias"])).stored(store)
    if spec.output_norm:
        output = output.rms_norm(tensors["output.norm"], spec.output_norm, compute, store)
    return output.stored(store)


def _value(tensor: Tensor | Value) -> Value:
    return tensor if isinstance(tensor, Value) else Value.of(tensor)


def _under(tensors: Tensors, part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


def _routed(x: Value, spec: LayerSpec, tensors: Tensors, ids: Tensor, weights: Value, contract: Contract) -> Value:
    """norm, project in, experts, scale, project out, norm; each where the model has it."""
    compute, store = contract.compute, contract.result
    norm_eps = spec.dense.norm_eps if spec.dense else 0.0
    latent = _under(tensors, "latent")
    if norm_eps:
        x = x.rms_norm(tensors["experts.norm"], norm_eps, compute, contract.x)
    if spec.latent is not None:
        x = _linear(x, latent["in"], latent.get("in_bias"), contract, contract.x)  # [T, D]
        if spec.latent.norm_eps:
            x = x.rms_norm(1 + latent["norm"].double(), spec.latent.norm_eps, compute, contract.x)
    output = experts_value(x, spec, tensors, ids, weights, contract).stored(store)
    if spec.output_scale != 1:
        output = (output * Value.of(spec.output_scale).stored(compute)).stored(store)
    if spec.latent is not None:
        output = _linear(output, latent["out"], latent.get("out_bias"), contract, store)  # [T, H]
    return output.rms_norm(tensors["experts.sum_norm"], norm_eps, compute, store) if norm_eps else output


def experts_value(
    x: Value, spec: LayerSpec, tensors: Tensors, ids: Tensor, weights: Value, contract: Contract
) -> Value:
    """The sum over each token's experts, [T, D]; x [T, D], ids and weights [T, K]."""
    names = spec.experts.tensors("", 0)
    pairs = [x.exact.new_zeros(ids.shape[1], *x.exact.shape) for _ in range(3)]  # [K, T, D] each
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        weight = weights[token, slot][:, None]
        if expert < spec.num_experts:
            # The output norm is one for all experts.
            own = {
                n[1:]: tensors[f"experts{n}"] if n == ".output_norm" else tensors[f"experts{n}"][expert] for n in names
            }
            found = mlp_value(x[token], spec.experts, own, contract, weight)
        elif expert < spec.num_experts + spec.routing.identity_experts:
            found = (x[token] * weight).stored(contract.weighted)
        else:
            continue
        for whole, part in zip(pairs, (found.exact, found.spread, found.limit), strict=True):
            whole[slot, token] = part
    return Value(*pairs).summed(contract.total)


def _shared(x: Value, spec: SharedSpec, tensors: Tensors, weights: Tensor | Value | None, contract: Contract) -> Value:
    """The always-on experts; with a weight of their own each is stored by itself, then their sum."""
    if weights is not None:
        each = (_slice(spec.mlp, tensors, index, spec.count) for index in range(spec.count))
        own = _value(weights).stored(contract.weights)
        outputs = [mlp_value(x, mlp, part, contract, own[:, [i]]) for i, (mlp, part) in enumerate(each)]
        return Value.stack(outputs).summed(contract.compute).stored(contract.result)
    output = mlp_value(x, spec.mlp, tensors, contract)
    if spec.gate:
        gate = x.project(tensors["gate"], contract.compute).stored(contract.result)
        open_ = gate.through(torch.sigmoid).stored(contract.result, 2)
        output = (output * open_).stored(contract.result)
    return output


def _slice(spec: MLPSpec, tensors: Tensors, index: int, count: int) -> tuple[MLPSpec, dict[str, Tensor]]:
    """One of `count` gated MLPs that lie side by side as one."""
    width = spec.width // count
    columns = torch.arange(index * width, (index + 1) * width)
    rows = torch.cat([columns, columns + spec.width])
    return replace(spec, width=width), {"w13": tensors["w13"][rows], "w2": tensors["w2"][:, columns]}


def _dense(x: Value, spec: LayerSpec, tensors: Tensors, contract: Contract) -> Value:
    assert spec.dense is not None
    eps, store = spec.dense.norm_eps, contract.result
    if eps:
        x = x.rms_norm(tensors["dense.norm"], eps, contract.compute, contract.x)
    output = mlp_value(x, spec.dense.mlp, _under(tensors, "dense"), contract)
    return output.rms_norm(tensors["dense.sum_norm"], eps, contract.compute, store) if eps else output


def mlp_value(x: Value, spec: MLPSpec, tensors: Tensors, contract: Contract, weight: Value | None = None) -> Value:
    """The output of one MLP for x [T, D]. tensors: w13 or w1, w2, b13 or b1, b2, output_norm. weight: [T, 1]."""
    first = "13" if spec.gated else "1"
    if weight is not None and spec.weight_on == "input":
        x = (x * weight).stored(contract.x)
    both = _linear(x, tensors[f"w{first}"], tensors.get(f"b{first}"), contract, contract.hidden)
    gate, up = (both[:, : spec.width], both[:, spec.width :]) if spec.gated else (both, None)
    inner = activated(gate, up, spec, contract)  # [T, F]
    if weight is not None and spec.weight_on == "w2_input":
        inner = (inner * weight).stored(contract.activated)
    output = _linear(inner, tensors["w2"], tensors.get("b2"), contract, contract.expert)
    if spec.output_norm:
        scale = Value.of(1 + tensors["output_norm"].double()).stored(contract.expert)
        output = (output * scale).stored(contract.expert)
        output = output.rms_norm(1.0, spec.output_norm, contract.compute, contract.expert)
    if weight is not None and spec.weight_on == "output":
        output = (output * weight).stored(contract.weighted)
    return output


def _linear(x: Value, weight: Tensor, bias: Tensor | None, contract: Contract, store: torch.dtype) -> Value:
    """Where there is a bias, it may be added to a product already stored."""
    product = x.project(weight, contract.compute).stored(store)
    return product if bias is None else (product + Value.of(bias)).stored(store)


def activated(gate: Value, up: Value | None, spec: MLPSpec, contract: Contract) -> Value:
    """What enters w2: f(gate, up), or act(gate) where up is None; gate and up [T, F] as w13 gives them.

    Errors of gate and up pass through the function itself (`Value.through`). Its own: INSIDE in `compute`, for
    one kernel that computes it all; and what a path of single operations stores in contract.activation: the activation;
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

    single = wide(contract.activation) if spec.dtype == "float32" else contract.activation
    results, arguments = (4, 1) if spec.clamp == "tanh" else (2, 1) if spec.alpha != 1 else (1, 0)
    argument = (gate.exact.clamp(max=limit) if spec.clamp == "before" else gate.exact).abs() / 2
    value = gate.through(curve).erring(argument, INSIDE, contract.compute).stored(contract.compute, INSIDE)
    value = value.erring(argument, arguments, single).stored(single, results - 1)
    if up is None:
        return value.stored(contract.activated)
    if spec.clamp == "tanh":
        up = up.through(lambda u: up_limit * torch.tanh(u / up_limit)).stored(contract.compute, INSIDE)
        up = up.stored(single, 3)
    elif spec.clamp != "no":
        up = up.through(lambda u: u.clamp(-up_limit, up_limit))
    if spec.up_offset:
        up = (up + Value.of(spec.up_offset)).stored(single)
    return (value.stored(single) * up).stored(contract.activated)
