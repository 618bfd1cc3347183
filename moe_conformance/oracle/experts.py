"""What experts compute, and the largest error of an engine that computes them: one MLP, and the routed sum.

Written independently of reference_impl, so that a fault there is not repeated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.model.specs import MLPSpec
from moe_conformance.model.storage import QuantSpec
from moe_conformance.oracle.activation import activated
from moe_conformance.oracle.bounds import Bound
from moe_conformance.oracle.quantised import WEIGHT_ROUNDINGS, plain_weights, through_codes
from moe_conformance.oracle.storage import Storage
from moe_conformance.oracle.value import Value
from moe_conformance.protocol.experts import ExpertsInputs, Lora

Tensors = Mapping[str, Tensor]


def expected_experts(inputs: ExpertsInputs, storage: Storage | None = None) -> tuple[Tensor, Bound]:
    """The exact routed sum [T, D] in float64, and the largest error of an engine with this storage policy.

    storage: None for an engine that stores every tensor in x's dtype. A pair adds nothing if its id is -1, out of
    range, or an expert that expert_map gives to another rank. Stored weights may be dequantised into x's dtype, or
    their codes multiplied and scaled afterwards; an adapter's update may be stored before it is added.
    """
    storage = storage or Storage.stored(inputs.x.dtype)
    quant, tensors = inputs.quant, inputs.tensors
    if quant is not None:
        tensors = plain_weights(quant, inputs.mlp, tensors, inputs.x.shape[-1])
    value = experts_value(
        Value.of(inputs.x),
        inputs.mlp,
        tensors,
        inputs.ids,
        Value.of(inputs.weights).stored(storage.weights),
        storage,
        expert_map=inputs.expert_map,
        identity_experts=inputs.identity_experts,
        quant=quant,
        stored=inputs.tensors,
        lora=inputs.lora,
    ).stored(storage.result)
    value = scaled(value, inputs.output_scale, storage)
    return value.exact, value.bound(storage.origin("experts"))


def scaled(value: Value, scale: float, storage: Storage) -> Value:
    """The routed sum times its scaling factor, stored."""
    if scale == 1:
        return value
    return (value * Value.of(scale).stored(storage.compute)).stored(storage.result)


def experts_value(
    x: Value,
    mlp: MLPSpec,
    tensors: Tensors,
    ids: Tensor,
    weights: Value,
    storage: Storage,
    *,
    expert_map: Tensor | None = None,
    identity_experts: int = 0,
    quant: QuantSpec | None = None,
    stored: Tensors | None = None,
    lora: Lora | None = None,
) -> Value:
    """The sum over each token's experts, [T, D]; x [T, D], ids and weights [T, K], tensors of `mlp.tensors`.

    quant: how the weights were stored; stored: those tensors. lora: what each token's adapter adds.
    """
    names = [name.removeprefix("experts.") for name in mlp.tensors("experts", 0)]
    experts = len(tensors["experts.w2"]) if expert_map is None else len(expert_map)
    parts = [x.exact.new_zeros(ids.shape[1], *x.exact.shape) for _ in range(3)]  # [K, T, D] each
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        weight = weights[token, slot][:, None]
        if 0 <= expert < experts:
            local = expert if expert_map is None else int(expert_map[expert])
            if local < 0:
                continue
            # The output norm is one for all experts.
            own = {name: tensors[f"experts.{name}"] for name in names}
            own = {name: tensor if name == "output_norm" else tensor[local] for name, tensor in own.items()}
            multiply = Linear(own, storage, quant, stored, local, lora, token)
            found = mlp_value(x[token], mlp, own, storage, weight, multiply)
        elif experts <= expert < experts + identity_experts:
            found = (x[token] * weight).stored(storage.weighted)
        else:
            continue
        for whole, part in zip(parts, (found.exact, found.spread, found.limit), strict=True):
            whole[slot, token] = part
    return Value(*parts).summed(storage.total)


def linear(x: Value, weight: Tensor, bias: Tensor | None, storage: Storage, store: torch.dtype) -> Value:
    """A product with its bias."""
    return biased(x.project(weight, storage.compute).stored(store), bias, store)


def biased(product: Value, bias: Tensor | None, store: torch.dtype) -> Value:
    """The product plus the bias, if any, which may be added after the product was stored."""
    return product if bias is None else (product + Value.of(bias)).stored(store)


@dataclass(frozen=True)
class Linear:
    """The two products of one expert, with its bias: how its weights are stored, and what adapters add to its rows.

    tensors: the expert's, plain. quant, stored: how its matrices were stored, and all experts' tensors so; expert: its
    number among them. lora, token: adapters, and which token each row is.
    """

    tensors: Tensors
    storage: Storage
    quant: QuantSpec | None = None
    stored: Tensors | None = None
    expert: int = 0
    lora: Lora | None = None
    token: Tensor | None = None

    def __call__(self, name: str, x: Value, store: torch.dtype) -> Value:
        """The product of x and matrix `name`, with bias; an adapter's update is added after the bias."""
        product = biased(self._product(name, x).stored(store), self.tensors.get(f"b{name[1:]}"), store)
        return product if self.lora is None else self._adapted(self.lora, name, x, product, self.storage, store)

    def _product(self, name: str, x: Value) -> Value:
        storage, weight, quant = self.storage, self.tensors[name], self.quant
        if quant is None or self.stored is None:
            # An engine may merge an adapter into the weights for the tokens that have it.
            whole = weight if self.lora is None else Value.of(weight).stored(storage.x)
            return x.project(whole, storage.compute)
        tile = {"block": quant.block[1], "group": quant.group}.get(quant.granularity, x.exact.shape[-1])
        if quant.activations != "no":
            given = self.stored[f"experts.{name}.input_scale"][self.expert] if quant.activations == "static" else None
            x = through_codes(x, quant, given, storage.compute, storage.x)
            tile = min(tile, quant.group) if quant.activations == "group" else tile
        # Partial sums of codes are multiplied by the scales of weights and activations.
        scalings = 2 * -(-x.exact.shape[-1] // tile)
        return x.project(Value.of(weight).stored(storage.x, WEIGHT_ROUNDINGS), storage.compute, scalings)

    def _adapted(self, lora: Lora, name: str, x: Value, product: Value, storage: Storage, store: torch.dtype) -> Value:
        assert self.token is not None
        spec, adapters = lora.spec, lora.adapters[self.token]
        scaling = Value.of(spec.alpha / (spec.rank**0.5 if spec.rslora else spec.rank)).stored(storage.compute)
        parts = [part.clone() for part in (product.exact, product.spread, product.limit)]
        for adapter in adapters[adapters >= 0].unique().tolist():
            rows = (adapters == adapter).nonzero().flatten()
            a, b = (lora.tensors[f"lora.{name}.{side}"][adapter, self.expert] for side in ("a", "b"))
            narrow = x[rows].project(a, storage.compute).stored(store)
            # An engine may apply the scaling after A, after B, or to B itself.
            update = (narrow.project(Value.of(b).stored(store), storage.compute).stored(store) * scaling).stored(store)
            found = (product[rows] + update).stored(store)
            for whole, part in zip(parts, (found.exact, found.spread, found.limit), strict=True):
                whole[rows] = part
        return Value(*parts)


def mlp_value(
    x: Value,
    spec: MLPSpec,
    tensors: Tensors,
    storage: Storage,
    weight: Value | None = None,
    multiply: Linear | None = None,
) -> Value:
    """The output of one MLP for x [T, D]. tensors: w13 or w1, w2, b13 or b1, b2, output_norm. weight: [T, 1].

    multiply: the two products, if weights are not plain.
    """
    multiply = multiply or Linear(tensors, storage)
    if weight is not None and spec.weight_on == "input":
        x = (x * weight).stored(storage.x)
    both = multiply("w13" if spec.gated else "w1", x, storage.hidden)
    gate, up = (both[:, : spec.width], both[:, spec.width :]) if spec.gated else (both, None)
    inner = activated(gate, up, spec, storage)  # [T, F]
    if weight is not None and spec.weight_on == "w2_input":
        inner = (inner * weight).stored(storage.activated)
    output = multiply("w2", inner, storage.expert)
    if spec.output_norm:
        scale = Value.of(1 + tensors["output_norm"].double()).stored(storage.expert)
        output = (output * scale).stored(storage.expert)
        output = output.rms_norm(1.0, spec.output_norm, storage.compute, storage.expert)
    if weight is not None and spec.weight_on == "output":
        output = (output * weight).stored(storage.weighted)
    return output


def shared_slices(mlp: MLPSpec, tensors: Tensors, count: int) -> list[tuple[MLPSpec, dict[str, Tensor]]]:
    """Each of `count` MLPs that lie side by side as one: its spec and its tensors; the first has b2."""
    names = [name.removeprefix("shared.") for name in mlp.tensors("shared", 0)]
    whole = {name: divided(name, tensors[name][None], mlp, count) for name in names}
    narrow = replace(mlp, width=mlp.width // count)
    return [(narrow, {name: tensor[index] for name, tensor in whole.items()}) for index in range(count)]


def expected_parts(
    whole: ExpertsInputs, shared: MLPSpec | None, shared_tensors: Tensors, size: int, tp: int
) -> tuple[Tensor, Bound]:
    """The exact sum of all ranks' parts [T, D], and how far that of size x tp correct ranks may be from it.

    An expert divided among tp ranks rounds like tp narrower experts with the same weight; a divided shared expert
    likewise. If tp does not divide a width, the next larger divisor is counted instead. What a rank stores is one of
    the partial sums of `Storage.stored`, whichever pairs are in it.
    """
    exact, _ = expected_experts(whole)
    storage, x = Storage.stored(whole.x.dtype), Value.of(whole.x)
    slices = divisor(whole.mlp.width, tp)
    experts = whole.experts
    ids = whole.ids[..., None] * slices + torch.arange(slices)
    identity = (whole.ids >= experts)[..., None]
    first = torch.arange(slices) == 0
    ids = torch.where(identity, torch.where(first, whole.ids[..., None] + experts * (slices - 1), -1), ids)
    ids = ids.where((whole.ids >= 0)[..., None], -1).flatten(1)  # [T, K slices]
    value = experts_value(
        x,
        replace(whole.mlp, width=whole.mlp.width // slices),
        {name: divided(name, tensor, whole.mlp, slices) for name, tensor in whole.tensors.items()},
        ids,
        Value.of(whole.weights.repeat_interleave(slices, -1)).stored(storage.weights),
        storage,
        identity_experts=whole.identity_experts,
    ).stored(storage.result)
    value = scaled(value, whole.output_scale, storage)
    if shared is not None:
        own = {name.removeprefix("shared."): tensor for name, tensor in shared_tensors.items()}
        exact = exact + mlp_value(x, shared, own, storage).exact
        pieces = shared_slices(shared, own, divisor(shared.width, size * tp))
        parts = [mlp_value(x, narrow, part, storage) for narrow, part in pieces]
        value = (value + Value.stack(parts).summed(storage.total).stored(storage.result)).stored(storage.result)
    return exact, value.bound(f"{storage.origin('experts')}, by {size} x {tp} ranks")


def divisor(width: int, parts: int) -> int:
    """The smallest number from parts on that divides width."""
    return next(number for number in range(parts, width + 1) if width % number == 0)


def divided(name: str, tensor: Tensor, mlp: MLPSpec, slices: int) -> Tensor:
    """[E, ...] -> [E slices, ...], the tensor of MLPs cut into slices of their width; the first one has b2.

    The output norm stays as it is: it spans all slices.
    """
    match name.rpartition(".")[2]:
        case "output_norm":
            return tensor
        case "b2":
            return F.pad(tensor[:, None], (0, 0, 0, slices - 1)).flatten(0, 1)
        case "w2":
            columns: Tensor = tensor.unflatten(2, (slices, -1))
            return columns.movedim(2, 1).flatten(0, 1)
    rows: Tensor = tensor.unflatten(1, (2 if mlp.gated else 1, slices, -1))
    return rows.transpose(1, 2).flatten(2, 3).flatten(0, 1)
