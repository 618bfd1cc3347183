"""JSON files of an untrusted folder: read whole or refused with one error that says what to do."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from moe_conformance.errors import CheckpointError
from moe_conformance.quote import few, plainly

# Bytes. The index of DeepSeek-V3 has 9 MB, that of Kimi-K2 in int4 25 MB.
MOST_JSON = 2**25


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in which no key is given twice. Raises CheckpointError."""
    try:
        return parsed(_text(path), str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not there; point to a folder with config.json and safetensors") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({plainly(str(error))}); download it again") from error


def parsed(text: str, where: str) -> dict[str, Any]:
    """A JSON object in which no key is given twice. where: what to call it. Raises CheckpointError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = sorted(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
            raise CheckpointError(f"{where}: {few(twice)} given twice; keep the one that is meant")
        return found

    try:
        found = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{where}: not readable as JSON ({plainly(str(error))}); download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: got a JSON {type(found).__name__}, want an object; download it again")
    return found


def open_at_once(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """A descriptor, without waiting: a pipe that nobody writes to would keep its reader for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _text(path: Path) -> str:
    """The text of a file.

    Devices, pipes and folders, which may have no end, and files that are too large are refused.
    """
    with open(path, encoding="utf-8", opener=open_at_once) as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: got a pipe or a device, want a file; download it again")
        if found.st_size > MOST_JSON:
            raise CheckpointError(f"{path}: got {found.st_size} bytes, want at most {MOST_JSON}; download it again")
        return stream.read()
