"""Judging one engine in the current process: build it, probe its stages, run checks, give verdicts."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor

import moe_conformance
from moe_conformance.catalogue.case import Case
from moe_conformance.engine import PROTOCOL_VERSION, STAGES, Engine, EngineInfo, Limits
from moe_conformance.errors import (
    Absent,
    BeyondLimits,
    Broken,
    Nonconformance,
    Unavailable,
    Undecided,
    Unjudged,
    Unsupported,
    UsageError,
)
from moe_conformance.judging.answers import assert_formed
from moe_conformance.judging.draws import ATTEMPTS, Draw, drawing
from moe_conformance.judging.probe import probe
from moe_conformance.judging.state import kept
from moe_conformance.judging.verdict import Outcome, Refusal, Verdict
from moe_conformance.protocol import features, limits
from moe_conformance.protocol.engine import is_called_by_engine, is_signature_of_marked
from moe_conformance.running.discovery import Target

# Inputs up to this many elements are compared byte for byte after a call; larger ones by torch's version counter,
# which notices torch's own in-place operations but not a kernel that writes through a pointer.
_COPIED = 1 << 20
# Characters that are kept of what an adapter's `ran()` says.
_MOST_WORDS = 200


# Parts of this package that adapters, suites and the reference call; frames in them are not the engine's.
_FOR_ALL = tuple(
    Path(moe_conformance.__file__).parent / part
    for part in ("catalogue", "engine.py", "judging", "model", "oracle", "protocol", "running")
)


class Judged:
    """An engine as checks see it.

    A stage it lacks, and a call beyond its limits, raise Unsupported; a call that writes into its inputs, or answers
    with what is of other types than the protocol's, fails.
    raw: the adapter itself, for tracing, where the guard would be traced too; ask `within` first.
    """

    def __init__(self, raw: Any, path: str) -> None:
        self.raw = raw
        self.path = path
        self.info: EngineInfo = raw.info
        self.limits: Mapping[str, Limits] = getattr(raw, "limits", dict)()

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        offered: Mapping[str, frozenset[str]] = self.raw.capabilities()
        return offered

    def within(self, stage: str, inputs: Any) -> None:
        """Raise BeyondLimits if the stage does not take inputs of this size or dtype."""
        if stage in self.limits and (problem := self.limits[stage].exceeded(limits.extent_of(inputs))):
            raise BeyondLimits(f"{stage}: limits: {problem}")

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.raw, name, None)
        if method is None:
            raise Unsupported(f"{name}: the adapter has no method of this name")
        if name not in (*STAGES, "capture_reader"):
            return method

        def guarded(*args: Any) -> Any:
            if args:
                self.within(name, args[0])
            before = [(where, tensor, tensor._version, _copy(tensor)) for where, tensor in _tensors(args, name)]
            with kept():
                result = method(*args)
            for where, tensor, version, copy in before:
                if tensor._version != version or (copy is not None and not _same_bytes(tensor, copy)):
                    raise Nonconformance(f"{where}: the engine wrote into its input; it must be left unchanged")
            assert_formed(name, result)
            return result

        return guarded


def _copy(tensor: Tensor) -> Tensor | None:
    return tensor.clone() if tensor.numel() <= _COPIED and tensor.device.type != "meta" else None


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.ndim else a.equal(b)


def _tensors(value: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield where, value
    elif is_dataclass(value) and type(value).__module__.startswith("moe_conformance"):
        # Our own dataclasses only: transformers' configs are dataclasses too, and reading some of their fields raises.
        for item in fields(value):
            yield from _tensors(getattr(value, item.name), item.name)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{where}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item, where)


class Judge:
    """One engine, built. Raises Unavailable where it cannot start here, UsageError where the adapter is not one.

    seed: of all hashed inputs. made: a list for what they are, or None. raised: the exception behind the last outcome,
    for a debugger.
    """

    def __init__(self, target: Target, seed: int = 0) -> None:
        self.seed = seed
        self.made: list[tuple[str, Any]] | None = None
        cls = target.load()
        missing = getattr(cls, "missing", None)
        reason = missing() if missing else None
        if reason:
            raise Unavailable(reason)
        # An adapter is a file, or the folder of its package.
        file = Path(importlib.import_module(cls.__module__).__file__ or "")
        suites = importlib.import_module("moe_conformance.suites")
        self.adapters = (file.parent if file.name == "__init__.py" else file, Path(suites.__path__[0]))
        raw = cls()
        if problems := _complaints(raw):
            raise UsageError(f"the adapter {target.path} cannot be judged:\n" + "\n".join(problems))
        self.engine = Judged(raw, target.path)
        self.capabilities = {stage: frozenset(words) for stage, words in self.engine.capabilities().items()}
        self.absent: Mapping[str, Mapping[str, str]] = getattr(raw, "absent", dict)()
        self.raised: BaseException | None = None

    def probe(self, stage: str) -> Outcome:
        """Whether the stage is what the adapter declares; if not, no case of the stage is judged."""
        try:
            with kept():
                probe(cast(Engine, self.engine), stage, self.capabilities.get(stage), self.engine.limits.get(stage))
        except Unsupported:
            return Outcome(Verdict.PASS)  # refused by the engine; each case will report that
        except Exception as error:
            self.raised = error
            return Outcome(Verdict.ERROR, f"the adapter failed the probe of {stage}: {_describe(error)}")
        return Outcome(Verdict.PASS)

    def run(self, module: str, function: str, case: Case) -> Outcome:
        """Run one check, given by name. Nothing the engine does makes this raise."""
        return self.judge(getattr(importlib.import_module(module), function), case)

    def judge(self, check: Callable[[Any, Case], Any], case: Case) -> Outcome:
        """As `run`, given the check itself."""
        self.raised = None
        if case.stage not in self.capabilities:
            return Outcome(Verdict.UNSUPPORTED, f"stage {case.stage} is not offered", refusal=Refusal.STAGE)
        if lacking := case.needs - self.capabilities[case.stage]:
            said = f"{case.stage} without {', '.join(sorted(lacking))}"
            nowhere = self.absent.get(case.stage, {})
            if reasons := dict.fromkeys(nowhere[word] for word in sorted(lacking) if word in nowhere):
                return Outcome(Verdict.ABSENT, f"{said}: {'; '.join(reasons)}", refusal=Refusal.FEATURE)
            return Outcome(Verdict.UNSUPPORTED, said, refusal=Refusal.FEATURE)
        self._ran()  # drop what ran for an earlier case
        try:
            facts = self._facts(check, case)
        except Exception as error:
            self.raised = error
            outcome = self._outcome(error)
            ran = self._ran()
            return replace(outcome, message=f"{outcome.message} [{ran}]") if ran else outcome
        return Outcome(Verdict.PASS, self._ran(), facts)

    def _facts(self, check: Callable[[Any, Case], Any], case: Case) -> Any:
        """What the check returns for a golden, which is of the inputs that the default seed draws first.

        A check whose facts depend on what is drawn holds them against the oracle itself, so others are left out.
        """
        undecided = ""
        for attempt in range(ATTEMPTS):
            with drawing(Draw.of(self.seed, attempt, self.made)) as draw, kept():
                try:
                    facts = check(self.engine, case)
                except Undecided as error:
                    undecided = str(error)
                    continue
            return None if draw.salt and draw.is_used else facts
        raise Broken(f"{undecided}; so they were in {ATTEMPTS} draws")

    def _ran(self) -> str:
        """What the adapter's `ran()` says; an exception in it changes no verdict."""
        try:
            ran = getattr(self.engine.raw, "ran", None)
            return str(ran())[:_MOST_WORDS] if ran else ""
        except Exception as error:
            return f"ran() raised {type(error).__name__}"

    def _outcome(self, error: Exception) -> Outcome:
        match error:
            case Unjudged():
                return Outcome(Verdict.UNSUPPORTED, str(error), refusal=Refusal.SEED)
            case BeyondLimits():
                return Outcome(Verdict.UNSUPPORTED, str(error), refusal=Refusal.LIMIT)
            case Absent():
                return Outcome(Verdict.ABSENT, str(error) or "no reason given", refusal=Refusal.CALL)
            case Unsupported():
                return Outcome(Verdict.UNSUPPORTED, str(error) or "no reason given", refusal=Refusal.CALL)
            case Nonconformance():
                return Outcome(Verdict.FAIL, str(error))
            case Broken():
                return Outcome(Verdict.ERROR, str(error))
        verdict = Verdict.ERROR if self._is_adapters(error) else Verdict.FAIL
        return Outcome(verdict, _describe(error))

    def _is_adapters(self, error: Exception) -> bool:
        """Whether the adapter or this project broke, rather than the engine.

        The innermost relevant frame decides. Frames in torch and the standard library are skipped, because both sides
        end up there. So are frames in shared code (the protocol, the oracle, comparisons), which was misused by its
        caller or is itself wrong. A function that the engine calls back counts as the engine, with everything it calls;
        a call that its signature does not accept counts as the adapter.
        """
        codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
        own = [code for code in codes if not _is_library(Path(code.co_filename))]
        if isinstance(error, TypeError) and is_signature_of_marked(error):
            return True
        while own and _lies_in(own[-1], _FOR_ALL):
            own.pop()
        if not own:
            return True
        innermost = 0
        while innermost < len(own) and self._in_adapter(own[-1 - innermost]):
            innermost += 1
        return innermost > 0 and not any(is_called_by_engine(code) for code in own[-innermost:])

    def _in_adapter(self, code: CodeType) -> bool:
        return _lies_in(code, self.adapters)


