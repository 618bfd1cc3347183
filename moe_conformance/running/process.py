"""An engine in a process of its own, so that a crash or a hang costs one case and nothing it sets leaks out."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import EngineInfo
from moe_conformance.judging.verdict import Outcome, Verdict
from moe_conformance.running.discovery import Target
from moe_conformance.running.messages import Answer, Check, Hello, Message, Probe, Unstartable, decode, encode

# A vLLM process imports and initialises for up to 40 s on two busy cores.
START_SECONDS = 300.0
# How the message begins where a stage's probe ended its process: it stands for every case of the stage.
PROBING = "in the probe of "


class EngineProcess:
    """Starts the host process when first needed and again after each loss, and probes each stage before its first case.

    info: who the engine is, once it has started. raised: None, as exceptions stay in the process.
    """

    raised: BaseException | None = None

    def __init__(self, target: Target, case_seconds: float, environment: dict[str, str]) -> None:
        self.target = target
        self.case_seconds = case_seconds
        self.environment = environment
        self.info: EngineInfo | None = None
        self._process: subprocess.Popen[str] | None = None
        self._unavailable: Outcome | None = None
        self._probed: dict[str, Outcome] = {}
        self._questions = 0

    def run(self, module: str, check: Callable[..., Any], case: Case) -> Outcome:
        """Ask for one check. A lost process is a verdict, not an exception."""
        if case.stage not in self._probed:
            # With the time of a start: a stage's first call may import or compile.
            outcome = self._ask(START_SECONDS, lambda number: Probe(number, case.stage))
            if self._unavailable is not None:
                return outcome
            self._probed[case.stage] = outcome
        probed = self._probed[case.stage]
        if probed.verdict is not Verdict.PASS:
            return probed
        return self._ask(self.case_seconds, lambda number: Check(number, module, check.__name__, case.id))

    def _ask(self, seconds: float, question: Callable[[int], Probe | Check]) -> Outcome:
        """The answer to this question, which is given the next number."""
        if self._process is None and (failed := self._start()) is not None:
            return failed
        assert self._process is not None and self._process.stdin is not None
        self._questions += 1
        asked = question(self._questions)
        try:
            self._process.stdin.write(encode(asked))
            self._process.stdin.flush()
        except OSError:
            return self._lost()
        match self._read(seconds):
            case Outcome() as outcome:
                if isinstance(asked, Probe):
                    return Outcome(outcome.verdict, f"{PROBING}{asked.stage}: {outcome.message}")
                return outcome
            case Answer(number, outcome) if number == asked.number:
                return outcome
            case other:
                return self._wrong_line(f"got {other}, want the answer to question {asked.number}")

    def _start(self) -> Outcome | None:
        """Start the process unless it was tried in vain before; what is wrong, or None."""
        if self._unavailable is None:
            self._launch()
            match self._read(START_SECONDS):
                case Hello(name, version, device):
                    self.info = EngineInfo(name, version, device)
                case Unstartable(reason, is_missing):
                    self.close()
                    self._unavailable = Outcome(Verdict.UNAVAILABLE if is_missing else Verdict.ERROR, reason)
                case Outcome(verdict, message):
                    self._unavailable = Outcome(verdict, f"while starting: {message}")
                case other:
                    self._unavailable = self._wrong_line(f"while starting: got {other}, want who the engine is")
        return self._unavailable

    def _command(self) -> list[str]:
        # -P: the working directory must not come first on the path; discovery.extend_path appends it.
        # -u: what the engine printed before it died must not die in a buffer.
        module = "moe_conformance.running.host"
        return [sys.executable, "-P", "-u", "-m", module, self.target.name, self.target.path]

    def _launch(self) -> None:
        cls = self.target.load()
        environment: Mapping[str, str] = getattr(cls, "environment", dict)()
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, see close()
        self._process = subprocess.Popen(
            self._command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, **self.environment, **environment},
            start_new_session=True,
        )

    def _read(self, seconds: float) -> Message | Outcome:
        """One line from the process within the time, or what became of it instead."""
        assert self._process is not None and self._process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                message = f"no answer within {seconds:g} s; the process was killed{self._last_words()}"
                self.close()
                return Outcome(Verdict.TIMEOUT, message)
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            return self._lost()
        try:
            return decode(line)
        except ValueError as error:
            return self._wrong_line(str(error))

    def _wrong_line(self, message: str) -> Outcome:
        """Nothing that this process says can be relied on any more."""
        self.close()
        return Outcome(Verdict.ERROR, f"the engine's process: {message}; the process was killed")

    def _lost(self) -> Outcome:
        assert self._process is not None
        code = self._process.wait()
        try:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        except ValueError:
            how = f"exit code {code}"
        message = f"the engine's process died: {how}{self._last_words()}"
        self.close()
        return Outcome(Verdict.CRASH, message)

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
