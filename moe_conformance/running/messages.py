"""What passes between pytest and an engine's process: a question or an answer a line, each with its number.

Both sides are of one version, so a key that is missing or unknown means that something else wrote the line.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from moe_conformance.judging.verdict import Outcome, Refusal, Verdict


@dataclass(frozen=True)
class Probe:
    """Is the stage what the adapter declares?"""

    number: int
    stage: str


@dataclass(frozen=True)
class Check:
    """What does this case come to? module and function: of the check."""

    number: int
    module: str
    function: str
    case: str


@dataclass(frozen=True)
class Hello:
    """The engine stands. The first line of its process, as `Unstartable` is."""

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
# Annotations are text here; those of other types are looked at below.
_PLAIN = {"int": int, "str": str, "bool": bool}


def encode(message: Message) -> str:
    """One line. Raises TypeError if the facts of an outcome are not JSON data."""
    return json.dumps({"kind": type(message).__name__, **asdict(message)}) + "\n"


def decode(line: str) -> Message:
    """The message of a line. Raises ValueError, with the line, if it is none."""
    try:
        data = json.loads(line)
        kind = _KINDS[data.pop("kind")]
        return _build(kind, data)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"got {line[:200]!r}, want a line of messages.py: {type(error).__name__}: {error}") from error


def _build(kind: Any, data: dict[str, Any]) -> Any:
    want = {item.name: item.type for item in fields(kind)}
    if data.keys() != want.keys():
        raise ValueError(f"got the keys {sorted(data)}, want {sorted(want)}")
    for name, annotation in want.items():
        plain = _PLAIN.get(str(annotation))
        if plain is not None and type(data[name]) is not plain:
            raise ValueError(f"{name}: got {data[name]!r}, want {annotation}")
    if kind is Answer:
        data["outcome"] = _build(Outcome, data["outcome"])
    if kind is Outcome:
        data["verdict"] = Verdict(data["verdict"])
        data["refusal"] = None if data["refusal"] is None else Refusal(data["refusal"])
    return kind(**data)
