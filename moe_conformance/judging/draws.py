"""Which inputs a check draws: those of a run's seed, and again where the oracle could not decide the first ones.

Seed 0 and the first attempt add nothing, so that they are what goldens were written from. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from moe_conformance.errors import Unjudged

# One draw in some hundred is undecided, in cases of many ties; ten in a row are a fault of the case.
ATTEMPTS = 10


@dataclass
class Draw:
    """salt: added to the name of every hashed tensor. is_used: whether any was asked for. made: where it is no None,
    what was drawn, each with the call of inputs.py that draws it again."""

    salt: str = ""
    is_used: bool = False
    made: list[tuple[str, Any]] | None = None

    @classmethod
    def of(cls, seed: int, attempt: int = 0, made: list[tuple[str, Any]] | None = None) -> Draw:
        return cls((f" seed {seed}" if seed else "") + (f" attempt {attempt}" if attempt else ""), made=made)


_DRAW: ContextVar[Draw] = ContextVar("draw")


@contextmanager
def drawing(draw: Draw) -> Iterator[Draw]:
    """Inside, hashed inputs are those of this draw."""
    token = _DRAW.set(draw)
    try:
        yield draw
    finally:
        _DRAW.reset(token)


def salt() -> str:
    """What the name of a hashed tensor gets; whoever keeps a tensor keeps it by this, too."""
    if (draw := _DRAW.get(None)) is None:
        return ""
    draw.is_used = True
    return draw.salt


def note(call: str, *arguments: Any, drawn: Any) -> None:
    """Keep what was drawn, where somebody wants to write it out."""
    draw = _DRAW.get(None)
    if draw is not None and draw.made is not None:
        # A copy: cases write into what they drew.
        draw.made.append((f"{call}({', '.join(map(repr, arguments))})", drawn.clone()))


def default_seed_only(what: str) -> None:
    """Raise Unjudged where the answers to these inputs are written down, and inputs are others."""
    if salt():
        raise Unjudged(f"{what} for the default seed alone: leave out --seed")
