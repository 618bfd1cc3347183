"""transformers as an engine: its own routers, experts, blocks and loader are what is judged.

Importing this package imports neither transformers nor torch. Not offered: capture (transformers has no capturer).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from moe_conformance.engine import (
    BlockInputs,
    BlockOutput,
    CheckpointName,
    Engine,
    EngineInfo,
    ExpertsInputs,
    Generated,
    GenerateInputs,
    LayerInputs,
    Limits,
    MoESpec,
    Repro,
    RouteInputs,
    RouterHandle,
    RouterSpec,
    Routing,
    UpdateInputs,
)
from moe_conformance.running.devices import gpu_count

if TYPE_CHECKING:
    from torch import Tensor


# The first release that this adapter reads correctly. Before 5.19 gpt-oss reads no limit from its config, before 5.18
# Switch's router answers in another order, before 5.0 experts are not modules.
OLDEST = Version("5.20")


class Transformers(Engine):
    """Stages are offered as far as the installed transformers has the classes for them."""

    name = "transformers"
    device = "cpu"

    # "eager" is the only one of "eager", "batched_mm" and "grouped_mm" that takes any width and any id:
    # from_pretrained's default, grouped_mm, needs rows of a multiple of 16 bytes. A subclass may judge the others.
    experts_implementation = "eager"

    @classmethod
    def environment(cls) -> Mapping[str, str]:
        return {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

    @classmethod
    def missing(cls) -> str | None:
        if absent := [name for name in ("torch", "transformers") if find_spec(name) is None]:
            return f"not installed: {', '.join(absent)}"
        if Version(found := version("transformers")) < OLDEST:
            return f"got transformers {found}, want {OLDEST} or later: pip install 'transformers>={OLDEST}'"
        return None

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(self.name, version("transformers"), self.device)

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        from moe_conformance.engines.transformers import block, loading, updating
        from moe_conformance.engines.transformers.offered import offered

        found = {stage: offered(stage) for stage in ("route", "router_module", "experts", "layer")}
        found |= {
            "update": updating.features(),
            "block": block.features(),
            "load": loading.styles(),
            "remap": block.model_types(),
        }
        found["generate"] = block.model_types() | {"routed_experts", "step_tokens", "bfloat16"}
        return {"describe": frozenset(), **found}

    def limits(self) -> Mapping[str, Limits]:
        from moe_conformance.engines.transformers.offered import limits

        return limits(self.experts_implementation)

    def describe(self, config: Any) -> MoESpec:
        from moe_conformance.engines.transformers import describe as stage

        return stage.describe(config)

    def route(self, inputs: RouteInputs) -> Routing:
        from moe_conformance.engines.transformers import routing as stage

        return stage.route(inputs)

    def router_module(self, spec: RouterSpec) -> RouterHandle:
        from moe_conformance.engines.transformers import routing as stage

        return stage.router_module(spec, self.device)

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        from moe_conformance.engines.transformers import experts as stage

        return stage.experts(inputs, self.experts_implementation)

    def repro(self, inputs: Any) -> Repro:
        from moe_conformance.engines.transformers import repro as shown

        return shown.repro(inputs, self.experts_implementation)

    def layer(self, inputs: LayerInputs) -> Tensor:
        from moe_conformance.engines.transformers import layer as stage

        return stage.layer(inputs, self.experts_implementation)

    def block(self, inputs: BlockInputs) -> BlockOutput:
        from moe_conformance.engines.transformers import block as stage

        return stage.block(inputs, self.experts_implementation)

    def remap(self, config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str, ...]]:
        from moe_conformance.engines.transformers import remapping as stage

        return stage.remap(config, names)

    def load(self, folder: Path) -> Mapping[str, Tensor]:
        from moe_conformance.engines.transformers import loading as stage

        return stage.load(folder)

    def update(self, inputs: UpdateInputs) -> Sequence[Tensor]:
        from moe_conformance.engines.transformers import updating as stage

        return stage.update(inputs, self.experts_implementation)

    def generate(self, inputs: GenerateInputs) -> Generated:
        from moe_conformance.engines.transformers import generating as stage

        return stage.generate(inputs, self.experts_implementation, self.device)


class TransformersOnGPU(Transformers):
    """The same on a GPU. Not registered: asked for by module:Class."""

    name = "transformers-gpu"
    device = "cuda"

    @classmethod
    def missing(cls) -> str | None:
        return super().missing() or (None if gpu_count() else "there is no GPU")
