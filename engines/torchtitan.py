"""torchtitan's routed experts among ranks: its all-to-all dispatcher and its grouped experts, as its models have them.

Of torch alone, so that a CPU and gloo are enough. Its other dispatchers (DeepEP, HybridEP) need a GPU.
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
                return f"{package} is not installed: pip install torchtitan"
        return None

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(self.name, version("torchtitan"))

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        """Its routers choose K experts for every token, and its mesh divides the experts evenly, in rank order."""
        return {"exchange": frozenset({"processes", "uneven_counts", "arrivals"})}

    def limits(self) -> Mapping[str, Limits]:
        """Its experts compute in bfloat16, whatever comes."""
        return {"exchange": Limits(dtypes=frozenset({"bfloat16"}))}

    def exchange(self, ranks: Sequence[ExchangeInputs]) -> Sequence[Exchanged]:
        return [_exchange(inputs) for inputs in ranks]


def _exchange(inputs: ExchangeInputs) -> Exchanged:
    import torch

    experts = _routed_experts(inputs)
    given: list[tuple[Tensor, Tensor]] = []

    @called_by_engine
    def note(module: Any, arguments: tuple[Tensor, Tensor]) -> None:
        rows, tokens_per_expert = arguments
        given.append((rows.clone(), tokens_per_expert))

    experts.inner_experts.register_forward_pre_hook(note)
    counts = torch.bincount(inputs.ids.flatten(), minlength=inputs.maps.shape[1])
    with torch.no_grad():
        output = experts(inputs.x[None], inputs.weights[None], inputs.ids[None], counts)
    ((rows, tokens_per_expert),) = given
    local = torch.arange(len(tokens_per_expert)).repeat_interleave(tokens_per_expert)
    return Exchanged(output[0], Arrived(rows, local[:, None]))


def _routed_experts(inputs: ExchangeInputs) -> Any:
    """Its module with this rank's experts, on a mesh of all ranks."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    # What its models set from `parallelism.spmd_backend`; "spmd_types" checks the types of tensors, and moves the same.
    set_spmd_backend("partial_dtensor")
    experts = RoutedExperts.Config(
        inner_experts=GroupedExperts.Config(
            dim=inputs.x.shape[1], hidden_dim=inputs.mlp.width, num_experts=len(inputs.tensors["experts.w2"])
        ),
        token_dispatcher=AllToAllTokenDispatcher.Config(num_experts=inputs.maps.shape[1], top_k=inputs.ids.shape[1]),
    ).build()
    gate, up = inputs.tensors["experts.w13"].chunk(2, dim=1)
    own = {"w1_EFD": gate, "w3_EFD": up, "w2_EDF": inputs.tensors["experts.w2"]}
    for name, tensor in own.items():
        setattr(experts.inner_experts, name, torch.nn.Parameter(tensor.contiguous(), requires_grad=False))
    if inputs.ranks > 1:
        mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu", mesh_dim_names=("ep",))
        experts.token_dispatcher.wire_meshes(ep_mesh=mesh)
    return experts
