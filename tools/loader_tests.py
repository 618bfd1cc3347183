#!/usr/bin/env python3
"""Tests of `checkpoint --vllm` and `--sglang` beside their newest releases: loader_tests.py [vllm] [sglang]."""

from __future__ import annotations

import os
import subprocess
import sys

from release_cache import ROOT, install_project, user_cache
from release_servers import SERVERS

TESTS = "tests/test_checkpoint_traced.py"


def main() -> None:
    failed = [name for name in sys.argv[1:] or SERVERS if not passes(name)]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def passes(name: str) -> bool:
    """Whether the real loader's test ran beside the newest release, and passed."""
    cache = SERVERS[name](user_cache())
    with cache.locked():
        version = cache.released()[-1]
        place = cache.place(version)
        install_project(place.python)
    print(f"{name} {version}: {place.has}", flush=True)
    path = os.pathsep.join(str(folder) for folder in (place.overlay, ROOT / "tests") if folder)
    environment = {**os.environ, "PYTHONPATH": path, **place.environment}
    command = [str(place.python), "-P", "-m", "pytest", "-p", "no:cacheprovider", "-q", TESTS, "-k", f"real and {name}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    return done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout


if __name__ == "__main__":
    main()
