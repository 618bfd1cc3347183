"""The kernels of this package as an engine: compiled where there is a GPU, interpreted on the CPU elsewhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moe_conformance.engine import (
    Aligned,
    AlignInputs,
    BlockInputs,
    BlockOutput,
    CaptureSession,
    CaptureSpec,
    Engine,
    EngineInfo,
    ExpertsInputs,
    LayerInputs,
    RouteInputs,
    RouterHandle,
    RouterSpec,
    Routing,
    ShardInputs,
)
from moe_conformance.engines.reference import is_offered
from moe_conformance.errors import Unavailable
from moe_conformance.model.families.families import RECORDS
from moe_conformance.protocol.features import words
from moe_conformance.running.devices import gpu_count

if TYPE_CHECKING:
    from torch import Tensor

HAS = ("route", "router_module", "align", "experts", "layer", "block", "capture_session", "shard")
# Their routers look beyond one row of logits: at an expert's capacity, or at the other tokens of the batch.
NOT_BY_ROW = frozenset({"switch_transformers", "nllb-moe", "doge"})
BEYOND_A_ROW = frozenset({"capacity", "product_keys"})
# float8 weights are loaded in the dtype of the other operand; no kernel loads codes with fewer bits.
CODES = frozenset({"quantised:int8", "quantised:int4", "quantised:mxfp4", "quantised:nvfp4", "quantised_activations"})
LACKS = {
    "route": BEYOND_A_ROW,
    "router_module": BEYOND_A_ROW,
    "experts": CODES | {"lora"},
    "layer": BEYOND_A_ROW | CODES,
}


class Triton(Engine):
    """Routing, dispatch, experts, combine and capture run in kernels; the code between them is the reference's."""

    name = "triton"

    @classmethod
    def environment(cls) -> Mapping[str, str]:
        # Triton 3.10 changes this default, and warns if it is not set.
        fusion = {"TRITON_DEFAULT_FP_FUSION": "1"}
        return fusion if gpu_count() else {**fusion, "TRITON_INTERPRET": "1"}

    @classmethod
    def missing(cls) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; install moe-conformance[triton]"
        return None

    def __init__(self) -> None:
        import torch
        import triton

        from moe_conformance.kernels.interpreter import make_light
        from moe_conformance.kernels.launch import interpreted

        make_light()
        if not interpreted() and not torch.cuda.is_available():
            raise Unavailable(
                "torch sees no GPU, and kernels are compiled in this process; hide GPUs that torch cannot use "
                "(CUDA_VISIBLE_DEVICES=) or set TRITON_INTERPRET=1 before it starts"
            )
        self._info = EngineInfo(self.name, triton.__version__, "cpu" if interpreted() else "cuda")

    @property
    def info(self) -> EngineInfo:
        return self._info

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        """Every feature of each stage that the kernels have, except those listed in LACKS."""
        offered = {
            stage: frozenset(word for word in words(stage) if is_offered(word)) - LACKS.get(stage, frozenset())
            for stage in HAS
        }
        return offered | {"block": offered["block"] | (frozenset(RECORDS) - NOT_BY_ROW)}

    def route(self, inputs: RouteInputs) -> Routing:
        """inputs on the device of `info`."""
        from moe_conformance.kernels.routing import route

        return route(inputs)

    def router_module(self, spec: RouterSpec) -> RouterHandle:
        from moe_conformance.kernels import routing
        from moe_conformance.reference_impl.router import Router, own_name

        class KernelRouter(Router):
            """The reference's router; its tensors are read, and its routing runs in the kernel, at call time."""

            route = staticmethod(routing.route)

        module = KernelRouter(spec).to(self.info.device)
        return RouterHandle(module, "hidden", {name: own_name(name) for name in spec.tensors()})

    def align(self, inputs: AlignInputs) -> Aligned:
        """inputs on the device of `info`."""
        from moe_conformance.kernels.dispatch import align

        return align(inputs.ids, inputs.experts, inputs.block, inputs.expert_map)

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        """inputs on the device of `info`."""
        from moe_conformance.kernels.experts import experts

        return experts(inputs)

    def shard(self, inputs: ShardInputs) -> Tensor:
        """inputs on the device of `info`."""
        from moe_conformance.kernels.experts import experts
        from moe_conformance.reference_impl.parallel.experts import shard

        return shard(inputs, experts)

    def layer(self, inputs: LayerInputs) -> Tensor:
        """inputs on the device of `info`."""
        from moe_conformance.kernels.layer import moe_layer

        return moe_layer(inputs)

    def block(self, inputs: BlockInputs) -> BlockOutput:
        """inputs on the device of `info`."""
        from moe_conformance.kernels.layer import layer
        from moe_conformance.reference_impl import block as stage

        return stage.block(inputs, layer)

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        from moe_conformance.kernels import capture as kernel
        from moe_conformance.reference_impl.capture import Capturer

        class KernelCapturer(Capturer):
            """The reference's choice of rows and its record of steps; the kernel checks and writes."""

            write = staticmethod(kernel.capture)

        return KernelCapturer(spec, device=self.info.device)
