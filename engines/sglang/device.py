"""Where SGLang computes: on a GPU where torch has CUDA and one is here, else on the CPU."""

from __future__ import annotations

from moe_conformance.running.devices import gpu_count


def interprets() -> bool:
    """Whether Triton's kernels are interpreted. Imports neither torch nor SGLang."""
    return not gpu_count()


def is_cpu() -> bool:
    from sglang.srt.utils import is_cuda

    return not is_cuda()


def kind() -> str:
    return "cpu" if is_cpu() else "cuda"
