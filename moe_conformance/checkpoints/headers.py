"""The header of a safetensors file, read without safetensors: names, dtypes, shapes, and that the data are all there.

Format: https://github.com/huggingface/safetensors#format. A file is refused if safetensors would refuse it. Nothing
after the header is read.
"""

from __future__ import annotations

import math
import os
import re
import stat
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from moe_conformance.checkpoints.json_files import open_at_once, parsed
from moe_conformance.errors import CheckpointError
from moe_conformance.quote import plainly, quoted

# Bytes. Of 115 a tensor, it holds 140,000; the most in a published file are 10,000.
MOST_HEADER = 2**24
# Of one that must be parsed as JSON, which an attack can make slow; none that safetensors wrote must.
MOST_PARSED = 2**22
# Bits of one element, by safetensors' word for its dtype.
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
AGAIN = "download the file again"


class Stored(NamedTuple):
    """A tensor as the header of its file describes it. begin, end: of its data, behind the header."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """data: where the data begin in the file. size: of the data."""

    tensors: list[Stored]
    data: int
    size: int


class Damaged(CheckpointError):
    """A file that no reader accepts. kind: "truncated" or "header"."""

    def __init__(self, kind: str, got: str, want: str, do: str = AGAIN) -> None:
        super().__init__(f"got {got}, want {want}; {do}")
        self.kind, self.got, self.want, self.do = kind, got, want, do


# An entry as safetensors writes it. A header of such entries alone need not be parsed as JSON, which takes twice as
# long. Numbers have at most 18 digits: more is not a size but an attack on int().
_ENTRY = re.compile(
    r'"([^"\\\x00-\x1f]*)":\{"dtype":"([A-Z0-9_]+)","shape":\[([0-9,]*)\],"data_offsets":\[([0-9]{1,18}),([0-9]{1,18})\]\}'
    r"([,}])"
)
_METADATA = re.compile(r'\{(?:"__metadata__":\{[^{}\\]*\},)?')
# Characters of an entry around what is captured.
_AROUND = len('"":{"dtype":"","shape":[],"data_offsets":[,]}')
_BY_PLACE = itemgetter(4, 5)
_Entry = tuple[str, str, str, str, str, str]


def read_header(path: Path, name: str) -> Header:
    """Raises Damaged, and OSError. name: of the file, for `Stored.file`."""
    descriptor = open_at_once(path)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Damaged("header", "a pipe, a device or a folder", "a file")
        first = file.read(8)
        if len(first) < 8:
            raise Damaged("truncated", f"{len(first)} bytes", "a safetensors file")
        length = int.from_bytes(first, "little")
        if length > MOST_HEADER:
            raise Damaged("header", f"a header of {length} bytes", f"at most {MOST_HEADER}")
        raw = file.read(length)
        if len(raw) < length:
            raise Damaged("truncated", f"a header of {length} bytes in a file of {found.st_size}", "the whole header")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise Damaged("header", f"a header that is not UTF-8 ({error.reason} at byte {error.start})", "UTF-8") from None
    size = found.st_size - 8 - length
    entries = _written_by_safetensors(text)
    tensors = _stored(entries, name) if entries is not None else _parsed(text, name)
    _whole(tensors, size)
    return Header(tensors, 8 + length, size)


def _written_by_safetensors(text: str) -> list[_Entry] | None:
    """The entries of a header that consists of such entries and nothing else; None for any other."""
    start = _METADATA.match(text)
    if start is None or _ENTRY.match(text, start.end()) is None:
        return None
    entries: list[_Entry] = _ENTRY.findall(text, start.end())
    # Matches do not overlap: if they are as long as the text together, there is nothing between them.
    taken = sum(map(len, map("".join, entries))) + _AROUND * len(entries)
    ends = [entry[5] for entry in entries]
    whole = start.end() + taken == len(text.rstrip(" ")) and "}" not in ends[:-1] and ends[-1:] == ["}"]
    return entries if whole and len({entry[0] for entry in entries}) == len(entries) else None


def _stored(entries: list[_Entry], file: str) -> list[Stored]:
    known: dict[tuple[str, str], tuple[tuple[int, ...], int]] = {}
    out = []
    for name, dtype, dims, begin_text, end_text, _ in entries:
        kind = dtype, dims
        if kind not in known:
            known[kind] = _sized(name, dtype, _split(name, dims))
        shape, size = known[kind]
        begin, end = int(begin_text), int(end_text)
        if end - begin != size:
            raise _misfit(name, dtype, shape, begin, end)
        out.append(Stored(name, file, dtype, shape, begin, end))
    return out


def _split(name: str, dims: str) -> list[int]:
    found = dims.split(",") if dims else []
    if not all(0 < len(dim) < 19 for dim in found):
        raise Damaged("header", f"{plainly(name)} with shape [{dims[:80]}]", "a list of integers below 2**63")
    return [int(dim) for dim in found]


def _parsed(text: str, file: str) -> list[Stored]:
    """Of a header that another writer laid out: with spaces, keys in another order, or escapes."""
    if len(text) > MOST_PARSED:
        got = f"a header of {len(text)} characters that safetensors did not write"
        raise Damaged("header", got, f"at most {MOST_PARSED} of such", "save the file again with safetensors")
    try:
        entries = parsed(text, "header")
    except CheckpointError as error:
        raise Damaged("header", str(error).removeprefix("header: ").partition(";")[0], "a JSON object") from None
    out = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise Damaged("header", f"{plainly(name)}: {quoted(entry)}", "dtype, shape and data_offsets")
        dims, offsets = entry["shape"], entry["data_offsets"]
        if not _naturals(dims) or not _naturals(offsets) or len(offsets) != 2:
            got = f"{plainly(name)} with shape {quoted(dims)} and data_offsets {quoted(offsets)}"
            raise Damaged("header", got, "lists of integers that are not negative")
        shape, size = _sized(name, entry["dtype"], dims)
        begin, end = offsets
        if end - begin != size:
            raise _misfit(name, entry["dtype"], shape, begin, end)
        out.append(Stored(name, file, entry["dtype"], shape, begin, end))
    return out


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(entry) is int and 0 <= entry < 2**63 for entry in value)


def _sized(name: str, dtype: Any, dims: list[int]) -> tuple[tuple[int, ...], int]:
    """The shape, and its bytes."""
    if not isinstance(dtype, str) or dtype not in BITS:
        raise Damaged("header", f"{plainly(name)} of dtype {quoted(dtype)}", f"one of {', '.join(BITS)}")
    if len(dims) > 64 or min(dims, default=0) < 0:
        raise Damaged("header", f"{plainly(name)} with shape {quoted(dims)}", "a list of at most 64 sizes below 2**63")
    bits = math.prod(dims) * BITS[dtype]
    if bits % 8 or bits >= 2**66:
        raise Damaged("header", f"{plainly(name)}: {quoted(dims)} of {dtype}", "a whole number of bytes, below 2**63")
    return tuple(dims), bits // 8


def _misfit(name: str, dtype: str, shape: tuple[int, ...], begin: int, end: int) -> Damaged:
    want = f"{math.prod(shape) * BITS[dtype] // 8}, as {dtype} {list(shape)} takes"
    return Damaged("header", f"{plainly(name)} in {end - begin} bytes, from {begin} to {end}", want)


def _whole(tensors: list[Stored], size: int) -> None:
    """Raise unless the data are complete, without holes and overlaps, and nothing follows them."""
    at = 0
    for entry in sorted(tensors, key=_BY_PLACE):
        if entry.begin != at:
            what = "overlaps what is before it" if entry.begin < at else "leaves a hole before it"
            raise Damaged("header", f"{plainly(entry.name)}, which {what}, from {entry.begin}", f"it to begin at {at}")
        at = entry.end
    if at > size:
        raise Damaged("truncated", f"{size} bytes of data", f"{at}, as the header says")
    if at < size:
        raise Damaged("header", f"{size - at} bytes that are of no tensor at the end", f"{at} bytes of data")
