"""What a model config says about its Mixture-of-Experts layers, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from moe_conformance.model.specs import LayerSpec


@dataclass(frozen=True)
class MoESpec:
    """What a config says about its Mixture-of-Experts layers.

    num_layers: decoder layers, MoE or not. moe_layers: their indices that have routed experts.
    num_experts, top_k: one number, or one for each entry of moe_layers where the model varies them. num_experts
    counts every id a router can give, identity (zero) experts included.
    shared_experts: how many always-on experts a layer has (0: none). shared_intermediate_size: the summed
    width of the shared experts. latent_size: width the routed experts work in when it is not hidden_size.
    encoder_moe_layers: as moe_layers, for the encoder of an encoder-decoder.
    layer_runs: the decoder layer of each run, in the order of execution, where a forward pass runs some layers more
    than once; empty where it runs each once. A layer has one index and one set of weights in all its runs.
    layers: what each layer computes, one entry for each of moe_layers (for an encoder with experts alone, of
    encoder_moe_layers); empty where the engine does not say.
    undetermined: the key whose value leaves the layers open, where `layers` is empty for that reason.
    """

    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int | tuple[int, ...]
    top_k: int | tuple[int, ...]
    hidden_size: int
    moe_intermediate_size: int | tuple[int, ...]
    shared_experts: int = 0
    shared_intermediate_size: int | None = None
    latent_size: int | None = None
    encoder_moe_layers: tuple[int, ...] = ()
    layer_runs: tuple[int, ...] = ()
    layers: tuple[LayerSpec, ...] = ()
    undetermined: str = field(default="", compare=False)

    @property
    def runs(self) -> tuple[int, ...]:
        """The layer of each run, for every model: 0 to num_layers - 1 where each layer runs once."""
        return self.layer_runs or tuple(range(self.num_layers))

    @property
    def max_top_k(self) -> int:
        """The K that a capture buffer of this model needs."""
        return self.top_k if isinstance(self.top_k, int) else max(self.top_k)

    @property
    def max_experts(self) -> int:
        """The E that a captured id must be below."""
        return self.num_experts if isinstance(self.num_experts, int) else max(self.num_experts)


class CaptureShape(NamedTuple):
    """Sizes of a routed-experts buffer as one side of an engine derives them from a config.

    layers: one for each run of a decoder layer, or of an MoE layer. A layer that a forward pass runs more than once
    routes anew each time; a buffer with one row for it would keep only the last run. experts is None where the engine
    does not use it.
    """

    layers: int
    top_k: int
    experts: int | None
