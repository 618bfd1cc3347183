"""vLLM on a CPU, releases 0.19 to 0.32: its real capturer, router, loader and expert layer.

One file a stage. A release is never asked for its number: stages look at attributes and signatures, and one that
cannot be imported is not offered, without harm to the others. This module imports neither vllm nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe_conformance.engine import (
    RECORDS,
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
    ExpertMapSpec,
    ExpertsInputs,
    Generated,
    GenerateInputs,
    LayerInputs,
    MoESpec,
    Replicated,
    ReplicateInputs,
    Repro,
    RouteInputs,
    RouterHandle,
    RouterSpec,
    Routing,
    ShardInputs,
    Target,
    UpdateInputs,
)
from moe_conformance.errors import Unsupported

if TYPE_CHECKING:
    from torch import Tensor

    from moe_conformance.engines.vllm.built import Kernel
    from moe_conformance.engines.vllm.routing import Platform

NAMING_STYLES = frozenset({"plain", "moe", "packed", "multimodal"})


class VLLM(Engine):
    name = "vllm"
    _kernel = ""

    # Kernels of experts, the first that takes a call computes it; a subclass may judge the others.
    kernels: tuple[Kernel, ...] = ("native", "triton", "fused_experts")
    # Whose routers are asked, in this order: the device's own, and on a CPU those of GPUs.
    platforms: tuple[Platform, ...] = ("native", "gpu", "rocm")

    @classmethod
    def environment(cls) -> Mapping[str, str]:
        """A small CPU cache, no network, no telemetry, few words. Set before vllm is imported.

        On a CPU its Triton kernels are interpreted; what torch would compile runs as it is, which computes the same.
        """
        from moe_conformance.engines.vllm import device

        return {
            "TORCHDYNAMO_DISABLE": "1",
            "TRITON_INTERPRET": str(int(device.interprets())),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "CRITICAL",
            "VLLM_NO_USAGE_STATS": "1",
        }

    @classmethod
    def missing(cls) -> str | None:
        return None if find_spec("vllm") else "vllm is not installed; see tools/releases.py for an environment with it"

    @property
    def info(self) -> EngineInfo:
        from moe_conformance.engines.vllm import device, runtime

        return EngineInfo(self.name, runtime.release(), device.kind())

    @cached_property
    def _offered(self) -> Mapping[str, frozenset[str]]:
        probes: dict[str, Callable[[], frozenset[str]]] = {
            "describe": _describe,
            "capture_shape": _capture_shape,
            "route": _route,
            "router_module": _router_module,
            "align": _align,
            "experts": _experts,
            "layer": _layer,
            "block": _block,
            "capture_session": _capture_session,
            "capture_store": _capture_store,
            "expert_map": _expert_map,
            "replicate": _replicate,
            "shard": _shard,
            "remap": _checkpoints,
            "load": _load,
            "update": _update,
            "generate": _generate,
        }
        found = {}
        for stage, probe in probes.items():
            try:
                found[stage] = probe()
            except ImportError:
                continue
        return found

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        return self._offered

    def absent(self) -> Mapping[str, Mapping[str, str]]:
        """How only families route that its registry has no model of; whether it has one of a family, each call tells.

        And what it leaves to others, or does in one way alone.
        """
        from moe_conformance.engines import servers
        from moe_conformance.engines.vllm import registry

        gone = servers.gone(GONE, self._offered)
        for stage in sorted({"route", "router_module"} & self._offered.keys()):
            gone[stage] = {**gone.get(stage, {}), **registry.only_elsewhere(self._offered[stage])}
        return gone

    def _want(self, stage: str) -> None:
        if stage not in self._offered:
            raise Unsupported(f"{stage}: this release of vLLM, or this environment, lacks what it needs")

    def ran(self) -> str:
        ran, self._kernel = self._kernel, ""
        return ran

    def describe(self, config: Any) -> MoESpec:
        self._want("describe")
        from moe_conformance.engines.vllm import describing as stage

        return stage.describe(config)

    def capture_shape(self, config: Any, side: Literal["worker", "reader"]) -> CaptureShape:
        self._want("capture_shape")
        from moe_conformance.engines.vllm import sizes as stage

        return stage.capture_shape(config, side)

    def route(self, inputs: RouteInputs) -> Routing:
        self._want("route")
        from moe_conformance.engines.vllm import routing as stage

        answer, self._kernel = stage.route(inputs, self.platforms)
        return answer

    def router_module(self, spec: RouterSpec) -> RouterHandle:
        self._want("router_module")
        from moe_conformance.engines.vllm import routers as stage

        answer, self._kernel = stage.router_module(spec)
        return answer

    def align(self, inputs: AlignInputs) -> Aligned:
        self._want("align")
        from moe_conformance.engines.vllm import align as stage

        self._kernel = "moe_align_block_size, with a stand-in for its compiled operator"
        return stage.align(inputs)

    def expert_map(self, spec: ExpertMapSpec) -> Tensor:
        self._want("expert_map")
        from moe_conformance.engines.vllm import expert_map as stage

        return stage.expert_map(spec)

    def replicate(self, inputs: ReplicateInputs) -> Replicated:
        self._want("replicate")
        from moe_conformance.engines.vllm import eplb as stage

        self._kernel = "eplb_map_to_physical_and_record, interpreted"
        return stage.replicate(inputs)

    def shard(self, inputs: ShardInputs) -> Tensor:
        self._want("shard")
        from moe_conformance.engines.vllm import shard as stage

        answer, self._kernel = stage.shard(inputs, self.kernels)
        return answer

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        self._want("experts")
        from moe_conformance.engines.vllm import experts as stage

        answer, self._kernel = stage.experts(inputs, self.kernels)
        return answer

    def repro(self, inputs: Any) -> Repro:
        from moe_conformance.engines.vllm import repro as stage

        return stage.repro(inputs, self.kernels)

    def layer(self, inputs: LayerInputs) -> Tensor:
        self._want("layer")
        from moe_conformance.engines.vllm import layer as stage

        answer, self._kernel = stage.layer(inputs, self.kernels)
        return answer

    def block(self, inputs: BlockInputs) -> BlockOutput:
        self._want("block")
        from moe_conformance.engines.vllm import block as stage

        answer, self._kernel = stage.block(inputs)
        return answer

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        self._want("capture_session")
        from moe_conformance.engines.vllm import capture as stage

        return stage.Session(spec)

    def capture_store(self, spec: CaptureSpec) -> CaptureStore:
        self._want("capture_store")
        from moe_conformance.engines.vllm import store as stage

        return stage.open_store(spec)

    def capture_reader(self, address: Any) -> CaptureReader:
        from moe_conformance.engines.vllm import store as stage

        return stage.open_reader(address)

    def remap(self, config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str | Target, ...]]:
        self._want("remap")
        from moe_conformance.engines.vllm import loading, weights

        # Gemma 4's names are tried with suffixes of weights that no model of its config has: those are listened to.
        if config.get("model_type") in ("gemma4", "gemma4_text"):
            return weights.remap(config, names)
        return loading.remap(config, names)

    def load(self, folder: Path) -> Mapping[str, Tensor]:
        self._want("load")
        from moe_conformance.engines.vllm import loading as stage

        return stage.load(folder)

    def update(self, inputs: UpdateInputs) -> Sequence[Tensor]:
        self._want("update")
        from moe_conformance.engines.vllm import updating as stage

        outputs, self._kernel = stage.update(inputs)
        return outputs

    def generate(self, inputs: GenerateInputs) -> Generated:
        self._want("generate")
        from moe_conformance.engines.vllm import generating as stage

        return stage.generate(inputs)


_TRUSTED = "ids come from vLLM's own router, and no kernel looks at them again"
_MORE_RANKS = "vLLM's models refuse more ranks than experts"
# By stage and word, what it has nothing of.
GONE: Mapping[str, Mapping[str, str]] = {
    "describe": {
        "layers": "vLLM describes the sizes of expert layers, and nowhere what they compute",
        "refusals": "what a config does not say has the default of its class; vLLM looks no further",
    },
    "capture_session": {"expert_bounds": _TRUSTED},
    "capture_store": {"expert_bounds": _TRUSTED},
    "align": {"expert_bounds": _TRUSTED},
    "block": {"expert_bounds": _TRUSTED},
    "experts": {"expert_bounds": _TRUSTED},
    "shard": {"expert_bounds": _TRUSTED, "idle_ranks": _MORE_RANKS},
    "expert_map": {"idle_ranks": _MORE_RANKS},
    "layer": {"traceable": "vLLM's layer is a module that is built around its weights; no call takes them"},
    "update": {
        "parts": "a session of vLLM's reload has all tensors of a layer",
        "replaced": "vLLM's loaders write into the tensors that are there",
    },
}


def _describe() -> frozenset[str]:
    from moe_conformance.engines.vllm import describing as stage

    return stage.features()


def _capture_shape() -> frozenset[str]:
    from moe_conformance.engines.vllm import sizes as stage

    stage.recorder()
    return frozenset({"worker", "reader"})


def _capture_session() -> frozenset[str]:
    from moe_conformance.engines.vllm import capture as stage

    # Not "expert_bounds": ids come from its own router.
    return stage.row_kinds()


def _capture_store() -> frozenset[str]:
    from moe_conformance.engines.vllm import store as stage

    return stage.features()


def _gemma4() -> None:
    import vllm.model_executor.models.gemma4  # noqa: F401


def _route() -> frozenset[str]:
    from moe_conformance.engines.vllm import routing as stage

    return stage.features()


def _router_module() -> frozenset[str]:
    from moe_conformance.engines.vllm import routing as stage

    return stage.features() - {"padding_rows", "fused_shared", "table"} | {
        "gemma4_input", "proj_bias", "float32_logits",
    }  # fmt: skip


def _align() -> frozenset[str]:
    from vllm.model_executor.layers.fused_moe import moe_align_block_size  # noqa: F401

    return frozenset({"expert_map", "dropped_ids"})


def _expert_map() -> frozenset[str]:
    from moe_conformance.engines.vllm import expert_map as stage

    stage.determine()
    # Not "idle_ranks": its models refuse more ranks than experts.
    return frozenset(stage.PLACEMENTS)


def _replicate() -> frozenset[str]:
    from moe_conformance.engines.vllm import eplb as stage

    stage.module()
    return frozenset({"dropped_ids"})


def _shard() -> frozenset[str]:
    from moe_conformance.engines.vllm import shard as stage

    return stage.features()


def _experts() -> frozenset[str]:
    from moe_conformance.engines.vllm import experts as stage

    return stage.features()


def _layer() -> frozenset[str]:
    from moe_conformance.engines.vllm import layer as stage

    return stage.features()


def _block() -> frozenset[str]:
    from moe_conformance.engines.vllm import block as stage

    return stage.features()


def _update() -> frozenset[str]:
    from moe_conformance.engines.vllm import updating as stage

    return stage.features()


def _generate() -> frozenset[str]:
    from moe_conformance.engines.vllm import generating as stage

    return stage.features()


def _checkpoints() -> frozenset[str]:
    """Every family as its own checkpoints name tensors, and Gemma 4 in the styles that were published."""
    try:
        _gemma4()
    except ImportError:
        return frozenset(RECORDS)
    return frozenset({*RECORDS, *NAMING_STYLES})


def _load() -> frozenset[str]:
    from moe_conformance.engines.vllm import quantised

    return _checkpoints() | quantised.formats()


class VLLMTriton(VLLM):
    """What vLLM runs on a GPU, as far as it is Triton and torch: its routers for a GPU, its Triton experts."""

    name = "vllm-triton"
    kernels = ("triton", "fused_experts")
    platforms = ("gpu", "rocm")

    @classmethod
    def missing(cls) -> str | None:
        return super().missing() or (
            None if find_spec("triton") else "triton is not installed, whose interpreter runs them"
        )

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        """The stages that are other code on a GPU."""
        return {
            stage: words for stage, words in self._offered.items() if stage in ("route", "experts", "layer", "shard")
        }

    def _want(self, stage: str) -> None:
        if stage not in self.capabilities():
            raise Unsupported(f"{stage}: judged with the engine vllm")
        super()._want(stage)
