"""An engine in a process of its own, so that a crash or a hang costs one case and nothing it sets leaks out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import EngineInfo
from moe_conformance.judging.verdict import Outcome, Verdict
from moe_conformance.running.child import LARGEST, Child, Ended, Hungry, Silent, TooLong, Unstarted, python
from moe_conformance.running.discovery import Target
from moe_conformance.running.messages import Answer, Check, Hello, Message, Probe, Unstartable, decode, encode
from moe_conformance.running.survey import Survey

# A vLLM process imports and initialises for up to 40 s on two busy cores.
START_SECONDS = 300.0
# Seconds that a process may take to end after it closed its pipes.
SOON = 2.0
# Start of the message if a stage's probe ended the process; every case of the stage gets it.
PROBING = "in the probe of "


@dataclass(frozen=True)
class Allowed:
    """What an engine may take: seconds for a case, and for all of them in one pytest worker; resident bytes."""

    case_seconds: float
    engine_seconds: float = math.inf
    memory: float = math.inf


class EngineProcess:
    """Starts the host process when first needed and after each loss, and probes each stage before its first case.

    survey: what the adapter's class said. environment: of the process, beside what the survey says. info: who the
    engine is, once it has started. raised: None, as exceptions stay in the process.
    """

    raised: BaseException | None = None

    def __init__(
        self, target: Target, survey: Survey, allowed: Allowed, environment: dict[str, str], seed: int = 0
    ) -> None:
        self.target = target
        self.seed = seed
        self.allowed = allowed
        self._spent = 0.0
        self.environment = {**environment, **survey.environment}
        self.info: EngineInfo | None = None
        self._child: Child | None = None
        self._unavailable = survey.outcome
        self._probed: dict[str, Outcome] = {}
        self._questions = 0

    def run(self, module: str, check: Callable[..., Any], case: Case) -> Outcome:
        """Ask for one check. A lost process is a verdict, not an exception."""
        try:
            return self._run(module, check, case)
        except Unstarted as error:
            return Outcome(Verdict.ERROR, str(error))

    def _run(self, module: str, check: Callable[..., Any], case: Case) -> Outcome:
        if self._spent > self.allowed.engine_seconds:
            self.close()
            said = f"the {self.allowed.engine_seconds:g} s were over that the whole engine has, in each pytest worker"
            return Outcome(Verdict.TIMEOUT, said)
        if case.stage not in self._probed:
            # Plus the time of a start: a stage's first call may import or compile.
            outcome = self._ask(START_SECONDS, lambda number: Probe(number, case.stage))
            if self._unavailable is not None:
                return outcome
            self._probed[case.stage] = outcome
        probed = self._probed[case.stage]
        if probed.verdict is not Verdict.PASS:
            return probed
        return self._ask(self.allowed.case_seconds, lambda number: Check(number, module, check.__name__, case.id))

    def after_the_last(self) -> Outcome | None:
        """What became of the process after its last answer, an outcome of that case; None while all is well.

        It is started anew for the next.
        """
        if self._child is None:
            return None
        if self._child.has_ended():
            return self._lost("after its answer ")
        if said := self._child.unasked():
            return self._wrong(f"after its answer got {said[:200]!r}, which nobody had asked for")
        return None

    def _ask(self, seconds: float, question: Callable[[int], Probe | Check]) -> Outcome:
        """The answer to this question, which is given the next number."""
        started = time.monotonic()
        try:
            return self._answer(seconds, question)
        except (
            BaseException
        ):  # such as another plug-in's timeout: the late answer would be taken for the next question's
            self.close()
            raise
        finally:
            self._spent += time.monotonic() - started

    def _answer(self, seconds: float, question: Callable[[int], Probe | Check]) -> Outcome:
        if self._child is None and (failed := self._start()) is not None:
            return failed
        assert self._child is not None
        self._questions += 1
        asked = question(self._questions)
        try:
            self._child.say(encode(asked))
            said = self._hear(seconds)
        except Ended:
            said = self._lost()
        match said:
            case Outcome() as outcome:
                if isinstance(asked, Probe):
                    return Outcome(outcome.verdict, f"{PROBING}{asked.stage}: {outcome.message}")
                return outcome
            case Answer(number, outcome) if number == asked.number:
                return outcome
            case other:
                return self._wrong(f"got {other}, want the answer to question {asked.number}")

    def _start(self) -> Outcome | None:
        """Start the process unless that failed before. Returns what is wrong, or None."""
        if self._unavailable is None:
            self._child = Child(self._command(), self.environment, self.allowed.memory)
            match self._hear(START_SECONDS):
                case Hello(name, version, device):
                    self.info = EngineInfo(name, version, device)
                case Unstartable(reason, is_missing):
                    self.close()
                    self._unavailable = Outcome(Verdict.UNAVAILABLE if is_missing else Verdict.ERROR, reason)
                case Outcome(verdict, message):
                    self._unavailable = Outcome(verdict, f"while starting: {message}")
                case other:
                    self._unavailable = self._wrong(f"while starting: got {other}, want who the engine is")
        return self._unavailable

    def _command(self) -> list[str]:
        return python("moe_conformance.running.host", self.target.name, self.target.path, str(self.seed))

    def _hear(self, seconds: float) -> Message | Outcome:
        """One message from the process within the time, or the outcome of what happened instead."""
        assert self._child is not None
        try:
            return decode(self._child.hear(seconds))
        except Ended:
            return self._lost()
        except Silent:
            self._child.where_it_is()
            message = f"no answer within {seconds:g} s; the process was killed{self._child.last_words()}"
            self.close()
            return Outcome(Verdict.TIMEOUT, message)
        except Hungry as size:
            message = f"the engine's process had {size} of memory, and was killed{self._child.last_words()}"
            self.close()
            return Outcome(Verdict.CRASH, message)
        except TooLong:
            return self._wrong(f"got a line of more than {LARGEST} bytes, want an answer")
        except ValueError as error:
            return self._wrong(str(error))

    def _wrong(self, message: str) -> Outcome:
        """The outcome if nothing this process says can be trusted any more."""
        self.close()
        return Outcome(Verdict.ERROR, f"the engine's process: {message}; the process was killed")

    def _lost(self, when: str = "") -> Outcome:
        assert self._child is not None
        if not self._child.has_ended(SOON):
            return self._wrong(f"{when}it closed what it answers through")
        message = f"{when}the engine's process died: {self._child.ending()}{self._child.last_words()}"
        self.close()
        return Outcome(Verdict.CRASH, message)

    def close(self) -> None:
        """End the process and all it started. Nothing more is asked of it, even if a Ctrl-C comes meanwhile."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
