"""`experts`: the routed sum at a given routing, the entry that fused-MoE libraries have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_conformance.model.specs import MLPSpec
from moe_conformance.model.storage import LoraSpec, QuantSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of the experts, an adapter a token.

    tensors: as `LoraSpec.tensors` names and shapes them, in x's dtype. adapters: [T] int64, each token's adapter, -1
    for none.
    """

    spec: LoraSpec
    tensors: Mapping[str, Tensor]
    adapters: Tensor


@dataclass(frozen=True)
class ExpertsInputs:
    """Tokens, the experts that take them, and those experts' tensors.

    x: [T, D]. mlp: what each expert computes.
    tensors: canonical name -> tensor, in x's dtype, as `mlp.tensors("experts", D, (E,))` names and shapes them; with
    quant, as `quant.tensors("experts", mlp, D, (E,))` does. With expert_map, of the n experts here, by local id.
    ids: [T, K] int64 in [0, N), N = E + identity_experts, or -1 for a pair that no expert takes, which adds exactly
    nothing; apart from -1, those of a row differ. weights: [T, K] float32.
    expert_map: [E] int32, this rank's local id of each expert, in any order, or -1 where another rank has it; pairs of
    those add exactly nothing. identity_experts: that many last ids have no weights and pass x on.
    output_scale (routed_scaling_factor): multiplies the sum. native_ids: -1, and what else is out of range, goes to the
    engine as it is; otherwise the adapter says "no expert" in the engine's own way.
    """

    x: Tensor
    mlp: MLPSpec
    tensors: Mapping[str, Tensor]
    ids: Tensor
    weights: Tensor
    expert_map: Tensor | None = None
    output_scale: float = 1.0
    identity_experts: int = 0
    quant: QuantSpec | None = None
    lora: Lora | None = None
    native_ids: bool = False

    @property
    def experts(self) -> int:
        """E: experts with weights, on all ranks."""
        return len(self.tensors["experts.w2"]) if self.expert_map is None else len(self.expert_map)
