"""A pytest session that judges engines: parametrises checks by engine and case, runs them, gathers results."""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import moe_conformance.suites
from moe_conformance.catalogue import aliases
from moe_conformance.catalogue.aliases import current
from moe_conformance.catalogue.case import TIERS, Case, catalogue, in_tier
from moe_conformance.catalogue.clauses import BUG_CLASSES
from moe_conformance.errors import UsageError
from moe_conformance.judging.goldens import Amber, recorded
from moe_conformance.judging.plain import plain
from moe_conformance.judging.verdict import DIFFERENCE, Outcome, Refusal, Result, Verdict, at_level
from moe_conformance.protocol.stages import STAGES
from moe_conformance.reporting.explain import failure
from moe_conformance.reporting.report import IN_PROCESS
from moe_conformance.running import known
from moe_conformance.running.devices import gpu_count, pinned
from moe_conformance.running.discovery import Target, registered, resolve
from moe_conformance.running.in_process import InProcess, at_the_check, refuse_unless_alone
from moe_conformance.running.process import PROBING, Allowed, EngineProcess
from moe_conformance.running.shards import Shard
from moe_conformance.running.survey import Survey, here, named, surveys

SUITES = Path(moe_conformance.suites.__path__[0]).resolve()
# The property under which results pass from a worker to the controller.
PROPERTY = "moe_conformance"
_SURVEYS = "moe_conformance_surveys"


@dataclass(frozen=True)
class _Answered:
    """told: what the controller is to hear, among the item's properties.

    asked: the answer before goldens and known failures were looked at, outcome: after.
    """

    nodeid: str
    told: list[tuple[str, str]]
    asked: Outcome
    outcome: Outcome


