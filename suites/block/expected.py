"""What a block must answer: the reference in float64, and how far a correct engine may be from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_conformance.engine import BlockInputs, Routing
from moe_conformance.model.specs import LayerSpec
from moe_conformance.oracle.layer import layer_bound
from moe_conformance.oracle.routing import logits_value, weights_value
from moe_conformance.oracle.tolerance import Bound, Contract, Value
from moe_conformance.reference_impl.layer import layer
from moe_conformance.reference_impl.router import router_logits
from moe_conformance.reference_impl.routing import Routed, route_logits


@dataclass(frozen=True)
class Choice:
    """weights: [T, N] of N = E + identity experts, 0 where an expert is not chosen, or has no place left. bound: of
    weights. shared: [T, n] weights of weighted shared experts, with their errors."""

    weights: Tensor
    bound: Bound
    shared: Value | None


class Exact:
    """A block's inputs in float64, and what the reference makes of them."""

    def __init__(self, inputs: BlockInputs, spec: LayerSpec) -> None:
        self.inputs, self.spec = inputs, spec
        self.rows = inputs.x.flatten(0, 1)
        self.x = self.rows.double()
        self.tensors = {n: t.double() if t.is_floating_point() else t for n, t in inputs.tensors.items()}
        self.state = None if inputs.state is None else inputs.state.double().flatten(0, 1)
        self.token_ids = None if inputs.token_ids is None else inputs.token_ids.flatten()
        self.sequences = inputs.x.shape[0]

    def route(self, logits: Tensor) -> Routed:
        return route_logits(logits, self.spec.routing, self.tensors, token_ids=self.token_ids, sequences=self.sequences)

    def choice(self) -> Choice:
        """The router's answer. Raises ValueError where rounding errors of a correct router could change an expert: then
        the inputs are no good."""
        spec = self.spec.routing
        exact, _ = router_logits(self.x, self.spec.logits, self.tensors, state=self.state)
        error = logits_value(self.rows, self.spec.logits, self.tensors, self.state)
        routed = self.route(exact)
        weights = dense(routed.ids, routed.weights, self.spec)
        for moved in moves(error.limit):
            other = self.route(exact + moved)
            changed = ((dense(other.ids, other.weights, self.spec) == 0) != (weights == 0)).any(-1)
            if changed.any():
                raise ValueError(f"rounding may change experts of rows {changed.nonzero().flatten().tolist()}")
        logits = Value(exact, error.spread, error.limit)
        dropped = routed.weights == 0 if spec.capacity or spec.skip_expert else None
        found, shared = weights_value(logits, routed.ids, spec, self.tensors, self.rows.dtype, dropped)
        origin = "errors of the logits carried into the weights, and the roundings of their own formula"
        return Choice(weights, Bound(dense(routed.ids, found.limit, self.spec), origin), shared)

    def output(self, routing: Routing | None) -> tuple[Tensor, Bound]:
        """[T, H] at this routing, or the reference's own, and the bound of an engine that stores all in x's dtype."""
        wide = None if routing is None else Routing(routing.ids.cpu().long(), routing.weights.cpu().double())
        found = layer(
            self.x,
            self.spec,
            self.tensors,
            token_ids=self.token_ids,
            state=self.state,
            sequences=self.sequences,
            routing=wide,
        )
        choice = self.choice() if wide is None or self.spec.routing.shared_classes else None
        weights: Tensor | Value = found.weights
        if wide is None and choice is not None:
            room = torch.nn.functional.pad(choice.bound.limit, (0, 1)).gather(-1, found.ids)
            weights = Value(found.weights, room, room)
        shared = choice.shared if choice else None
        contract = Contract.stored(self.rows.dtype)
        return found.output, layer_bound(self.x, self.spec, self.tensors, found.ids, weights, contract, shared)


def moves(limit: Tensor) -> Iterator[Tensor]:
    """Errors [T, classes] of that size, in signs in which every two classes part at least once either way."""
    places = torch.arange(limit.shape[1])
    for digit in range(math.ceil(math.log2(limit.shape[1]))):
        signs = 1 - 2 * (places >> digit & 1)
        yield from (limit * signs, limit * -signs)


def dense(ids: Tensor, weights: Tensor, spec: LayerSpec) -> Tensor:
    """[T, N] of pairs [T, K]; the id N is no expert."""
    experts = spec.num_experts + spec.routing.identity_experts
    room = weights.new_zeros(ids.shape[0], experts + 1)
    return room.scatter_add_(1, ids, weights)[:, :-1]
