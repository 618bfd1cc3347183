"""The reference implementation as an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import moe_conformance
from moe_conformance.engine import (
    STAGES,
    Aligned,
    AlignInputs,
    BlockInputs,
    BlockOutput,
    CaptureReader,
    CaptureSession,
    CaptureShape,
    CaptureSpec,
    CaptureStore,
    CheckpointName,
    Engine,
    EngineInfo,
    Exchanged,
    ExchangeInputs,
    ExpertMapSpec,
    ExpertsInputs,
    LayerInputs,
    MoESpec,
    Replicated,
    ReplicateInputs,
    RouteInputs,
    RouterHandle,
    RouterSpec,
    Routing,
    ShardInputs,
    UpdateInputs,
)
from moe_conformance.model.families.families import RECORDS
from moe_conformance.protocol.features import words
from moe_conformance.running.devices import gpu_count

if TYPE_CHECKING:
    from torch import Tensor


def is_offered(word: str) -> bool:
    """Words in capitals stand for names. Families are listed separately; implementations are other engines'.

    Padding that counts among tokens is another way to be told of it, not a further one.
    """
    return word != "counted_padding" and not any(part.isupper() for part in word.split(":"))


class Reference(Engine):
    name = "reference"
    device = "cpu"

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(self.name, moe_conformance.__version__, self.device)

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        """Every feature of every stage, and blocks of every family; a block has no second implementation here.

        One feature is excepted: torch's matrix products may sum a row in another order beside other rows.
        """
        # It has no attention, and so no whole models.
        stages = [stage for stage in STAGES if stage != "generate"]
        offered = {stage: frozenset(word for word in words(stage) if is_offered(word)) for stage in stages}
        named = frozenset(name for name, record in RECORDS.items() if record.names is not None)
        return offered | {
            "experts": offered["experts"] - {"batch_invariant"},
            "layer": offered["layer"] - {"batch_invariant"},
            "block": offered["block"] | frozenset(RECORDS),
            "load": offered["load"] | named,
            "remap": offered["remap"] | named,
            "update": offered["update"] | frozenset(RECORDS),
        }

    def describe(self, config: Any) -> MoESpec:
        from moe_conformance.model.families import describe as stage

        return stage.describe(config)

    def capture_shape(self, config: Any, side: Literal["worker", "reader"]) -> CaptureShape:
        from moe_conformance.reference_impl import capture as stage

        return stage.capture_shape(config)

    def route(self, inputs: RouteInputs) -> Routing:
        from moe_conformance.reference_impl import routing as stage

        return stage.route(inputs)

    def router_module(self, spec: RouterSpec) -> RouterHandle:
        from moe_conformance.reference_impl import router as stage

        handle = stage.build_router(spec)
        handle.module.to(self.device)
        return handle

    def align(self, inputs: AlignInputs) -> Aligned:
        from moe_conformance.reference_impl import dispatch as stage

        return stage.align(inputs.ids, inputs.experts, inputs.block, inputs.expert_map)

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        from moe_conformance.reference_impl import experts as stage

        return stage.experts(inputs)

    def layer(self, inputs: LayerInputs) -> Tensor:
        from moe_conformance.reference_impl import layer as stage

        return stage.moe_layer(inputs)

    def block(self, inputs: BlockInputs) -> BlockOutput:
        from moe_conformance.reference_impl import block as stage

        return stage.block(inputs)

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        from moe_conformance.reference_impl import capture as stage

        return stage.Capturer(spec, self.device)

    def capture_store(self, spec: CaptureSpec) -> CaptureStore:
        from moe_conformance.reference_impl import store as stage

        return stage.HostStore(spec)

    def capture_reader(self, address: Any) -> CaptureReader:
        from moe_conformance.reference_impl import store as stage

        return stage.HostReader(address)

    def expert_map(self, spec: ExpertMapSpec) -> Tensor:
        from moe_conformance.reference_impl.parallel import expert_map as stage

        return stage.expert_map(spec.experts, spec.rank, spec.ranks, spec.placement)

    def replicate(self, inputs: ReplicateInputs) -> Replicated:
        from moe_conformance.reference_impl.parallel import expert_map as stage

        return stage.replicate(inputs)

    def shard(self, inputs: ShardInputs) -> Tensor:
        from moe_conformance.reference_impl.parallel import experts as stage

        return stage.shard(inputs)

    def exchange(self, ranks: Sequence[ExchangeInputs]) -> Sequence[Exchanged]:
        from moe_conformance.reference_impl.parallel import exchange as stage

        return stage.exchange(ranks)

    def remap(self, config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str, ...]]:
        from moe_conformance.reference_impl.checkpoint import remap as stage

        return stage.remap(config, names)

    def load(self, folder: Path) -> dict[str, Tensor]:
        from moe_conformance.reference_impl.checkpoint import loading as stage

        return stage.load(folder)

    def update(self, inputs: UpdateInputs) -> Sequence[Tensor]:
        from moe_conformance.reference_impl import update as stage

        return stage.update(inputs)


class ReferenceOnGPU(Reference):
    """The same on a GPU. Not registered: asked for by module:Class, because the reference is debugged on a CPU."""

    name = "reference-gpu"
    device = "cuda"

    @classmethod
    def missing(cls) -> str | None:
        return None if gpu_count() else "there is no GPU"
