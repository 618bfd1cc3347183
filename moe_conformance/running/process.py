"""An engine in a process of its own, so that a crash or a hang costs one case and nothing it sets leaks out."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from moe_conformance.engine import EngineInfo
from moe_conformance.judging.verdict import Verdict
from moe_conformance.running.discovery import Target

# A vLLM process imports and initialises for up to 40 s on two busy cores.
START_SECONDS = 300.0


class EngineProcess:
    """Starts the host process when first needed and again after each loss."""

    def __init__(self, target: Target, case_seconds: float, environment: dict[str, str]) -> None:
        self.target = target
        self.case_seconds = case_seconds
        self.environment = environment
        self.info: EngineInfo | None = None
        self._process: subprocess.Popen[str] | None = None
        self._unavailable: dict[str, Any] | None = None

    def run(self, module: str, function: str, case: str) -> dict[str, Any]:
        """Ask for one check. Returns verdict, message and facts; a lost process is a verdict, not an exception."""
        if self._process is None:
            started = self._start()
            if started is not None:
                return started
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"module": module, "function": function, "case": case}) + "\n")
            self._process.stdin.flush()
        except OSError:
            return self._lost()
        return self._answer(self.case_seconds)

    def _start(self) -> dict[str, Any] | None:
        if self._unavailable is None:
            cls = self.target.load()
            environment: Mapping[str, str] = getattr(cls, "environment", dict)()
            self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, see close()
            # -P: the working directory must not come first on the path; discovery.extend_path appends it.
            # -u: what the engine printed before it died must not die in a buffer.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-m", "moe_conformance.running.host", self.target.name, self.target.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env={**os.environ, **self.environment, **environment},
                start_new_session=True,
            )
            hello = self._answer(START_SECONDS)
            if "name" in hello:
                self.info = EngineInfo(hello["name"], hello["version"], hello["device"])
                return None
            if "unavailable" in hello:
                self.close()
                verdict = Verdict.UNAVAILABLE if hello["is_missing"] else Verdict.ERROR
                self._unavailable = {"verdict": verdict, "message": hello["unavailable"], "facts": None}
            else:
                self._unavailable = {**hello, "message": f"while starting: {hello['message']}"}
        return self._unavailable

    def _answer(self, seconds: float) -> dict[str, Any]:
        """One line from the process, within the time."""
        assert self._process is not None and self._process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                message = f"no answer within {seconds:g} s; the process was killed{self._last_words()}"
                self.close()
                return {"verdict": Verdict.TIMEOUT, "message": message, "facts": None}
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else self._lost()

    def _lost(self) -> dict[str, Any]:
        assert self._process is not None
        code = self._process.wait()
        try:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        except ValueError:
            how = f"exit code {code}"
        message = f"the engine's process died: {how}{self._last_words()}"
        self.close()
        return {"verdict": Verdict.CRASH, "message": message, "facts": None}

    def _last_words(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read()[-8000:].strip().splitlines()
        tail = [line for line in lines if not line.startswith("Extension modules:")][-30:]
        return "; its last words:\n" + "\n".join(f"  {line}" for line in tail) if tail else ""

    def close(self) -> None:
        """End the process and all it started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]
        self._process = None
