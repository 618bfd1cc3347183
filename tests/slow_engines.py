"""An engine whose class takes its time to say why it cannot start."""

from __future__ import annotations

import time


class Slow:
    name = "slow"

    @classmethod
    def missing(cls) -> str:
        asked = time.time()
        time.sleep(1.2)
        return f"asked at {asked}"
