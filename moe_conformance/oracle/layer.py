"""What an MoE layer computes, exactly and with the largest error of a correct engine: each stored tensor is counted.

The layer of a `LayerSpec` is computed in float64 on `Value`s, which carry the spread of their rounding errors along.
Written independently of reference_impl, so that a fault there is not repeated here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_conformance.model.specs import LayerSpec, SharedSpec
from moe_conformance.model.storage import QuantSpec
from moe_conformance.oracle.bounds import Bound
from moe_conformance.oracle.choice import Choice, choose, without_expert
from moe_conformance.oracle.experts import experts_value, linear, mlp_value, scaled, shared_slices
from moe_conformance.oracle.logits import logits_value
from moe_conformance.oracle.precision import wide
from moe_conformance.oracle.quantised import plain_weights
from moe_conformance.oracle.storage import Storage
from moe_conformance.oracle.value import Value
from moe_conformance.oracle.weights import weights_value
from moe_conformance.protocol.layer import BlockInputs, LayerInputs
from moe_conformance.protocol.routing import RouteInputs, Routing

Tensors = Mapping[str, Tensor]


def expected_layer(inputs: LayerInputs) -> tuple[Tensor, Bound]:
    """The exact output [T, H] in float64, and the largest error of a correct engine that stores in x's dtype.

    From the layer's logits, by the oracle's own choice of experts; padded widths change nothing. Raises ValueError if
    rounding could change an expert: the case then needs other inputs.
    """
    routed = RouteInputs(inputs.logits, inputs.spec.routing, inputs.tensors, inputs.token_ids)
    choice = choose(routed, None, inputs.x.dtype)
    return _expected(inputs.x, inputs.spec, inputs.tensors, choice, inputs.quant)


def expected_block(inputs: BlockInputs, spec: LayerSpec, routing: Routing | None = None) -> tuple[Tensor, Bound]:
    """The exact output [T, H] in float64, and the largest error of a correct engine that stores in x's dtype.

    The experts are those of inputs.routing if the case gives one; the weights of shared experts then still follow from
    the oracle's own choice. Otherwise they are those of `routing`, the ids and weights [T, K] that the engine reports,
    where a pair of weight 0 has no expert if the model drops or skips pairs. With neither, the oracle chooses. Raises
    ValueError if rounding could change that choice.
    """
    x, logits = inputs.x.flatten(0, 1), block_logits(inputs, spec)
    given, shared = inputs.routing or routing, None
    if given is None:
        return _expected(x, spec, inputs.tensors, choose(block_routing(inputs, spec), logits, x.dtype))
    ids, weights = given.ids.cpu().long(), given.weights.cpu()
    if spec.routing.shared_classes:
        if inputs.routing is not None:
            shared = choose(block_routing(inputs, spec), logits, x.dtype).shared
        else:
            _, shared = weights_value(logits, ids, spec.routing, inputs.tensors, x.dtype)
    ids = ids.where(~without_expert(Routing(ids, weights), spec.routing), -1)
    return _expected(x, spec, inputs.tensors, Choice(ids, Value.of(weights), shared))


def block_logits(inputs: BlockInputs, spec: LayerSpec) -> Value:
    """Logits [T, classes] of the block's router, with the errors of one that computes in x's dtype."""
    state = None if inputs.state is None else inputs.state.flatten(0, 1)
    return logits_value(inputs.x.flatten(0, 1), spec.logits, inputs.tensors, state)


def block_routing(inputs: BlockInputs, spec: LayerSpec) -> RouteInputs:
    """What the block's router chooses from: its logits rounded to x's dtype, and all else that it needs."""
    token_ids = None if inputs.token_ids is None else inputs.token_ids.flatten()
    logits = block_logits(inputs, spec).exact.to(inputs.x.dtype)
    return RouteInputs(logits, spec.routing, inputs.tensors, token_ids, sequences=inputs.x.shape[0])


def _expected(
    x: Tensor, spec: LayerSpec, tensors: Tensors, choice: Choice, quant: QuantSpec | None = None
) -> tuple[Tensor, Bound]:
    storage = Storage.stored(x.dtype)
    value = layer_value(x, spec, tensors, choice.ids, choice.weights, storage, choice.shared, quant)
    return value.exact, value.bound(storage.origin("layer"))


def layer_bound(
    x: Tensor,
    spec: LayerSpec,
    tensors: Tensors,
    ids: Tensor,
    weights: Tensor | Value,
    storage: Storage,
    shared_weights: Tensor | Value | None = None,
) -> Bound:
    """The largest error of the output [T, H] of an engine with this storage policy; arguments as `layer_value`."""
    value = layer_value(x, spec, tensors, ids, weights, storage, shared_weights)
    return value.bound(storage.origin("layer"))


def layer_value(
    x: Tensor,
    spec: LayerSpec,
    tensors: Tensors,
    ids: Tensor,
    weights: Tensor | Value,
    storage: Storage,
    shared_weights: Tensor | Value | None = None,
    quant: QuantSpec | None = None,
) -> Value:
    """The exact output [T, H] of the layer at this routing, with its spread under the storage.

    x: [T, H], as the router sees it; tensors: as `LayerSpec.tensors` names them; ids: [T, K] integer, -1 and any other
    that names no expert adds 0; weights: [T, K], a Value where the engine's own may differ from them; shared_weights:
    [T, n], for SharedSpec.weighted. quant: how the experts' matrices are stored.
    """
    whole, compute, store = Value.of(x), storage.compute, storage.result
    output = _routed(whole, spec, tensors, ids, _value(weights).stored(storage.weights), storage, quant)
    if spec.shared is not None:
        also = _shared(whole, spec.shared, _under(tensors, "shared"), shared_weights, storage)
        output = (output + also).stored(wide(store) if spec.combine_dtype == "float32" else store)
        if spec.shared.combine == "average":
            output = output * Value.of(0.5)
    if spec.dense is not None:
        output = (output + _dense(whole, spec, tensors, storage)).stored(store)
    if spec.output_bias:
        output = (output + Value.of(tensors["output.bias"])).stored(store)
    if spec.output_norm:
        output = output.rms_norm(tensors["output.norm"], spec.output_norm, compute, store)
    return output.stored(store)


def _value(tensor: Tensor | Value) -> Value:
    return tensor if isinstance(tensor, Value) else Value.of(tensor)


def _under(tensors: Tensors, part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


def _routed(
    x: Value,
    spec: LayerSpec,
    tensors: Tensors,
    ids: Tensor,
    weights: Value,
    storage: Storage,
    quant: QuantSpec | None,
) -> Value:
    """norm, project in, experts, scale, project out, norm; each where the model has it."""
    compute, store = storage.compute, storage.result
    norm_eps = spec.dense.norm_eps if spec.dense else 0.0
    latent = _under(tensors, "latent")
    if norm_eps:
        x = x.rms_norm(tensors["experts.norm"], norm_eps, compute, storage.x)
    if spec.latent is not None:
        x = linear(x, latent["in"], latent.get("in_bias"), storage, storage.x)  # [T, D]
        if spec.latent.norm_eps:
            x = x.rms_norm(1 + latent["norm"].double(), spec.latent.norm_eps, compute, storage.x)
    plain = tensors if quant is None else plain_weights(quant, spec.experts, tensors, x.exact.shape[-1])
    output = experts_value(
        x,
        spec.experts,
        plain,
        ids,
        weights,
        storage,
        identity_experts=spec.routing.identity_experts,
        quant=quant,
        stored=tensors,
    ).stored(store)
    output = scaled(output, spec.output_scale, storage)
    if spec.latent is not None:
        output = linear(output, latent["out"], latent.get("out_bias"), storage, store)  # [T, H]
    return output.rms_norm(tensors["experts.sum_norm"], norm_eps, compute, store) if norm_eps else output


def _shared(x: Value, spec: SharedSpec, tensors: Tensors, weights: Tensor | Value | None, storage: Storage) -> Value:
    """The always-on experts; with a weight of their own each is stored by itself, then their sum."""
    if weights is not None:
        own, each = _value(weights).stored(storage.weights), shared_slices(spec.mlp, tensors, spec.count)
        outputs = [mlp_value(x, mlp, part, storage, own[:, [i]]) for i, (mlp, part) in enumerate(each)]
        return Value.stack(outputs).summed(storage.compute).stored(storage.result)
    output = mlp_value(x, spec.mlp, tensors, storage)
    if spec.gate:
        gate = x.project(tensors["gate"], storage.compute).stored(storage.result)
        open_ = gate.through(torch.sigmoid).stored(storage.result, 2)
        output = (output * open_).stored(storage.result)
    return output


def _dense(x: Value, spec: LayerSpec, tensors: Tensors, storage: Storage) -> Value:
    assert spec.dense is not None
    eps, store = spec.dense.norm_eps, storage.result
    if eps:
        x = x.rms_norm(tensors["dense.norm"], eps, storage.compute, storage.x)
    output = mlp_value(x, spec.dense.mlp, _under(tensors, "dense"), storage)
    return output.rms_norm(tensors["dense.sum_norm"], eps, storage.compute, store) if eps else output
