"""An engine's own code, apart from its adapter in fake_engines.py: it calls back what it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def align(ids: Any, callback: Callable[[str], int]) -> Any:
    return callback("unknown")
