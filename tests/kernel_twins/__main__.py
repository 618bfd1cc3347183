"""Kernels against the reference functions they are twins of: `python tests/kernel_twins DEVICE GROUP...`.

DEVICE: cpu or cuda. GROUP: routing for twins_routing.py, and so on; none is all. A program and no test module, so that
one process can interpret (TRITON_INTERPRET=1) and another compile. Every public function of a group that takes a device
is a check. Prints a JSON object: the name of each check, and what it raised or null.

Interpreted, programs of a grid run last to first, and an access outside the tensors of its launch raises.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # PYTHONSAFEPATH leaves it out


def checks_of(group: str) -> dict[str, Callable[[str], None]]:
    found = vars(import_module(f"twins_{group}")).items()
    return {
        name: check
        for name, check in found
        if inspect.isfunction(check)
        and not name.startswith("_")
        and [*inspect.signature(check).parameters] == ["device"]
    }


def main(device: str, groups: list[str]) -> None:
    outcome: dict[str, str | None] = {}
    torch.set_grad_enabled(False)
    with contextlib.ExitStack() as inside:
        if device == "cpu":
            from bounds import checked

            from moe_conformance.kernels.interpreter import make_light

            make_light(check_overflow=True)
            inside.enter_context(checked(backwards=True))
        for group in groups or sorted(path.stem.removeprefix("twins_") for path in HERE.glob("twins_*.py")):
            for name, check in checks_of(group).items():
                try:
                    check(device)
                    outcome[name] = None
                except Exception:
                    outcome[name] = traceback.format_exc()
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
