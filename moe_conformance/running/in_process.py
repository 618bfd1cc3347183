"""An engine in pytest's own process, for debuggers, profilers and coverage: --moe-in-process.

The one exception to "one process an engine". A crash ends the run, a hang needs Ctrl-C, and the engine's environment
variables are set only after pytest's imports.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import moe_conformance.judging
from moe_conformance.catalogue.case import Case
from moe_conformance.engine import EngineInfo
from moe_conformance.errors import MoEConformanceError, Unavailable, UsageError
from moe_conformance.judging.verdict import Outcome, Verdict
from moe_conformance.running.discovery import Target, extend_path
from moe_conformance.running.survey import Survey

_JUDGING = Path(moe_conformance.judging.__path__[0])


def refuse_unless_alone(config: Any, targets: list[Target]) -> None:
    """Raise UsageError if the run needs more than one process."""
    if (value := os.environ.get("CI", "")).lower() not in ("", "0", "false"):
        raise UsageError(
            f"--in-process: got CI={value!r} in the environment, want a person at a debugger: a crash of the engine "
            "would end the run with no verdict; leave the option out, or unset CI"
        )
    workers = config.getoption("numprocesses", None)
    if workers or hasattr(config, "workerinput"):
        raise UsageError(f"--in-process: got -n {workers}, want -n 0, for a debugger cannot reach xdist's workers")
    if len(targets) != 1:
        names = ", ".join(target.name for target in targets)
        raise UsageError(f"--in-process: got the engines {names or 'none'}, want one: --engine NAME")


class InProcess:
    """The interface of `EngineProcess` without the process. raised: the exception behind the last outcome."""

    def __init__(self, target: Target, survey: Survey, environment: dict[str, str], seed: int = 0) -> None:
        self.target = target
        self.seed = seed
        self.survey = survey
        self.info: EngineInfo | None = None
        self.raised: BaseException | None = None
        self._judge: Any = None
        self._unavailable: Outcome | None = None
        self._probed: dict[str, Outcome] = {}
        self._environment = environment

    def run(self, module: str, check: Callable[..., Any], case: Case) -> Outcome:
        """Run one check. The function itself is called, not one imported again, so that pytest's --trace works."""
        if self._judge is None and self._unavailable is None:
            self._unavailable = self._start()
        if self._unavailable is not None:
            return self._unavailable
        if case.stage not in self._probed:
            self._probed[case.stage] = self._judge.probe(case.stage)
        probed = self._probed[case.stage]
        outcome: Outcome = self._judge.judge(check, case) if probed.verdict is Verdict.PASS else probed
        self.raised = self._judge.raised
        return outcome

    def _start(self) -> Outcome | None:
        if self.survey.outcome is not None:
            return self.survey.outcome
        os.environ.update({**self._environment, **self.survey.environment})
        extend_path()
        try:
            from moe_conformance.judging.judge import Judge

            self._judge = Judge(self.target, self.seed)
        except (MoEConformanceError, ImportError) as error:
            return Outcome(Verdict.UNAVAILABLE if isinstance(error, Unavailable) else Verdict.ERROR, str(error))
        self.info = self._judge.engine.info
        return None

    def after_the_last(self) -> Outcome | None:
        """Nothing: the process is this one."""
        return None

    def close(self) -> None:
        """Nothing to end: the process is pytest's."""


def at_the_check(error: BaseException) -> BaseException:
    """The exception with a traceback that ends where a check, an adapter or an engine raised it.

    A debugger stops in the last frame, which would otherwise be inside a comparison, for every check.
    """
    steps: list[TracebackType] = []
    step = error.__traceback__
    while step is not None:
        steps.append(step)
        step = step.tb_next
    while steps and _JUDGING in Path(steps[-1].tb_frame.f_code.co_filename).parents:
        steps.pop()
    while steps and _JUDGING in Path(steps[0].tb_frame.f_code.co_filename).parents:
        steps.pop(0)
    rebuilt: TracebackType | None = None
    for step in reversed(steps):
        rebuilt = TracebackType(rebuilt, step.tb_frame, step.tb_lasti, step.tb_lineno)
    return error.with_traceback(rebuilt or error.__traceback__)
