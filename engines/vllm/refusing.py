"""What vLLM refuses, told from what it gets wrong: Unsupported in its own words."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator, Sequence

from moe_conformance.engine import Absent, Unsupported

# Words of errors that refuse a form of call, among those of errors that check what was computed.
_REFUSING = (
    "is only implemented for",
    "nsupported",
    "range must be a power of 2",
    " is not supported.",
    "pin_memory=True requires a CUDA",  # as torch says of what is copied to a GPU
    "Tried to instantiate dummy base class",  # as torch without CUDA says of its events and streams
    'assert scoring_func == "softmax"',
    'assert self.scoring_func == "softmax"',
)


class Unasked(Unsupported):
    """The engine was not asked, for this machine has no means to."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn vLLM's own refusals into Unsupported: no kernel, no such shape or operator, a package that is absent."""
    try:
        yield
    except Unsupported:
        raise
    except Exception as error:
        kinds = isinstance(error, (NotImplementedError, ImportError))
        if not kinds and "'_OpNamespace'" not in str(error) and not any(word in said(error) for word in _REFUSING):
            raise
        raise Unsupported(f"vLLM: {said(error)}") from error


def all_of(refused: Sequence[Unsupported]) -> Unsupported:
    """One refusal, with the reason of each: Absent where all of them are, or all that were asked of the engine."""
    asked = [one for one in refused if not isinstance(one, Unasked)]
    kind = Absent if asked and all(isinstance(one, Absent) for one in asked) else Unsupported
    return kind("; ".join(dict.fromkeys(map(str, asked if kind is Absent else refused))))


def said(error: Exception) -> str:
    """What an error says, in a line: of pydantic's several the one with the reason, of an assertion its place."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, AssertionError):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = frame.filename.rpartition(f"{os.sep}vllm{os.sep}")[2]
        lines = [": ".join(filter(None, (place, frame.line, *lines[:1])))]
    lines = lines or [type(error).__name__]
    found = next((line for line in lines if line.startswith(("Value error, ", "Assertion failed, "))), lines[0])
    if found.endswith(":") and found != lines[-1]:
        found = f"{found} {lines[lines.index(found) + 1]}"
    return found.removeprefix("Value error, ").split(" [type=")[0]