def _complaints(raw: Any) -> list[str]:
    """What is wrong with an adapter's declarations, checked before any stage is called."""
    version = getattr(raw, "protocol", PROTOCOL_VERSION)
    if version != PROTOCOL_VERSION:
        return [f"protocol: got {version!r}, want {PROTOCOL_VERSION}; docs/migrating.md says what changed"]
    said = raw.capabilities()
    found = features.complaints(said)
    if not found:
        found += [
            f"capabilities: got {stage!r}, which the adapter has no method for; take it out, or write {stage}()"
            for stage in said
            if _lacks(raw, stage)
        ]
        found += features.absent_complaints(getattr(raw, "absent", dict)(), said)
    return found + limits.complaints(getattr(raw, "limits", dict)())


def _lacks(raw: Any, stage: str) -> bool:
    method = getattr(raw, stage, None)
    return method is None or getattr(method, "__func__", None) is getattr(Engine, stage)


def _lies_in(code: CodeType, places: Iterable[Path]) -> bool:
    file = Path(code.co_filename)
    return any(file == place or place in file.parents for place in places)


def _is_library(file: Path) -> bool:
    standard, torch_folder = Path(traceback.__file__).parent, Path(torch.__file__).parent
    in_standard = standard in file.parents and "site-packages" not in file.parts[len(standard.parts) :]
    return in_standard or torch_folder in file.parents or not file.is_absolute()


def _describe(error: BaseException) -> str:
    """Type, message and the last frames."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    trace = "\n".join(f"  {Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}" for f in frames)
    return f"{type(error).__name__}: {_said(error)}\n{trace}"


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as another:
        return f"(no words: its __str__ raises {type(another).__name__})"
