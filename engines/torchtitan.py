"""torchtitan's MoE layer among ranks: its all-to-all dispatcher, grouped and shared experts, as its models have them.

All of torch alone, so that a CPU and gloo are enough. Its other dispatchers (DeepEP, HybridEP) need a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from moe_conformance.engine import Arrived, Engine, EngineInfo, Exchanged, ExchangeInputs, Limits, called_by_engine

if TYPE_CHECKING:
    from torch import Tensor


class Torchtitan(Engine):
    name = "torchtitan"

    @classmethod
    def missing(cls) -> str | None:
        for package in ("torchtitan", "spmd_types"):
            if find_spec(package) is None:
                return f"{package} is not installed; docs/torchtitan.md says how, without what a trainer alone needs"
        return None

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(self.name, version("torchtitan"))

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        """Its routers choose K experts for every token, and its mesh divides the experts evenly, in rank order."""
        return {"exchange": frozenset({"processes", "uneven_counts", "arrivals", "shared"})}

    def limits(self) -> Mapping[str, Limits]:
        """Its grouped experts compute in bfloat16, whatever comes."""
        return {"exchange": Limits(dtypes=frozenset({"bfloat16"}))}

    def exchange(self, ranks: Sequence[ExchangeInputs]) -> Sequence[Exchanged]:
        return [_exchange(inputs) for inputs in ranks]


def _exchange(inputs: ExchangeInputs) -> Exchanged:
    import torch

    layer = _layer(inputs)
    given: list[tuple[Tensor, Tensor]] = []

    @called_by_engine
    def routed(x: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """In place of its router: weights, ids, and scores of all experts, of which the layer takes the shape alone."""
        return inputs.weights[None], inputs.ids[None], x.new_zeros(*x.shape[:2], inputs.maps.shape[1])

    @called_by_engine
    def note(module: Any, arguments: tuple[Tensor, Tensor]) -> None:
        rows, tokens_per_expert = arguments
        given.append((rows.clone(), tokens_per_expert))

    layer.router.forward = routed
    layer.routed_experts.inner_experts.register_forward_pre_hook(note)
    with torch.no_grad():
        output = layer(inputs.x[None])
    ((rows, tokens_per_expert),) = given
    local = torch.arange(len(tokens_per_expert)).repeat_interleave(tokens_per_expert)
    return Exchanged(output[0], Arrived(rows, local[:, None]))


def _layer(inputs: ExchangeInputs) -> Any:
    """Its module with this rank's experts, on a mesh of all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.common.feed_forward import FeedForward
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    # As `parallelism.spmd_backend` has it. The default, "spmd_types", moves the same rows, in a trainer's own mesh.
    set_spmd_backend("partial_dtensor")
    width, count, top_k = inputs.x.shape[1], inputs.maps.shape[1], inputs.ids.shape[1]

    def linear(wide: int, to: int) -> Any:
        return Linear.Config(in_features=wide, out_features=to)

    shared = None
    if inputs.shared is not None:
        up, down = linear(width, inputs.shared.width), linear(inputs.shared.width, width)
        shared = FeedForward.Config(w1=up, w2=down, w3=up)
    layer = MoE.Config(
        num_experts=count,
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(
                dim=width, hidden_dim=inputs.mlp.width, num_experts=len(inputs.tensors["experts.w2"])
            ),
            token_dispatcher=AllToAllTokenDispatcher.Config(num_experts=count, top_k=top_k),
        ),
        router=TokenChoiceTopKRouter.Config(num_experts=count, gate=linear(width, count), top_k=top_k),
        load_balance_coeff=None,
        shared_experts=shared,
    ).build()
    layer.to(inputs.x.dtype).eval()
    own = _tensors(inputs.tensors, "experts")
    for name, tensor in own.items():
        getattr(layer.routed_experts.inner_experts, name + ("_EDF" if name == "w2" else "_EFD")).data = tensor
    if shared is not None:
        for name, tensor in _tensors(inputs.shared_tensors, "shared").items():
            getattr(layer.shared_experts, name).weight.data = tensor
    if inputs.ranks > 1:
        mesh = init_device_mesh("cpu", (inputs.ranks,), mesh_dim_names=("ep",))
        layer.routed_experts.token_dispatcher.wire_meshes(ep_mesh=mesh)
    return layer


def _tensors(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """w1 is the gate, w3 up."""
    gate, up = tensors[f"{prefix}.w13"].chunk(2, dim=-2)
    return {"w1": gate.contiguous(), "w3": up.contiguous(), "w2": tensors[f"{prefix}.w2"]}
