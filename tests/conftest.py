"""One compute thread a process: thread pools that spin on the same cores make small tensors ten times slower.

Set before anything imports torch; a caller's own setting stands.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
