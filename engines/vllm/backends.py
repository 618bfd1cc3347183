"""vLLM's expert kernels for GPUs, each an engine of its own: those that its `--moe-backend` names.

On a GPU the engine `vllm` judges what vLLM selects for that device; these judge the others that it would take.
"""

from __future__ import annotations

from collections.abc import Mapping

from moe_conformance.engines.vllm import VLLM, device

STAGES = ("experts", "layer", "block", "shard")


class _Backend(VLLM):
    """One value of `--moe-backend`; what it does not take is unsupported, in vLLM's words."""

    backend = ""
    kernels = ("native",)
    platforms = ("native",)

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


class FlashInferTRTLLM(_Backend):
    name = "vllm-flashinfer-trtllm"
    backend = "flashinfer_trtllm"


class FlashInferCUTLASS(_Backend):
    name = "vllm-flashinfer-cutlass"
    backend = "flashinfer_cutlass"


class AITER(_Backend):
    name = "vllm-aiter"
    backend = "aiter"
