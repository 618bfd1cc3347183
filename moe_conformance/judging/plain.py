"""Text of engines and adapters made safe to show anywhere: encodable, without control codes, bounded."""

from __future__ import annotations

import re

# Characters of a message: as much as a person reads, and small enough for 100,000 messages in one file.
LONGEST = 20_000
_CODES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-_]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: str) -> str:
    """The text without colours and control characters, surrogates escaped, the middle cut if longer than LONGEST."""
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
    return _CODES.sub("", text.encode("utf-8", "backslashreplace").decode("utf-8"))


def fence(text: str) -> str:
    """A Markdown code fence longer than any run of backticks in the text."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)
