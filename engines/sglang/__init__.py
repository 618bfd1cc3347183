"""SGLang on a CPU, from 0.5.20 on: its real routers, expert layer, capturer, balancer, models and loaders.

One file a stage. A release is never asked for its number: stages look at attributes and signatures, and one that
cannot be imported is not offered, without harm to the others. This module imports neither sglang nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe_conformance.engine import (
    Aligned,
    AlignInputs,
    BlockInputs,
    BlockOutput,
    CaptureSession,
    CaptureShape,
    CaptureSpec,
    CheckpointName,
    Engine,
    EngineInfo,
    ExpertMapSpec,
    ExpertsInputs,
    MoESpec,
    Replicated,
    ReplicateInputs,
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

NAMING_STYLES = frozenset({"plain", "moe", "packed", "multimodal"})
# What its MoE code imports, by the name of the module, where pip's differs.
PACKAGES = {
    "IPython": "IPython", "PIL": "pillow", "aiohttp": "aiohttp", "attr": "attrs", "cloudpickle": "cloudpickle",
    "compressed_tensors": "compressed-tensors", "datasets": "datasets", "dill": "dill", "einops": "einops",
    "fastapi": "fastapi", "interegular": "interegular", "loguru": "loguru", "msgspec": "msgspec", "openai": "openai",
    "orjson": "orjson", "partial_json_parser": "partial_json_parser", "prometheus_client": "prometheus-client",
    "psutil": "psutil", "pybase64": "pybase64", "pydantic": "pydantic", "pynvml": "nvidia-ml-py",
    "requests": "requests", "scipy": "scipy", "setproctitle": "setproctitle", "starlette": "starlette",
    "tiktoken": "tiktoken", "transformers": "transformers", "triton": "triton", "uvicorn": "uvicorn",
    "uvloop": "uvloop", "zmq": "pyzmq",
}  # fmt: skip
_TRUSTED = "ids come from SGLang's own router, and no kernel looks at them again"
_EQUAL = "SGLang's expert layer asserts that ranks divide the experts"
_ADDED = "what identity experts pass on is added by LongCat's block, beside its expert layer"
# By stage and word, what it has nothing of.
GONE: Mapping[str, Mapping[str, str]] = {
    "describe": {
        "layers": "SGLang describes nowhere what a layer computes",
        "refusals": "what a config does not say has the default of its class; SGLang looks no further",
    },
    "capture_session": {
        "expert_bounds": _TRUSTED,
        "sequence_gathered": "SGLang's servers send no rows gathered with each slice's padding",
    },
    "align": {"expert_bounds": _TRUSTED},
    "block": {"expert_bounds": _TRUSTED},
    "experts": {"expert_bounds": _TRUSTED, "identity_experts": _ADDED},
    "shard": {"expert_bounds": _TRUSTED, "idle_ranks": _EQUAL, "identity_experts": _ADDED},
    "expert_map": {"idle_ranks": _EQUAL},
}


class SGLang(Engine):
    """What SGLang runs on a CPU: `forward_native` of routers and experts, and its models."""

    name = "sglang"
    _kernel = ""

    # What computes experts: the first that takes them. A CPU's, and what that refuses a GPU's, interpreted.
    kernels: Sequence[Literal["native", "compiled", "triton"]] = ("native", "triton")
    platform: Literal["native", "gpu"] = "native"
    # The stages that are offered; None: all.
    stages: frozenset[str] | None = None

    @classmethod
    def environment(cls) -> Mapping[str, str]:
        """Its engine for CPUs, no network, few words. Set before sglang is imported.

        On a CPU its Triton kernels are interpreted; what torch would compile runs as it is, which computes the same.
        """
        from moe_conformance.engines.sglang import device

        return {
            "HF_HUB_OFFLINE": "1",
            # Of no model: its registry then imports model files as they are asked for, and not all at its start.
            "SGLANG_EXTERNAL_MODEL_PACKAGE": "concurrent",
            "SGLANG_USE_CPU_ENGINE": str(int(device.interprets())),
            "TOKENIZERS_PARALLELISM": "false",
            "TORCHDYNAMO_DISABLE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TRITON_INTERPRET": str(int(device.interprets())),
        }

    @classmethod
    def missing(cls) -> str | None:
        if find_spec("sglang") is None:
            return "sglang is not installed; docs/sglang.md says how, without what it needs a GPU for"
        if absent := [pip for name, pip in PACKAGES.items() if find_spec(name) is None]:
            return f"sglang imports packages that are absent; pip install {' '.join(absent)}"
        return None

    @property
    def info(self) -> EngineInfo:
        from moe_conformance.engines.sglang import device, runtime

        runtime.start()
        return EngineInfo(self.name, runtime.release(), device.kind())

    @cached_property
    def _offered(self) -> Mapping[str, frozenset[str]]:
        probes: dict[str, Callable[[], frozenset[str]]] = {
            "describe": _describe,
            "route": _route,
            "experts": _experts,
            "align": _align,
            "expert_map": _expert_map,
            "replicate": _replicate,
            "block": _block,
            "capture_shape": _capture_shape,
            "capture_session": _capture_session,
            "router_module": _router_module,
            "shard": _shard,
            "remap": _checkpoints,
            "load": _checkpoints,
            "update": _update,
        }
        found = {}
        for stage, probe in probes.items():
            if self.stages is not None and stage not in self.stages:
                continue
            try:
                found[stage] = probe()
            except ImportError:
                continue
        return found

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        from moe_conformance.engines.sglang import runtime

        runtime.start()
        return self._offered

    def absent(self) -> Mapping[str, Mapping[str, str]]:
        """How only families route that its registry has no class of, and what it leaves to others."""
        from moe_conformance.engines import servers
        from moe_conformance.engines.sglang import models

        found = servers.gone(GONE, self._offered)
        for stage in sorted({"route", "router_module"} & self._offered.keys()):
            found[stage] = {
                **found.get(stage, {}), **servers.only_elsewhere("SGLang", self._offered[stage], models.has)
            }  # fmt: skip
        return found

    def _want(self, stage: str) -> None:
        if stage not in self._offered:
            raise Unsupported(f"{stage}: this release of SGLang, or this environment, lacks what it needs")

    def ran(self) -> str:
        ran, self._kernel = self._kernel, ""
        return ran

    def describe(self, config: Any) -> MoESpec:
        self._want("describe")
        from moe_conformance.engines.sglang import describing as stage

        return stage.describe(config)

    def route(self, inputs: RouteInputs) -> Routing:
        self._want("route")
        from moe_conformance.engines.sglang import routing as stage

        answer, self._kernel = stage.route(inputs, self.platform)
        return answer

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        self._want("experts")
        from moe_conformance.engines.sglang import experts as stage

        answer, self._kernel = stage.experts(inputs, self.kernels)
        return answer

    def block(self, inputs: BlockInputs) -> BlockOutput:
        self._want("block")
        from moe_conformance.engines.sglang import block as stage

        answer, self._kernel = stage.block(inputs)
        return answer

    def capture_shape(self, config: Any, side: Literal["worker", "reader"]) -> CaptureShape:
        self._want("capture_shape")
        from moe_conformance.engines.sglang import capture as stage

        self._kernel = "RoutedExpertsCapturer"
        return stage.capture_shape(config, side)

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        self._want("capture_session")
        from moe_conformance.engines.sglang import capture as stage

        return stage.Session(spec)

    def router_module(self, spec: RouterSpec) -> RouterHandle:
        self._want("router_module")
        from moe_conformance.engines.sglang import routers as stage

        answer, self._kernel = stage.router_module(spec)
        return answer

    def shard(self, inputs: ShardInputs) -> Tensor:
        self._want("shard")
        from moe_conformance.engines.sglang import shard as stage

        answer, self._kernel = stage.shard(inputs, self.kernels)
        return answer

    def remap(self, config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str | Target, ...]]:
        self._want("remap")
        from moe_conformance.engines.sglang import loading as stage

        return stage.remap(config, names)

    def load(self, folder: Path) -> Mapping[str, Tensor]:
        self._want("load")
        from moe_conformance.engines.sglang import loading as stage

        return stage.load(folder)

    def update(self, inputs: UpdateInputs) -> Sequence[Tensor]:
        self._want("update")
        from moe_conformance.engines.sglang import updating as stage

        answer, self._kernel = stage.update(inputs)
        return answer

    def align(self, inputs: AlignInputs) -> Aligned:
        self._want("align")
        from moe_conformance.engines.sglang import align as stage

        self._kernel = "moe_align_small_numel, interpreted"
        return stage.align(inputs)

    def expert_map(self, spec: ExpertMapSpec) -> Tensor:
        self._want("expert_map")
        from moe_conformance.engines.sglang import expert_map as stage

        self._kernel = "StandardDispatcher"
        return stage.expert_map(spec)

    def replicate(self, inputs: ReplicateInputs) -> Replicated:
        self._want("replicate")
        from moe_conformance.engines.sglang import eplb as stage

        self._kernel = stage.NAMES
        return stage.replicate(inputs)


def _describe() -> frozenset[str]:
    from moe_conformance.engines.sglang import describing as stage

    return stage.features()


def _capture_shape() -> frozenset[str]:
    from moe_conformance.engines.sglang import capture as stage

    stage.recorder()
    return frozenset({"worker", "reader"})


def _capture_session() -> frozenset[str]:
    from moe_conformance.engines.sglang import capture as stage

    stage.recorder()
    return stage.LAYOUTS


def _shard() -> frozenset[str]:
    from moe_conformance.engines.sglang import shard as stage

    return stage.features()


def _router_module() -> frozenset[str]:
    return _route() - {"padding_rows", "fused_shared", "table"} | {"gemma4_input", "proj_bias", "float32_logits"}


def _checkpoints() -> frozenset[str]:
    """Every family as its own checkpoints name tensors, and Gemma 4 in the styles that were published."""
    from moe_conformance.engines.sglang import models

    found = models.model_types()
    return found | NAMING_STYLES if "gemma4_text" in found else found


def _update() -> frozenset[str]:
    from moe_conformance.engines.sglang import updating as stage

    return stage.features()


def _block() -> frozenset[str]:
    from moe_conformance.engines.sglang import block as stage

    return stage.features()


def _route() -> frozenset[str]:
    from moe_conformance.engines.sglang import routing as stage

    return stage.features()


def _experts() -> frozenset[str]:
    from moe_conformance.engines.sglang import experts as stage

    return stage.features()


def _align() -> frozenset[str]:
    import sglang.kernels.ops.moe.moe_align_small_numel  # noqa: F401

    return frozenset({"expert_map", "dropped_ids"})


def _expert_map() -> frozenset[str]:
    import sglang.srt.eplb.expert_location_dispatch
    import sglang.srt.layers.moe.token_dispatcher.standard  # noqa: F401

    # Not "idle_ranks": experts must divide evenly.
    return frozenset({"contiguous", "round_robin"})


def _replicate() -> frozenset[str]:
    import sglang.srt.eplb.expert_location_dispatch  # noqa: F401

    # Not "dropped_ids": no router of its own leaves a pair of a real token without an expert before copies are chosen.
    return frozenset()


class SGLangCompiled(SGLang):
    """The experts that SGLang gives to torch.compile in place of its native ones, run as they are."""

    name = "sglang-compiled"
    kernels = ("compiled",)
    stages = frozenset({"experts"})


class SGLangTriton(SGLang):
    """What SGLang runs on a GPU, as far as it is Triton and torch: its routers for a GPU, its Triton experts."""

    name = "sglang-triton"
    kernels = ("triton",)
    platform = "gpu"
    stages = frozenset({"route", "experts", "shard"})
