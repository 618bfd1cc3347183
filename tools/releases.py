#!/usr/bin/env python3
"""Judges releases of vLLM or SGLang side by side: `tools/releases.py --help`. Any Python from 3.11 on may start it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    if not (find_spec("click") and find_spec("moe_conformance")):
        # Again, by the interpreter that the project's own set-up makes.
        subprocess.run(["bash", "-c", "source ci/setup.sh"], cwd=ROOT, check=True)
        own = str(ROOT / ".venv" / "bin" / "python")
        os.execv(own, [own, __file__, *sys.argv[1:]])
    from release_command import main as judge

    judge()


if __name__ == "__main__":
    main()
