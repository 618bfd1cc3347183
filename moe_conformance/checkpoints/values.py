"""Checks the numbers of a checkpoint: impossible scales, weights that are not finite, experts that are equal.

Files are mapped and read once from beginning to end, a megabyte at a time; pages that were read are released. NumPy has
no bfloat16 or float8, but as integers they have the order of their values. So two maxima over the bytes show whether
any is NaN or infinite, without conversion.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_conformance.checkpoints.findings import Findings
from moe_conformance.checkpoints.folder import Folder
from moe_conformance.checkpoints.forms import CARRIERS, E8M0, FP8, INTEGERS, kind_of
from moe_conformance.checkpoints.headers import BITS, Stored
from moe_conformance.checkpoints.layout import Layout, stored_shape
from moe_conformance.checkpoints.sorting import Group, Matrix, Sorted
from moe_conformance.errors import CheckpointError
from moe_conformance.model.families.naming import Piece, Stack
from moe_conformance.model.specs import Shape
from moe_conformance.quote import few, plainly
from moe_conformance.reference_impl.checkpoint.places import Layer

STEP = 2**19  # bytes that are examined together: what a core's cache holds, and little beside it for Python
WINDOW = 2**26  # bytes after which pages are given back
PROBE = 64  # bytes at either end that are compared first, before whole experts are
# Width in bytes, and the first pattern above all finite ones, of the positive half.
_FLOATS: Mapping[str, tuple[int, int]] = {
    "F64": (8, 0x7FF0 << 48),
    "F32": (4, 0x7F80 << 16),
    "BF16": (2, 0x7F80),
    "F16": (2, 0x7C00),
    "F8_E5M2": (1, 0x7C),
    "F8_E4M3": (1, 0x7F),
}
# One number for several weights, each to be above 0.
SCALES = frozenset(
    (
        *("weight_scale_inv", "weight_scale", "weight_scale_2", "weight_global_scale", "scale_inv", "scale_2"),
        *("scale", "scales", "input_scale", "input_global_scale"),
    )
)
# Forms of integers, whose own scales may be negative: AutoRound gives -8, which +7 does not match, to the larger side.
INTEGER = ("packed", "gptq", "awq", "int8")
SIGNED = frozenset(("weight_scale", "scales"))
# For these, zero is not a fault: what they scale may be all zero.
MAXIMA = frozenset(("absmax", "nested_absmax", "SCB"))
# What gate and up of an expert share in an engine, for they are one matrix there; and what all experts share.
OF_BOTH = ("weight_scale_2", "weight_global_scale", "scale_2", "input_scale", "input_global_scale")
OF_ALL = ("input_scale", "input_global_scale")
AGAIN = "quantise again: what this scales is lost"
Bytes = NDArray[np.uint8]
_most = np.maximum.reduce
Report = Callable[[int], None]


class Look(NamedTuple):
    """One tensor to look at.

    slices: experts that lie one behind the other in it, 0 for what is not compared. inside: of an MoE layer. want:
    shapes of its matrix as floats. bound: that its indices are below, 0 for what has none. signed: a scale that may be
    negative.
    """

    entry: Stored
    end: str
    slices: int
    inside: bool
    want: tuple[Shape, ...] = ()
    bound: int = 0
    signed: bool = False


class Files:
    """The folder's files, mapped one at a time."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._file = ""
        self._map: mmap.mmap | None = None
        self._given_back = 0

    def bytes_of(self, entry: Stored) -> Bytes:
        """A view of the file."""
        mapped = self._mapped(entry.file)
        size = entry.end - entry.begin
        start = self._folder.data[entry.file] + entry.begin
        if size and (mapped is None or len(mapped) < start + size):
            raise CheckpointError(f"{self._folder.path / entry.file}: changed while it was read; judge it again")
        if mapped is None or not size:
            return np.empty(0, np.uint8)
        return np.frombuffer(mapped, np.uint8, size, start)

    def read(self, entry: Stored, until: int) -> None:
        """Release pages up to this byte of the entry."""
        mapped = self._map
        if mapped is None or not hasattr(mapped, "madvise"):
            return
        at = (self._folder.data[entry.file] + entry.begin + until) // mmap.PAGESIZE * mmap.PAGESIZE
        if at - self._given_back >= WINDOW:
            mapped.madvise(mmap.MADV_DONTNEED, self._given_back, at - self._given_back)
            self._given_back = at

    def forget(self) -> None:
        """Release all pages."""
        if self._map is not None and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _mapped(self, file: str) -> mmap.mmap | None:
        if file != self._file:
            try:
                with open(self._folder.path / file, "rb") as stream:
                    self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:  # an empty file
                self._map = None
            except OSError as error:
                raise CheckpointError(
                    f"{self._folder.path / file}: cannot be mapped ({error.strerror}); judge it again"
                ) from error
            self._file, self._given_back = file, 0
        return self._map


