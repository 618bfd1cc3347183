"""vLLM's expert kernels for GPUs, each an engine of its own: those that its `--moe-backend` names.

On a GPU the engine `vllm` judges what vLLM selects for that device; these judge the others that it would take. One of
them is Triton alone, and interpreted on a CPU: the experts that take rows sorted by expert, as an exchange between
ranks leaves them. In one process vLLM sorts them itself, on an XPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moe_conformance.engines.vllm import VLLM, VLLMTriton, device
from moe_conformance.errors import Unsupported

if TYPE_CHECKING:
    from moe_conformance.engines.vllm.built import Kernel
    from moe_conformance.engines.vllm.routing import Platform

STAGES = ("experts", "layer", "block", "shard")


class _Backend(VLLM):
    """One value of `--moe-backend`; what it does not take is unsupported, in vLLM's words."""

    backend = ""
    kernels: tuple[Kernel, ...] = ("native",)
    platforms: tuple[Platform, ...] = ("native",)

    @classmethod
    def environment(cls) -> Mapping[str, str]:
        return {**super().environment(), device.BACKEND: cls.backend}

    @classmethod
    def missing(cls) -> str | None:
        return super().missing() or (
            f"vLLM's {cls.backend} is compiled for GPUs, and its build here computes on a CPU"
            if device.interprets()
            else None
        )

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        return {stage: words for stage, words in super().capabilities().items() if stage in STAGES}

    def _want(self, stage: str) -> None:
        if stage not in self.capabilities():
            raise Unsupported(f"{stage}: judged with the engine vllm")
        super()._want(stage)


class BatchedTriton(_Backend):
    name = "vllm-batched-triton"
    backend = "batched_triton"
    kernels = ("batched_triton",)
    platforms = ("gpu", "rocm")

    @classmethod
    def missing(cls) -> str | None:
        return VLLMTriton.missing() or (
            None if device.interprets() else "vLLM's batched_triton wants ranks that exchange tokens on such a GPU"
        )

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        """Not "expert_map": its ranks hold runs of experts, and are told their number."""
        offered = super().capabilities()
        return {stage: offered[stage] - {"expert_map"} for stage in ("experts",) if stage in offered}


class FlashInferTRTLLM(_Backend):
    name = "vllm-flashinfer-trtllm"
    backend = "flashinfer_trtllm"


class FlashInferCUTLASS(_Backend):
    name = "vllm-flashinfer-cutlass"
    backend = "flashinfer_cutlass"


class AITER(_Backend):
    name = "vllm-aiter"
    backend = "aiter"
