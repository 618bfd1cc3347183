"""Foreign values in messages: short, printable and on one line, whatever they are."""

from __future__ import annotations

import reprlib
from collections.abc import Collection
from typing import Any

FEW = 8  # entries that somebody reads


class _Short(reprlib.Repr):
    """Cuts what is long and what is deep; never fails, as the repr of a list of 10**5 levels does."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong, self.maxother = 3, 200, 40, 200
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = FEW

    def repr_int(self, x: int, level: int) -> str:
        # int to text takes quadratic time, and Python refuses it above 4,300 digits.
        return repr(x) if x.bit_length() <= 256 else f"an integer of {x.bit_length()} bits"


quoted = _Short().repr


def plainly(text: str) -> str:
    """A name as it is, or its printable form; shortened if it is long."""
    return quoted(text)[1:-1]


def few(values: Collection[Any]) -> str:
    """The first few, joined by commas."""
    first = [
        plainly(value) if isinstance(value, str) else quoted(value)
        for value, _ in zip(values, range(FEW), strict=False)
    ]
    return ", ".join(first) + (", ..." if len(values) > FEW else "")
