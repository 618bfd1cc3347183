"""The command: record in the engine's process, run what was written, with the calls before it where it takes those."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from moe_conformance.catalogue.aliases import CASES, current
from moe_conformance.catalogue.case import catalogue
from moe_conformance.errors import UsageError
from moe_conformance.running.child import python
from moe_conformance.running.discovery import resolve
from moe_conformance.running.survey import surveys

# An engine may take as long to start as in a run, and compile.
SECONDS = 600.0
NOT_SHOWN = 3


def write(engine: str, case: str, seed: int, file: Path) -> str:
    """Write the script, and return what it says when it is run. Raises UsageError where nothing can be shown."""
    (case,) = current("case", [case], catalogue(), CASES)
    target = resolve(engine)
    (survey,) = surveys([target])
    if why := survey.why:
        raise UsageError(f"--engine: {why}")
    environment = {**os.environ, **survey.environment}
    own = json.dumps(survey.environment)
    for earlier in ("0", "1"):
        command = python(
            "moe_conformance.repro.record", target.name, target.path, case, str(seed), str(file), own, earlier
        )
        file.unlink(missing_ok=True)
        recorded = _run(command, environment)
        if recorded.returncode == NOT_SHOWN:
            raise UsageError(f"repro: {case} on {engine}: {recorded.stdout.strip()}")
        if not file.exists():
            raise UsageError(f"repro: {case} on {engine}: the engine's process ended {_said(recorded)}")
        done = _run([sys.executable, str(file)], environment)
        if done.returncode:
            return _said(done)
    file.unlink()
    raise UsageError(f"repro: {case} on {engine}: the fault is not there when its calls are made by themselves")


def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"repro: got no end within {SECONDS:g} s") from error


def _said(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"by {signal.Signals(-done.returncode).name}"
    return "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
