"""Hostile records of routed experts: a valid one of each form, and edits of its bytes, its words and its headers."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

BASES = ("record.npy", "record.safetensors", "record.jsonl")
TOKENS = "tokens.npy"
HEADERS = (
    "{'descr': '|O', 'fortran_order': False, 'shape': (2,)}",
    "{'descr': '<i4', 'fortran_order': True, 'shape': (7, 3, 2)}",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000, 3, 2)}",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (-1, 3, 2)}",
    "{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (2,)}",
    "{'descr': '<i4', 'fortran_order': False, 'shape': (" + "1," * 40 + ")}",
    "{'descr': '<f8', 'fortran_order': False, 'shape': ()}",
    "__import__('os').abort()",
    "[" * 5000,
    "{'a':" * 3000,
)
LINES: tuple[Any, ...] = (
    None,
    [],
    {},
    "x",
    -1,
    2.5,
    10**30,
    True,
    [[]],
    [[[1, 2], [3]]],
    [1, None],
    [[["1", "2"]]],
    "AAAA",
    "????",
    "k05VTVBZ",
    {"routed_experts": "AAAA"},
)
KEYS = ("prompt_token_ids", "input_ids", "token_ids", "output_ids", "routed_experts", "meta_info", "shape", "rank")


def write(folder: Path, base: str) -> None:
    """Seven rows of three layers with two experts, of eight tokens."""
    tokens, ids = np.arange(8), np.arange(42, dtype=np.int32).reshape(7, 3, 2) % 8
    if base.endswith(".npy"):
        np.save(folder / TOKENS, tokens)
        np.save(folder / base, ids)
    elif base.endswith(".safetensors"):
        from safetensors.numpy import save_file

        save_file({"tokens.0": tokens, "routed_experts.0": ids, "positions.0": np.arange(7)}, folder / base)
    else:
        held = io.BytesIO()
        np.save(held, ids)
        answers: list[dict[str, Any]] = [
            {"prompt_token_ids": [0, 1], "token_ids": [2, 3, 4, 5, 6, 7], "routed_experts": routed}
            for routed in (ids.tolist(), base64.b64encode(held.getvalue()).decode())
        ]
        meta = {"routed_experts": base64.b64encode(ids.tobytes()).decode()}
        answers.append({"input_ids": [0], "output_ids": list(range(1, 8)), "meta_info": meta, "shape": [3, 2]})
        (folder / base).write_text("\n".join(map(json.dumps, answers)))


def edit(rng: random.Random, base: str) -> list[Any]:
    """One that `spoil` here or hostile_inputs' own knows."""
    name = rng.choice((base, base, TOKENS)) if base.endswith(".npy") else base
    sizes = (0, 1, 7, 8, 2**20, 2**32, 2**63, 2**64 - 1)
    what = rng.randrange(8)
    if what == 0:
        return ["cut", name, rng.randrange(400)]
    if what == 1 and base.endswith(".safetensors"):
        return ["size", name, rng.choice(sizes)]
    if what == 2:
        return ["sparse", name, rng.choice((0, 2**20, 2**33))]
    if what == 3:
        return ["special", name, rng.choice(("fifo", "zero", "folder", "socket", "loop", "dangling", "unreadable"))]
    if what in (4, 5) and base.endswith(".npy"):
        return ["npy header", name, rng.choice(HEADERS)]
    if what in (4, 5, 6) and base.endswith(".jsonl"):
        return ["line", name, rng.randrange(3), rng.choice(KEYS), rng.choice(LINES)]
    return ["bytes", name, rng.randrange(500), rng.randbytes(rng.choice((1, 2, 8))).hex()]


def spoil(folder: Path, change: list[Any]) -> bool:
    """Whether the edit was one of this module's."""
    match change:
        case ["npy header", name, header]:
            text = header.encode() + b"\n"
            path = folder / name
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 2**20:
                path.write_bytes(b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + bytes(64))
        case ["line", name, number, key, value]:
            path = folder / name
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 2**20:
                lines = path.read_bytes().split(b"\n")
                if number < len(lines):
                    try:
                        said = json.loads(lines[number])
                    except ValueError:
                        return True
                    lines[number] = json.dumps({**said, key: value}).encode()
                path.write_bytes(b"\n".join(lines))
        case _:
            return False
    return True