def look(folder: Folder, layout: Layout | None, held: Sorted, findings: Findings, report: Report) -> None:
    """Read every tensor. report: is told of bytes as they are read."""
    values = _Values(folder, findings, report)
    looks = sorted(_looks(folder, layout, held), key=lambda one: (one.entry.file, one.entry.begin))
    for one in looks:
        values.tensor(one)
    halves: dict[tuple[Stack, int, str], dict[int | None, Group]] = {}
    for (stack, index, pattern), group in held.groups.items():
        values.of_all(group)
        for piece in group.spelling.pieces:
            if piece.target.endswith("experts.w13"):
                halves.setdefault((stack, index, pattern.rpartition(".")[0]), {})[piece.half] = group
    for both in halves.values():
        if both.keys() >= {0, 1}:
            values.of_both(both[0], both[1])
    values.finish()


def _looks(folder: Folder, layout: Layout | None, held: Sorted) -> Iterator[Look]:
    for (stack, index, _), group in held.groups.items():
        layer = layout.layer(stack, index)[0] if layout else None
        for number, matrix in group.experts.items():
            piece = group.spelling.pieces[0]
            routed = ".experts.w" in f".{piece.target}" and piece.experts != "identity" and layer is not None
            slices, kind = 0, kind_of(matrix.members)
            if routed and layer is not None and kind != "bnb4":
                slices = 1 if number is not None else layer.sizes.experts
            want = _shapes(piece, layer, number is not None) if layer is not None else ()
            for end, entry in matrix.stored.items():
                bound = 0
                if end in ("g_idx", "weight_g_idx"):
                    bound = _groups(matrix)
                elif layer is not None and piece.target.endswith("router.table"):
                    bound = layer.sizes.experts
                yield Look(entry, end, slices if end in CARRIERS else 0, True, want, bound, kind in INTEGER)
    for stored in held.outside.values():
        # What is called a scale and belongs to no quantised weights, as a norm's, is a weight.
        kind = kind_of(Matrix(stored).members)
        for end, entry in stored.items():
            yield Look(entry, end if kind else "weight", 0, False, signed=kind in INTEGER)


def _shapes(piece: Piece, layer: Layer, by_expert: bool) -> tuple[Shape, ...]:
    """Rows and columns of a matrix as floats; of one that is stored transposed, either way."""
    if piece.target not in layer.tensors:
        return ()
    found = stored_shape(piece, layer.tensors[piece.target], layer.sizes, by_expert)[-2:]
    return (found, found[::-1]) if "transposed" in piece.ops else (found,)


def _groups(matrix: Matrix) -> int:
    """How many groups of columns GPTQ's g_idx may name."""
    scales = matrix.stored.get("scales")
    return scales.shape[-2] if scales and len(scales.shape) > 1 else 0


