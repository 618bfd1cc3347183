"""What an adapter's class says of itself, asked in a separate process: no foreign code runs in pytest's.

`python -m moe_conformance.running.survey PATH` answers in one line, without building the engine.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_conformance.engine import STAGES, Engine
from moe_conformance.errors import UsageError
from moe_conformance.judging.verdict import Outcome, Verdict
from moe_conformance.protocol.features import near
from moe_conformance.running.child import Child, Ended, Silent, TooLong, Unstarted, follow_parent, python
from moe_conformance.running.discovery import Target, extend_path, registered

# Class attributes of an adapter that are not stages.
_NOT_STAGES = ("name", "info", "protocol", "capabilities", "absent", "limits", "missing", "environment", "ran", "repro")
# An adapter should import nothing heavy before it is built; one that does may take as long as an engine's start.
SECONDS = 300.0


@dataclass(frozen=True)
class Survey:
    """name: under which it wants to be shown. missing: why it cannot start here. environment: of its process. stages:
    for which the class has a method. unloadable: why there is no class, which is for the user; trouble: verdict and
    message of what the adapter did instead of answering, which each of its cases comes to."""

    name: str = ""
    missing: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    stages: tuple[str, ...] = STAGES
    unloadable: str | None = None
    trouble: tuple[str, str] | None = None

    @property
    def outcome(self) -> Outcome | None:
        """The outcome of all its cases, or None if it may be started."""
        if self.trouble is not None:
            return Outcome(Verdict(self.trouble[0]), self.trouble[1])
        return Outcome(Verdict.UNAVAILABLE, self.missing) if self.missing else None

    @property
    def why(self) -> str | None:
        """Why a run without --engine leaves it out."""
        return self.unloadable or self.missing or (self.trouble[1] if self.trouble else None)

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, line: str) -> Survey:
        """Raises ValueError if the line is not a survey."""
        try:
            said = json.loads(line)
            trouble = tuple(said.pop("trouble") or ()) or None
            return cls(**{**said, "stages": tuple(said["stages"]), "trouble": trouble})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"got {line[:200]!r}, want a survey") from error


def survey_of(target: Target) -> Survey:
    """What the class says, imported here. Raises what the adapter raises; UsageError where the path names nothing."""
    cls = target.load()
    name = getattr(cls, "name", "") or cls.__name__
    if not isinstance(name, str):
        raise TypeError(f"name: got {name!r}, want a string")
    said: Any = getattr(cls, "environment", dict)()
    if not isinstance(said, dict) or not all(map(_is_variable, said.items())):
        raise TypeError(f"environment(): got {said!r}, want a map of strings to strings")
    missing = getattr(cls, "missing", None)
    reason = missing() if missing else None
    stages = tuple(stage for stage in STAGES if getattr(cls, stage, None) not in (None, getattr(Engine, stage)))
    if not stages and reason is None:
        methods = sorted(name for name in vars(cls) if not name.startswith("_") and name not in _NOT_STAGES)
        guess = next(filter(None, (near(method, STAGES) for method in methods)), "")
        raise UsageError(
            f"engine {target.path}: got a class with a method of no stage ({', '.join(methods) or 'with none'}), want "
            f"some of {', '.join(STAGES)}{guess}"
        )
    return Survey(name, None if reason is None else str(reason), said, stages)


def _is_variable(pair: tuple[Any, Any]) -> bool:
    name, value = pair
    return isinstance(name, str) and isinstance(value, str) and "\0" not in name + value and "=" not in name


def surveys(targets: Sequence[Target]) -> list[Survey]:
    """Of each target, all at once, each in a process of its own."""
    end = time.monotonic() + SECONDS
    with ExitStack() as ends:
        children: list[Child | Unstarted] = []
        for target in targets:
            try:
                children.append(child := Child(python(__name__, target.path), {}))
                ends.callback(child.kill)
            except Unstarted as error:
                children.append(error)
        return [_answer(target, child, end - time.monotonic()) for target, child in zip(targets, children, strict=True)]


def named(targets: Sequence[Target], found: Sequence[Survey]) -> dict[Target, Survey]:
    """The targets under the names that they are shown by.

    Raises UsageError where a path names no class, a name is none or another's: results are told apart by name.
    """
    owners = {target.name: target.path for target in registered().values()}
    surveyed: dict[Target, Survey] = {}
    for asked, survey in zip(targets, found, strict=True):
        if survey.unloadable:
            raise UsageError(survey.unloadable)
        name = asked.name if owners.get(asked.name) == asked.path else survey.name
        if not re.fullmatch(r"[\w.+-]+", name):
            raise UsageError(
                f"engine {asked.path}: got name {name!r}, want letters, digits, '_', '.', '+' and '-' only"
            )
        if (owner := owners.setdefault(name, asked.path)) != asked.path:
            raise UsageError(
                f"engine {asked.path}: got name {name!r}, which is that of {owner}; results are told apart by name: "
                "give the class another `name`"
            )
        surveyed[Target(name, asked.path)] = survey
    return surveyed


def _answer(target: Target, child: Child | Unstarted, seconds: float) -> Survey:
    name = target.path.rpartition(":")[2]
    if isinstance(child, Unstarted):
        return Survey(name, trouble=("error", str(child)))
    about = f"while its module {target.path.partition(':')[0]} was imported"
    try:
        return Survey.decode(child.hear(seconds))
    except Ended:
        return Survey(name, trouble=("crash", f"{about}: {child.ending()}{child.last_words()}"))
    except Silent:
        child.where_it_is()
        return Survey(name, trouble=("timeout", f"{about}: no end within {SECONDS:g} s{child.last_words()}"))
    except TooLong:
        return Survey(name, trouble=("error", f"{about}: got a line without an end, want a survey"))
    except ValueError as error:
        return Survey(name, trouble=("error", f"{about}: {error}{child.last_words()}"))


def here(target: Target) -> Survey:
    """The answer of a separate process, given in this one."""
    extend_path()
    try:
        return survey_of(target)
    except UsageError as error:
        return Survey(unloadable=str(error))
    except Exception:
        return Survey(target.path.rpartition(":")[2], trouble=("error", traceback.format_exc(limit=-6)))


def main() -> None:
    path, _, write = sys.argv[1:4]
    answers = int(write)
    os.set_inheritable(answers, False)
    follow_parent()
    os.write(answers, here(Target(path, path)).encode().encode() + b"\n")


if __name__ == "__main__":
    main()
