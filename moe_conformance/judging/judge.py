"""Judging one engine in the current process: build it, probe it, run checks, turn what happens into verdicts."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import STAGES, Engine, EngineInfo
from moe_conformance.errors import Nonconformance, Unavailable, Unsupported
from moe_conformance.judging.probe import probe
from moe_conformance.judging.verdict import Verdict
from moe_conformance.running.discovery import Target

# Inputs up to this many elements are compared byte for byte after a call; larger ones by torch's version counter,
# which notices torch's own in-place operations but not a kernel that writes through a pointer.
_COPIED = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """What a check came to; facts are for the golden snapshot."""

    verdict: Verdict
    message: str = ""
    facts: Any = None


class Judged:
    """An engine as checks see it: a stage it lacks raises Unsupported, and a call that writes into its inputs fails.

    raw: the adapter itself, for tracing, where the guard would be traced too.
    """

    def __init__(self, raw: Any, path: str) -> None:
        self.raw = raw
        self.path = path
        self.info: EngineInfo = raw.info

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        offered: Mapping[str, frozenset[str]] = self.raw.capabilities()
        return offered

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.raw, name, None)
        if method is None:
            raise Unsupported(name)
        if name not in STAGES:
            return method

        def guarded(*args: Any) -> Any:
            before = [(where, tensor, tensor._version, _copy(tensor)) for where, tensor in _tensors(args, name)]
            result = method(*args)
            for where, tensor, version, copy in before:
                if tensor._version != version or (copy is not None and not _same_bytes(tensor, copy)):
                    raise Nonconformance(f"{where}: the engine wrote into its input; it must be left unchanged")
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
        # Ours only: transformers' configs are dataclasses too, and reading some of their fields raises.
        for item in fields(value):
            yield from _tensors(getattr(value, item.name), item.name)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{where}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item, where)


class Judge:
    """One engine, built and probed. Raises Unavailable or UsageError where it cannot be built."""

    def __init__(self, target: Target) -> None:
        cls = target.load()
        missing = getattr(cls, "missing", None)
        reason = missing() if missing else None
        if reason:
            raise Unavailable(reason)
        # An adapter is a file, or the folder of its package.
        file = Path(importlib.import_module(cls.__module__).__file__ or "")
        suites = importlib.import_module("moe_conformance.suites")
        self.adapters = (file.parent if file.name == "__init__.py" else file, Path(suites.__path__[0]))
        self.engine = Judged(cls(), target.path)
        self.capabilities = {stage: frozenset(needs) for stage, needs in self.engine.capabilities().items()}
        self.broken = ""
        try:
            probe(cast(Engine, self.engine), self.capabilities)
        except Exception as error:
            self.broken = f"the adapter failed its probe: {_describe(error)}"

    def run(self, module: str, function: str, case: Case) -> Outcome:
        """Run one check. Never raises on account of the engine."""
        if self.broken:
            return Outcome(Verdict.ERROR, self.broken)
        if case.stage not in self.capabilities:
            return Outcome(Verdict.UNSUPPORTED, f"stage {case.stage} is not offered")
        lacking = case.needs - self.capabilities[case.stage]
        if lacking:
            return Outcome(Verdict.UNSUPPORTED, f"{case.stage} without {', '.join(sorted(lacking))}")
        check = getattr(importlib.import_module(module), function)
        try:
            facts = check(self.engine, case)
        except Unsupported as error:
            return Outcome(Verdict.UNSUPPORTED, str(error))
        except Nonconformance as error:
            return Outcome(Verdict.FAIL, str(error))
        except Exception as error:
            verdict = Verdict.ERROR if self._is_adapters(error) else Verdict.FAIL
            return Outcome(verdict, _describe(error))
        return Outcome(Verdict.PASS, facts=facts)

    def _is_adapters(self, error: Exception) -> bool:
        """Whether the adapter or a suite broke, rather than the engine.

        The innermost frame decides that lies in neither torch nor the standard library, where both end up.
        """
        frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        own = [frame for frame in frames if not _is_library(frame)]
        return bool(own) and any(own[-1] == place or place in own[-1].parents for place in self.adapters)


def _is_library(file: Path) -> bool:
    standard, torch_folder = Path(traceback.__file__).parent, Path(torch.__file__).parent
    in_standard = standard in file.parents and "site-packages" not in file.parts[len(standard.parts) :]
    return in_standard or torch_folder in file.parents or not file.is_absolute()


def _describe(error: BaseException) -> str:
    """Type, message and the last frames."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    trace = "\n".join(f"  {Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}" for f in frames)
    return f"{type(error).__name__}: {error}\n{trace}"
