"""Router logits, and how far a correct router's may be off, for an input of any precision."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moe_conformance.model.specs import LogitsSpec
from moe_conformance.oracle.activation import ACTIVATIONS, INSIDE
from moe_conformance.oracle.precision import in_precision, wide
from moe_conformance.oracle.value import Value


def logits_value(x: Tensor, spec: LogitsSpec, tensors: Mapping[str, Tensor], state: Tensor | None = None) -> Value:
    """Router logits [T, classes] of x [T, H] with the spread of a router that computes as spec says, in x's dtype.

    state: [T, R], the state of the previous MoE layer, for "zaya".
    """
    store = in_precision(x.dtype, spec.dtype)
    compute, value = wide(store), Value.of(x)

    def linear(at: Value, weight: str, bias: str) -> Value:
        product = at.project(tensors[weight], compute).stored(store)
        return (product + Value.of(tensors[bias])).stored(store) if bias in tensors else product

    if spec.kind == "gemma4":
        value = value.rms_norm(tensors["router.scale"], spec.norm_eps, compute, store)
        value = (value * Value.of(x.shape[1] ** -0.5).stored(store)).stored(store)
    elif spec.kind == "zaya":
        value = linear(value, "router.down.weight", "router.down.bias")
        if spec.takes_state and state is not None:
            before = (Value.of(state) * Value.of(tensors["router.state_scale"])).stored(store)
            value = (value + before).stored(store)
        value = value.rms_norm(tensors["router.norm"], spec.norm_eps, compute, store)
        for layer in ("fc1", "fc2"):
            value = linear(value, f"router.{layer}.weight", f"router.{layer}.bias")
            value = value.through(ACTIVATIONS["gelu"]).erring(value.exact.abs() / 2, INSIDE, compute).stored(store)
    return linear(value, "router.proj", "router.bias")
