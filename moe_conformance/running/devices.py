"""GPUs, counted without importing torch or creating a context."""

from __future__ import annotations

import os
import re
from pathlib import Path

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def gpu_count() -> int:
    """GPUs that this process may use: as the visibility variable lists them, else as the driver's device files do."""
    for variable in _VISIBLE:
        if variable in os.environ:
            return len([part for part in os.environ[variable].split(",") if part.strip() not in ("", "-1")])
    nvidia = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return len(nvidia) or len(list(Path("/dev/dri").glob("renderD*"))) * Path("/dev/kfd").exists()


def pinned(worker: str) -> dict[str, str]:
    """The variables that give an xdist worker ("gw3") its own GPU; empty without one."""
    count = gpu_count()
    if not count:
        return {}
    variable = next((name for name in _VISIBLE if name in os.environ), _VISIBLE[0])
    visible = os.environ.get(variable, ",".join(map(str, range(count)))).split(",")
    return {variable: visible[int(re.sub(r"\D", "", worker) or 0) % count]}
