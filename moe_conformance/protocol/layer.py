"""`layer`, from logits to output, and `block`, from a model's config and router input to output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from moe_conformance.model.specs import LayerSpec
from moe_conformance.model.storage import QuantSpec
from moe_conformance.protocol.gone import HadOtherFields
from moe_conformance.protocol.routing import Routing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LayerInputs(HadOtherFields):
    """One MoE layer, its input and its router's logits.

    x: [T, H]. logits: [T, classes]. spec: what the layer computes; spec.logits is not used, for logits are given.
    tensors: as `spec.tensors()` names and shapes them, in x's dtype, without what makes the logits (router.proj, ...);
    with quant, the experts' as `quant.tensors` does.
    padded_hidden, padded_intermediate: the widths the engine's expert kernel must run at (>= D, F), or None.
    Whatever the kernel leaves in the padded columns of its output is garbage and must not be seen again.
    token_ids: [T] int64, for a model that routes by token id.
    """

    gone: ClassVar[Mapping[str, str]] = {
        "w13": "tensors['experts.w13']",
        "w2": "tensors['experts.w2']",
        "top_k": "spec.routing.top_k",
        "method": "spec.routing",
        "activation": "spec.experts.activation",
        "scale": "spec.output_scale",
        "per_expert_scale": "tensors['router.per_expert_scale']",
        "shared_w13": "tensors['shared.w13']",
        "shared_w2": "tensors['shared.w2']",
        "latent_in": "tensors['latent.in']",
        "latent_out": "tensors['latent.out']",
    }
    x: Tensor
    logits: Tensor
    spec: LayerSpec
    tensors: Mapping[str, Tensor]
    padded_hidden: int | None = None
    padded_intermediate: int | None = None
    token_ids: Tensor | None = None
    quant: QuantSpec | None = None


@dataclass(frozen=True)
class BlockInputs:
    """The MoE block of one layer of a model, by its config, and its input.

    config: as in config.json, a plain dict with model_type. layer: decoder layer. tensors: canonical name -> tensor of
    that layer, as `LayerSpec.tensors` names and shapes them, in x's dtype (router.selection_bias in float32, table in
    int64). x: [B, S, H], what the block's router sees. token_ids: [B, S] int64, for models that route by token id.
    state: [B, S, R], the previous MoE layer's router state, where the model passes it on; None in the first.
    routing: ids [T, K] and weights to use instead of the router's, T = B S; -1 is a dropped pair, which the adapter
    says in the engine's own way unless native_ids. implementation: the engine's own name for a way to compute the
    experts, None for its default.
    """

    config: Mapping[str, Any]
    layer: int
    tensors: Mapping[str, Tensor]
    x: Tensor
    token_ids: Tensor | None = None
    state: Tensor | None = None
    routing: Routing | None = None
    implementation: str | None = None
    native_ids: bool = False


class BlockOutput(NamedTuple):
    """output: [T, H] in x's dtype, shared experts and parallel dense MLP included, residual not.

    routing: ids and weights [T, K] as the engine's router chose and weighed them, -1 or weight 0 where a pair has no
    expert, in any order within a row; an engine that scales after the experts reports weights without that scale. None
    where `inputs.routing` was given or the engine cannot tell.
    """

    output: Tensor
    routing: Routing | None
