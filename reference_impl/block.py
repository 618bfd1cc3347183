"""The MoE block of one layer of a model: its config, its tensors by canonical name, an input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from moe_conformance.engine import BlockInputs, BlockOutput, Routing
from moe_conformance.errors import InputError, Unsupported
from moe_conformance.model.families.describe import describe
from moe_conformance.model.specs import LayerSpec
from moe_conformance.reference_impl.layer import LayerOutput, layer
from moe_conformance.reference_impl.tensors import check_tensors


def block(inputs: BlockInputs, layer: Callable[..., LayerOutput] = layer) -> BlockOutput:
    """Compute one layer's block; see BlockInputs for shapes. layer: the function that computes it, called like `layer`.

    Raises InputError for a layer without experts, and for tensors that are not exactly those of the layer; Unsupported
    if this model's layer cannot be expressed as a LayerSpec, and for a named implementation.
    """
    if inputs.implementation is not None:
        raise Unsupported(f"block: got implementation {inputs.implementation!r}, want None; experts have one here")
    spec = layer_spec(inputs.config, inputs.layer)
    check_tensors(spec.tensors(), inputs.tensors)

    def flat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.flatten(0, 1)  # [B, S, ...] -> [T, ...]

    output, ids, weights, _ = layer(
        inputs.x.flatten(0, 1),
        spec,
        inputs.tensors,
        token_ids=flat(inputs.token_ids),
        state=flat(inputs.state),
        sequences=inputs.x.shape[0],
        routing=inputs.routing,
    )
    return BlockOutput(output, None if inputs.routing is not None else Routing(ids, weights))


def layer_spec(config: Mapping[str, Any], index: int) -> LayerSpec:
    """What decoder layer `index` computes; an encoder layer if only the encoder has experts."""
    model = describe(config)
    if not model.layers:
        raise Unsupported(
            f"block: got model_type {config.get('model_type')!r}, want one whose record says what its layers compute"
        )
    indices = model.moe_layers or model.encoder_moe_layers
    if index not in indices:
        raise InputError(f"layer: got {index}, want one that has experts, out of {', '.join(map(str, indices))}")
    return model.layers[indices.index(index)]
