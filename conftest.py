"""Keeps the checkout's own folder off the import path: its `kernels` must not shadow Hugging Face's package."""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).parent.resolve()
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]
