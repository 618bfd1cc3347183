"""What this machine's GPU is, and what the steps of tools/gpu_job.py can use of it: facts.json.

"lacks" lists what a step may need and does not find here, with the reason; a missing GPU is listed there, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sysconfig
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moe_conformance.engines.transformers import Transformers
from moe_conformance.engines.triton import Triton

# Memory in use before this process has a context: more than this is somebody else's work, which would be timed, too.
BUSY = 2**30
# Of the context of this process, where the driver's tool was not there to be asked before.
CONTEXT = 2**30
QUERY = ("driver_version", "memory.used", "utilization.gpu", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")


def facts() -> dict[str, Any]:
    """name, memory and free in bytes, versions, what the driver says, and lacks.

    compiler, headers: of C and of Python, with which Triton 3.6 builds a launcher for each kernel.
    """
    packages = ("torch", "triton", "transformers", "numpy", "vllm")
    found: dict[str, Any] = {
        "name": "no GPU",
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()} | {package: version_of(package) for package in packages},
        "driver": from_driver(),
        "compiler": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        "headers": (Path(sysconfig.get_path("include")) / "Python.h").exists(),
        "lacks": {},
    }
    lacks: dict[str, str] = found["lacks"]
    for engine in (Triton, Transformers):
        if reason := engine.missing():
            lacks[engine.name] = reason
    reason = on_the_gpu(found)
    if reason:
        lacks["gpu"] = reason
    elif found["used"] > BUSY:
        lacks["idle"] = f"the GPU is busy: {found['used'] / 2**30:.1f} GiB in use by others"
    return found


def on_the_gpu(found: dict[str, Any]) -> str | None:
    """Add what torch says of it; why it cannot be used, or None."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        return "; ".join(["torch sees no GPU", *(str(warning.message).splitlines()[0] for warning in said)])
    try:
        properties = torch.cuda.get_device_properties(0)
        free, memory = torch.cuda.mem_get_info()
        used = found["driver"].get("memory.used", "")
        found |= {
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability()),
            "vendor": "AMD" if torch.version.hip else "NVIDIA",
            "processors": properties.multi_processor_count,
            "cache": properties.L2_cache_size,
            "memory": memory,
            "free": free,
            "used": int(used) * 2**20 if used.isdigit() else max(0, memory - free - CONTEXT),
        }
        if int(torch.arange(5, device="cuda").sum()) != 10:
            return "the GPU computes 0 + 1 + 2 + 3 + 4 wrongly"
    except RuntimeError as error:
        return f"the GPU does not work: {str(error).splitlines()[0]}"
    return None


def from_driver() -> dict[str, str]:
    """Asked before this process has a context; empty without the driver's tool."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits", f"--id={visible}"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(QUERY, (value.strip() for value in text.splitlines()[0].split(",")), strict=False)) if text else {}


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for facts.json")
    out = parser.parse_args().out
    found = facts()
    out.mkdir(parents=True, exist_ok=True)
    (out / "facts.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