class Session:
    """Registered for sessions that include our suites, on the controller and on every xdist worker."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.is_worker = hasattr(config, "workerinput")
        try:
            self._read_options(config)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from error
        config.option.importmode = "importlib"
        # A run of some engines or cases leaves other snapshots unused; tests/ compare files and catalogue instead.
        config.option.warn_unused_snapshots = True
        # Snapshots are named by case id, which several tests and engines share; syrupy warns about that.
        config.addinivalue_line("filterwarnings", r"ignore:\s*Can not relate snapshot name:UserWarning")
        self.process: EngineProcess | InProcess | None = None
        # The last case judged, which may still kill its engine: target, case, check.
        self.last: tuple[Target, Case, str] | None = None
        # Items of the suites that pytest's options deselected, such as -k.
        self.deselected = 0
        # The outcome of the last item judged.
        self.answered: _Answered | None = None
        # A fault of a whole engine is told once, by the item with this node id, not for each case; the stream has them
        # all.
        self.told: dict[tuple[str, str], str] = {}

    def _read_options(self, config: pytest.Config) -> None:
        classes = current("class", config.getoption("--moe-class"), BUG_CLASSES, aliases.CLASSES)
        wanted = current("case", config.getoption("--moe-case"), catalogue(), aliases.CASES)
        stages = current("stage", config.getoption("--moe-stage"), STAGES)
        (tier,) = current("tier", [config.getoption("--moe-tier")], TIERS)
        self.cases = {
            case.id: case
            for case in catalogue().values()
            if (case.id in wanted if wanted else in_tier(case, tier))
            and (not classes or case.bug_class in classes)
            and (not stages or case.stage in stages)
        }
        # The options of the run as the header has them; shards of one run must agree on them.
        self.selection = {
            "tier": tier,
            "classes": classes,
            "stages": stages,
            "cases": wanted,
            "keyword": config.getoption("keyword"),
            "total": len(self.cases),
        }
        given = config.getoption("--moe-shard")
        self.seed = int(config.getoption("--moe-seed"))
        if self.seed < 0:
            raise UsageError(f"--seed: got {self.seed}, want a whole number from 0, the default seed")
        if self.seed:
            self.selection["seed"] = self.seed
        self.shard = None if given is None else Shard.parse(given)
        if self.shard is not None:
            mine = self.shard.pick(self.cases)
            self.cases = {name: case for name, case in self.cases.items() if name in mine}
        self.strict = bool(config.getoption("--moe-strict"))
        self.allowed = _allowed(config)
        self.in_process = bool(config.getoption("--moe-in-process"))
        self._find_engines(config)
        if self.in_process:
            refuse_unless_alone(config, self.targets)
        chosen, workers = [target.name for target in self.targets], config.getoption("-n", None)
        if config.getoption("update_snapshots", False) and (chosen != ["reference"] or workers):
            raise UsageError(
                f"--snapshot-update: got {', '.join(chosen)} and -n {workers or 0}; goldens are written from the "
                "reference engine in one process: --engine reference -n 0"
            )
        if config.getoption("update_snapshots", False) and self.seed:
            raise UsageError(
                f"--snapshot-update: got --seed {self.seed}; goldens are of the default seed: leave it out"
            )
        files = [*map(Path, config.getoption("--moe-known")), *config.getini("moe_known")]
        self.known = known.read_all(files)
        names = sorted({*chosen, *registered()})
        current("known failures: engine", self.known, names)

    def _find_engines(self, config: pytest.Config) -> None:
        """Which engines are judged and what each says of itself. away: why the other registered ones are not."""
        names = config.getoption("--moe-engine")
        asked = list(dict.fromkeys(map(resolve, names))) if names else list(registered().values())
        self.is_chosen, self.away = bool(names), {}
        if self.is_worker:
            found = list(map(Survey.decode, json.loads(config.workerinput[_SURVEYS])))  # type: ignore[attr-defined]
        else:
            found = list(map(here, asked)) if self.in_process else surveys(asked)
        self._found = found
        if not names:
            self.away = {target.name: survey.why for target, survey in zip(asked, found, strict=True) if survey.why}
            present = [pair for pair in zip(asked, found, strict=True) if not pair[1].why]
            asked, found = [target for target, _ in present], [survey for _, survey in present]
        self.surveys = named(asked, found)
        self.targets = list(self.surveys)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Workers get the surveys from the controller, so they ask no adapter again."""
        node.workerinput[_SURVEYS] = json.dumps([survey.encode() for survey in self._found])

    def pytest_report_header(self) -> str | None:
        return IN_PROCESS if self.in_process else None

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Generator[None, object, object]:
        was_enabled = gc.isenabled()
        gc.disable()  # the suites import torch: see host.py
        try:
            return (yield)
        finally:
            if was_enabled:
                gc.enable()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        listed: tuple[Case, ...] | None = getattr(metafunc.function, "moe_cases", None)
        if listed is None:
            return
        selected = [case for case in listed if case.id in self.cases]
        pairs: dict[str, tuple[Target, tuple[Case, ...]]] = {}
        for target in self.targets:
            offered = {stage for stage in {case.stage for case in selected} if self._offers(target, stage)}
            pairs |= {f"{target.name}-{case.id}": (target, (case,)) for case in selected if case.stage in offered}
            # One item for all stages that the adapter has no method for: items cost milliseconds, and these are many.
            if others := tuple(case for case in selected if case.stage not in offered):
                pairs[f"{target.name}-not-offered"] = (target, others)
        metafunc.parametrize(("engine", "case"), pairs.values(), ids=pairs)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Drop checks without a selected case, and sort by engine, so that each process starts once."""
        items[:] = [item for item in items if not _is_empty(item)]
        order = {target.name: number for number, target in enumerate(self.targets)}
        items.sort(key=lambda item: order.get(engine_of(item), -1))

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        if not hasattr(pyfuncitem.function, "moe_cases"):
            return None
        __tracebackhide__ = True
        params: Mapping[str, Any] = pyfuncitem.callspec.params
        target: Target = params["engine"]
        cases: tuple[Case, ...] = params["case"]
        # If a plug-in runs an item again, the item still has its earlier answer.
        pyfuncitem.user_properties[:] = [told for told in pyfuncitem.user_properties if told[0] != PROPERTY]
        if not self._offers(target, cases[0].stage):
            said = f"stage {cases[0].stage} is not offered"
            for case in cases:
                away = Outcome(Verdict.UNSUPPORTED, f"stage {case.stage} is not offered", refusal=Refusal.STAGE)
                pyfuncitem.user_properties.append(self._told(self._result(target, case, _check(pyfuncitem), away)))
            pytest.skip(f"unsupported: {said}")
        (case,) = cases
        # If a plug-in runs an item again, it gets the first answer: an engine is not asked until it happens to be
        # right.
        if self.answered is None or self.answered.nodeid != pyfuncitem.nodeid:
            self.answered = self._judge(pyfuncitem, target, case)
        pyfuncitem.user_properties += self.answered.told
        asked, outcome = self.answered.asked, self.answered.outcome
        is_of_many = asked.verdict in (Verdict.UNAVAILABLE, Verdict.ERROR) or asked.message.startswith(PROBING)
        if is_of_many and outcome.verdict.is_bad:
            told_by = self.told.setdefault((target.name, asked.message), pyfuncitem.nodeid)
            if told_by != pyfuncitem.nodeid:
                pytest.skip(f"{asked.verdict}, as told before")
        match outcome.verdict:
            case Verdict.UNSUPPORTED | Verdict.ABSENT:
                pytest.skip(f"{outcome.verdict}: {outcome.message}")
            case Verdict.KNOWN_FAILURE:
                pytest.xfail(f"known failure: {outcome.message}")
            case Verdict.BROKEN_SHOULD if not self.strict:
                pytest.xfail(f"broken SHOULD: {outcome.message}")
            case Verdict.PASS:
                return True
        said = f"{outcome.verdict}: {target.name} on {case.id}: {outcome.message}"
        assert self.process is not None
        if self.process.raised is not None:
            self.process.raised.add_note(said)
            raise at_the_check(self.process.raised)
        pytest.fail(said, pytrace=False)

    def _judge(self, item: pytest.Function, target: Target, case: Case) -> _Answered:
        later = self.look_back()
        started = time.perf_counter()
        asked = self._ask(target, item, case)
        asked = replace(asked, message=plain(asked.message))
        outcome = self._finally(target, item, case, asked)
        self.last = target, case, _check(item)
        result = self._result(*self.last, outcome, time.perf_counter() - started)
        told = [self._told(each) for each in (later, result) if each is not None]
        return _Answered(item.nodeid, told, asked, outcome)

    def _offers(self, target: Target, stage: str) -> bool:
        """Whether to ask the engine's process; one that cannot start must say why itself."""
        survey = self.surveys[target]
        return stage in survey.stages or survey.outcome is not None

    def _ask(self, target: Target, item: pytest.Function, case: Case) -> Outcome:
        if self.process is None or self.process.target != target:
            self.pytest_unconfigure()
            survey = self.surveys[target]
            if self.in_process:
                self.process = InProcess(target, survey, _shares(), self.seed)
            else:
                self.process = EngineProcess(target, survey, self.allowed, _shares(), self.seed)
        # By name from the suites' folder: pytest's own module name differs between checkout and wheel.
        parts = item.path.resolve().relative_to(SUITES).with_suffix("").parts
        return self.process.run(".".join(("moe_conformance.suites", *parts)), item.obj, case)

    def _finally(self, target: Target, item: pytest.Function, case: Case, outcome: Outcome) -> Outcome:
        """The outcome after goldens and known failures, with everything its reader needs."""
        if outcome.verdict is Verdict.PASS and outcome.facts is not None:
            outcome = _against_golden(item, case, outcome)
        outcome = at_level(outcome, case.level)
        outcome = self._known(target, case, _check(item), outcome)
        if outcome.verdict.badness:
            return replace(outcome, message=self._failure(target, case, _check(item), outcome.message))
        return outcome

    def _result(self, target: Target, case: Case, check: str, outcome: Outcome, took: float = 0.0) -> Result:
        return Result(
            engine=target.name,
            case=case.id,
            check=check,
            bug_class=case.bug_class,
            stage=case.stage,
            verdict=outcome.verdict,
            message=outcome.message,
            seconds=took,
            level=case.level,
            refusal=outcome.refusal,
        )

    def look_back(self) -> Result | None:
        """If the engine's process died after its last answer, that is a further result of that case."""
        later = self.process.after_the_last() if self.process is not None else None
        if later is None or self.last is None:
            return None
        later = replace(later, message=plain(later.message))
        target, case, check = self.last
        return self._result(
            target, case, check, replace(later, message=self._failure(target, case, check, later.message))
        )

    def _failure(self, target: Target, case: Case, check: str, message: str) -> str:
        return failure(target.asked_as, case, check, message, self.seed)

    def _told(self, result: Result) -> tuple[str, str]:
        """A result as it passes to the controller, as a property of the item."""
        info = self.process.info if self.process and self.process.target.name == result.engine else None
        facts = {"version": plain(info.version), "device": plain(info.device)} if info else {}
        return PROPERTY, json.dumps([result.as_line(), facts])

    def _known(self, target: Target, case: Case, check: str, outcome: Outcome) -> Outcome:
        failures = self.known.get(target.name)
        info = self.process.info if self.process else None
        entry = failures.find(case.id, check, info) if failures and info else None
        # A broken adapter was not judged, so it did not fail as declared.
        is_adapters = outcome.verdict is Verdict.ERROR or outcome.message.startswith(PROBING)
        if entry is None or is_adapters or not outcome.verdict.was_judged:
            return outcome
        about = f"listed as {entry.kind}, {entry.issue}" + (f": {entry.reason}" if entry.reason else "")
        if outcome.verdict is Verdict.PASS:
            said = f"it passes, but is {about}; take the entry out of the file"
            return Outcome(Verdict.UNEXPECTED_PASS, said)
        return Outcome(Verdict.KNOWN_FAILURE, f"{about}\n{outcome.verdict}: {outcome.message}")

    def pytest_unconfigure(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected += sum(bool(engine_of(item)) for item in items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        if self.is_worker:
            later = self.look_back()
            lines = [] if later is None else [later.as_line()]
            self.config.workeroutput[PROPERTY] = (lines, self.deselected)  # type: ignore[attr-defined]

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        if config.getoption("dist") != "loadscope":
            return None
        from moe_conformance.running.scheduler import OneEngineAWorker

        return OneEngineAWorker(config, log, [target.name for target in self.targets])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_auto_num_workers(self) -> int | None:
        """One worker a GPU; without a GPU xdist's own answer, one a core."""
        return gpu_count() or None


def _check(item: pytest.Function) -> str:
    return item.originalname.removeprefix("test_")


def engine_of(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    target = callspec.params.get("engine") if callspec else None
    return target.name if isinstance(target, Target) else ""


def _is_empty(item: pytest.Item) -> bool:
    """Whether pytest made this item only as a placeholder: the check has no case in this run."""
    return hasattr(getattr(item, "function", None), "moe_cases") and not engine_of(item)


def _allowed(config: pytest.Config) -> Allowed:
    """The limits from the options; memory is four fifths of the machine's by default.

    Raises UsageError for an invalid amount.
    """
    seconds, whole, gib = (config.getoption(f"--moe-{name}") for name in ("timeout", "engine-timeout", "memory"))
    for name, amount in (("timeout", seconds), ("engine-timeout", whole), ("memory", gib)):
        if amount is not None and not 0 < amount < math.inf:
            raise UsageError(f"--{name}: got {amount}, want a number above 0")
    memory = gib * 2**30 if gib else 0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Allowed(seconds, whole or math.inf, memory)


def _shares() -> dict[str, str]:
    """The engine process's part of the machine: its GPU, and one compute thread.

    Thread pools of several workers that spin on the same cores made small cases ten times slower when measured; a
    caller's own OMP_NUM_THREADS stands.
    """
    threads = {} if os.environ.get("OMP_NUM_THREADS") else {"OMP_NUM_THREADS": "1"}
    return {**threads, **pinned(os.environ.get("PYTEST_XDIST_WORKER", "gw0"))}


def _against_golden(item: pytest.Function, case: Case, outcome: Outcome) -> Outcome:
    """A pass becomes a fail if its facts differ from the golden."""
    snapshot = item._request.getfixturevalue("snapshot").use_extension(Amber.at(case.bug_class, _check(item)))
    if snapshot(name=case.id) == outcome.facts:
        return outcome
    if case.id not in recorded(case.bug_class, _check(item)):
        said = f"no golden of {case.id} for {_check(item)}, want one: install the package anew"
        return Outcome(Verdict.ERROR, f"{said}, or write it from the reference with --snapshot-update")
    difference = "\n".join(line.rstrip() for line in snapshot.get_assert_diff())
    return Outcome(Verdict.FAIL, plain(f"{DIFFERENCE}\n{difference}"))
