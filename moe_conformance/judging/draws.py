"""Which inputs a check draws: those of a run's seed, and again where the oracle could not decide the first ones.

Seed 0 and the first attempt add nothing, so that they are what goldens were written from. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from moe_conformance.errors import Unjudged

# One draw in some hundred is undecided, in cases of many ties; ten in a row are a fault of the case.
ATTEMPTS = 10


@dataclass
class Draw:
    """salt: added to the name of every hashed tensor. is_used: whether any was asked for."""

    salt: str = ""
    is_used: bool = False

    @classmethod
    def of(cls, seed: int, attempt: int = 0) -> Draw:
        return cls((f" seed {seed}" if seed else "") + (f" attempt {attempt}" if attempt else ""))


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


def default_seed_only(what: str) -> None:
    """Raise Unjudged where the answers to these inputs are written down, and inputs are others."""
    if salt():
        raise Unjudged(f"{what} for the default seed alone: leave out --seed")
