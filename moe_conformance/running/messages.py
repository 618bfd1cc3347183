"""What passes between pytest and an engine's process: a question or an answer a line, each with its number.

Both sides have the same version, so a missing or unknown key means that something else wrote the line.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, get_type_hints

from moe_conformance.judging.verdict import Outcome, Refusal, Verdict


@dataclass(frozen=True)
class Probe:
    """Is the stage what the adapter declares?"""

    number: int
    stage: str


@dataclass(frozen=True)
class Check:
    """What is the outcome of this case? module and function: of the check."""

    number: int
    module: str
    function: str
    case: str


@dataclass(frozen=True)
class Hello:
    """The engine is built. First line of its process, unless that is `Unstartable`."""

    name: str
    version: str
    device: str


@dataclass(frozen=True)
class Unstartable:
    """There is no engine. is_missing: something is not installed here; otherwise the adapter is wrong."""

    reason: str
    is_missing: bool


@dataclass(frozen=True)
class Answer:
    """number: of the question."""

    number: int
    outcome: Outcome


Message = Probe | Check | Hello | Unstartable | Answer
_KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in (Probe, Check, Hello, Unstartable, Answer)}


def encode(message: Message) -> str:
    """One line. Raises TypeError if the facts of an outcome are not JSON data."""
    return json.dumps({"kind": type(message).__name__, **asdict(message)}) + "\n"


def decode(line: str) -> Message:
    """The message of a line. Raises ValueError, with the line, if it is none."""
    try:
        data = json.loads(line)
        kind = _KINDS[data.pop("kind")]
        built: Message = _build(kind, data)
        return built
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"got {line[:200]!r}, want a line of messages.py: {type(error).__name__}: {error}") from error


_hints = cache(get_type_hints)


def _build(kind: Any, data: Any) -> Any:
    hints = _hints(kind)
    if data.keys() != hints.keys():
        raise ValueError(f"got the keys {sorted(data)}, want {sorted(hints)}")
    return kind(**{name: _value(name, hint, data[name]) for name, hint in hints.items()})


def _value(name: str, hint: Any, value: Any) -> Any:
    if hint is Any:
        return value
    if hint in (int, str, bool):
        if type(value) is not hint:
            raise ValueError(f"{name}: got {value!r}, want {hint.__name__}")
        return value
    if hint == Refusal | None:
        return None if value is None else Refusal(value)
    if hint is Verdict:
        return Verdict(value)
    if hint is Outcome:
        return _build(Outcome, value)
    raise TypeError(f"{name}: got a field of {hint}, want a type that messages.py knows; add it to _value")