class _Values:
    def __init__(self, folder: Folder, findings: Findings, report: Report) -> None:
        self._files, self._findings, self._report = Files(folder), findings, report
        # Experts' weights by length and the bytes at both ends: name, place in the tensor.
        self._seen: dict[tuple[int, bytes, bytes], list[tuple[Stored, int, int]]] = {}
        self._single: dict[str, float] = {}

    def tensor(self, one: Look) -> None:
        entry = one.entry
        raw = self._files.bytes_of(entry)
        if one.end in SCALES or one.end in MAXIMA:
            self._scales(one, raw)
        elif entry.dtype in _FLOATS:
            self._numbers(one, raw)
        elif entry.dtype in INTEGERS:
            self._integers(one, raw)
        self._experts(one, raw)
        self._files.read(entry, len(raw))
        self._report(len(raw))

    def _numbers(self, one: Look, raw: Bytes) -> None:
        """NaN and infinities of weights."""
        width, top = _FLOATS[one.entry.dtype]
        sign = 1 << (8 * width - 1)
        signed, unsigned = _views(width)
        bad = nan = 0
        above, below, step = raw.view(signed), raw.view(unsigned), STEP // width
        for at in range(0, len(below), step):
            if int(_most(above[at : at + step])) >= top or int(_most(below[at : at + step])) >= top + sign:
                magnitude = below[at : at + step] & unsigned(sign - 1)
                bad += int((magnitude >= top).sum())
                nan += int((magnitude > _infinity(one.entry.dtype, top)).sum())
            self._files.read(one.entry, at * width)
        if nan or (bad and one.inside):
            got = " and ".join(f"{count:,} {what}" for count, what in ((nan, "NaN"), (bad - nan, "infinite")) if count)
            total = len(raw) // width
            self._add("not-finite", one, f"{got} of {total:,} values", "numbers", "export it again: it computes NaN")

    def _scales(self, one: Look, raw: Bytes) -> None:
        """Scales that are zero, negative, NaN or infinite."""
        entry = one.entry
        total = max(len(raw) * 8 // BITS[entry.dtype], 1)
        if entry.dtype in E8M0:
            # No zero and no sign; absmax in bytes are codes of another table.
            nan = sum(int((part == 255).sum()) for part, _ in _parts(raw)) if one.end in SCALES else 0
            self._bad(one, {"NaN": nan}, total)
            return
        if entry.dtype not in _FLOATS:
            return
        width, top = _FLOATS[entry.dtype]
        sign = 1 << (8 * width - 1)
        signed, unsigned = _views(width)
        counts = dict.fromkeys(("zero", "negative", "NaN", "infinite"), 0)
        for part, _ in _parts(raw):
            mine = part.view(signed)
            if int(mine.min()) > 0 and int(mine.max()) < top:
                continue
            codes = part.view(unsigned)
            magnitude = codes & unsigned(sign - 1)
            infinity = _infinity(entry.dtype, top)
            nan = magnitude > infinity
            counts["NaN"] += int(nan.sum())
            counts["infinite"] += int((magnitude == infinity).sum()) if infinity >= top else 0
            counts["zero"] += int((magnitude == 0).sum()) if one.end not in MAXIMA else 0
            if not (one.signed and one.end in SIGNED):
                counts["negative"] += int(((codes > sign) & (magnitude < top)).sum())
        self._bad(one, counts, total)
        if total == 1 and len(raw):
            self._single[entry.name] = _value(entry.dtype, raw)

    def _bad(self, one: Look, counts: Mapping[str, int], total: int) -> None:
        for what, count in counts.items():
            if count:
                kind = f"scale-{'nan' if what == 'NaN' else what}"
                self._add(kind, one, f"{count:,} of {total:,} scales {what}", "all of them above 0 and finite", AGAIN)

    def _integers(self, one: Look, raw: Bytes) -> None:
        """Indices out of range, and stored shapes that differ from the matrix's."""
        values = raw.view(np.int32 if one.entry.dtype == "I32" else np.int64)
        if not values.size:
            return
        if one.end == "weight_shape":
            got = tuple(map(int, values[-2:]))
            if one.want and got not in one.want:
                do = "write it anew: engines unpack by it"
                self._add("contradiction", one, f"shape {list(got)}", f"{list(one.want[0])}, as config.json says", do)
        elif one.bound:
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= one.bound:
                do = "export it again: it names what is not there"
                self._add("index-beyond", one, f"indices from {low} to {high}", f"0 to {one.bound - 1}", do)

    def _experts(self, one: Look, raw: Bytes) -> None:
        """Experts that are all zero, or equal to another."""
        if not one.slices or not len(raw) or len(raw) % one.slices:
            return
        size = len(raw) // one.slices
        zero: list[int] = []
        for number in range(one.slices):
            mine = raw[number * size : (number + 1) * size]
            if _is_zero(mine, one.entry.dtype):
                zero.append(number)
                continue
            key = size, mine[:PROBE].tobytes(), mine[-PROBE:].tobytes()
            self._seen.setdefault(key, []).append((one.entry, number, one.slices))
        if zero:
            which = f"of its experts {few(zero)}" if one.slices > 1 else "it"
            do = "export again, or train on: these experts add nothing"
            self._add("expert-zero", one, f"{which} all zero", "weights", do)

    def finish(self) -> None:
        """Compare experts that are equal at both ends, byte by byte."""
        for (size, _, _), held in self._seen.items():
            first, *others = held
            for other in others:
                if self._equal(first, other, size):
                    self._findings.add(
                        "expert-equal",
                        other[0].file,
                        other[0].name,
                        got=f"{_which(other)} equal to {_which(first)} of {plainly(first[0].name)}",
                        want="experts that differ",
                        do="export again: one of them was written in the place of another",
                    )

    def _equal(self, first: tuple[Stored, int, int], other: tuple[Stored, int, int], size: int) -> bool:
        for at in range(0, size, STEP):
            mine, theirs = (
                self._files.bytes_of(entry)[number * size : (number + 1) * size][at : at + STEP].copy()
                for entry, number, _ in (first, other)
            )
            if not np.array_equal(mine, theirs):
                return False
        self._files.forget()
        return True

    def of_all(self, group: Group) -> None:
        """Scales that all experts have in common in an engine."""
        for end in OF_ALL:
            entries = [matrix.stored[end] for matrix in group.experts.values() if end in matrix.stored]
            found = {entry.name: self._single[entry.name] for entry in entries if entry.name in self._single}
            if len(set(found.values())) > 1:
                self._findings.add(
                    "scale-unequal",
                    entries[0].file,
                    list(found),
                    got=f"{end} of experts that differ",
                    want="one for all experts",
                    do="know that engines take the largest for all",
                    level="note",
                )

    def of_both(self, gates: Group, ups: Group) -> None:
        """Scales that gate and up of an expert have in common in an engine, which makes one matrix of them."""
        for number, gate in gates.experts.items():
            up = ups.experts.get(number)
            for end in OF_BOTH if up is not None else ():
                one, two = gate.stored.get(end), up.stored.get(end) if up else None
                if one and two and self._single.get(one.name) != self._single.get(two.name):
                    self._findings.add(
                        "scale-unequal",
                        one.file,
                        (one.name, two.name),
                        got=f"{end} {self._single.get(one.name)} of gate and {self._single.get(two.name)} of up",
                        want="one for both: engines keep one for the matrix that they make of them",
                        do="quantise gate and up together",
                    )

    def _add(self, kind: str, one: Look, got: str, want: str, do: str) -> None:
        self._findings.add(kind, one.entry.file, one.entry.name, got=got, want=want, do=do)


def _which(held: tuple[Stored, int, int]) -> str:
    return f"expert {held[1]}" if held[2] > 1 else "weights"


def _views(width: int) -> tuple[Any, Any]:
    signed: Mapping[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
    unsigned: Mapping[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    return signed[width], unsigned[width]


def _infinity(dtype: str, top: int) -> int:
    """The pattern of infinity; e4m3fn has none, and one NaN."""
    return top - 1 if dtype == "F8_E4M3" else top


def _parts(raw: Bytes) -> Iterator[tuple[Bytes, int]]:
    for at in range(0, len(raw), STEP):
        yield raw[at : at + STEP], at


def _is_zero(raw: Bytes, dtype: str) -> bool:
    """Whether every value is 0 or -0; of most, the first bytes say that not."""
    width, _ = _FLOATS.get(dtype, (1, 0))
    _, unsigned = _views(width)
    magnitudes = unsigned((1 << (8 * width - 1)) - 1) if dtype in _FLOATS else unsigned(255)
    first = raw[: PROBE * 8].view(unsigned) & magnitudes
    return not first.any() and not any((part.view(unsigned) & magnitudes).any() for part, _ in _parts(raw))


def _value(dtype: str, raw: Bytes) -> float:
    """The one value of a tensor of floats."""
    if dtype == "BF16":
        return float((raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)[0])
    if dtype in FP8:
        return float(raw[0])  # compared only
    kinds: Mapping[str, Any] = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    return float(raw.view(kinds[dtype])[0])


class Progress:
    """A bar on a terminal; nothing elsewhere."""

    def __init__(self, total: int, stream: Any) -> None:
        self._total, self._stream, self._done, self._shown = max(total, 1), stream, 0, -1
        self._is_shown = stream.isatty()

    def __call__(self, count: int) -> None:
        self._done += count
        share = self._done * 100 // self._total
        if self._is_shown and share != self._shown:
            self._shown = share
            filled = "#" * (share * 30 // 100)
            text = f"\r[{filled:30}] {share:3} % of {self._total / 1e9:.1f} GB"
            self._stream.write(text + ("\r" + " " * len(text) + "\r" if self._done >= self._total else ""))
            self._stream.flush()
