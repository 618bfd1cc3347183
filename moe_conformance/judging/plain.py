"""Text of engines and adapters as everything that shows it can take it: encodable, without control codes, bounded."""

from __future__ import annotations

import re

# Characters of a message: what a person reads, and a hundred thousand of which a machine still can.
LONGEST = 20_000
_CODES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-_]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: str) -> str:
    """The text without colours and control characters, surrogates spelled out, its middle left out beyond LONGEST."""
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
    return _CODES.sub("", text.encode("utf-8", "backslashreplace").decode("utf-8"))


def fence(text: str) -> str:
    """What can stand around it as Markdown's mark of plain text: longer than any in it."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)
