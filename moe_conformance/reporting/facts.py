"""Where a run happens, found without importing anything heavy."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from moe_conformance.running.devices import gpu_count

PACKAGES = ("torch", "triton", "transformers", "safetensors", "pytest")


def run_facts() -> dict[str, Any]:
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {"python": platform.python_version(), "platform": platform.platform(), "gpus": gpu_count(), **packages}
