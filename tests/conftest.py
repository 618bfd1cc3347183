"""One compute thread a process: thread pools that spin on the same cores make small tensors ten times slower.

Set before anything imports torch; a caller's own setting stands. And helpers of the tests, and tools, are modules by
their name, which importlib mode does not see to.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tools")]
