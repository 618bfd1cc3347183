"""The text of a script that makes calls of an engine, and compares what comes back with numbers that stand in it."""

from __future__ import annotations

import base64
import inspect
import re
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_conformance import engine as door
from moe_conformance.engine import EngineInfo, Repro, ShardInputs
from moe_conformance.judging import inputs as drawing
from moe_conformance.repro.wanted import Chosen, Rows

# A tensor of up to so many elements is written as numbers, a larger one as bytes.
_WRITTEN = 256
_WIDTH = 116


@dataclass(frozen=True)
class About:
    """What a script is of. clause: the contract's. adapter: module or file, and class. environment: of the engine's
    process."""

    engine: EngineInfo
    adapter: str
    stage: str
    case: str
    clause: str
    environment: Mapping[str, str]


def script(
    about: About,
    earlier: Sequence[Any],
    calls: Sequence[Any],
    shown: Repro | None,
    want: Rows | Chosen,
    made: Sequence[tuple[str, Tensor]],
) -> str:
    """earlier: calls that only go before. calls: those whose answers are compared, in sum. shown: the engine's own call
    of the one call that there is, or None: then the adapter makes it. made: how hashed tensors are drawn again."""
    tensors = _Tensors(made, about.engine.device)
    if shown is not None:
        call = "".join(f"t[{name!r}] = {tensors.name(value, name)}\n" for name, value in shown.tensors.items())
        call = f"t = {{}}\n{call}\n{shown.source.strip()}\n"
        imports = ""
    else:
        call, imports = _by_adapter(about, earlier, calls, tensors)
    through = f", driven through its adapter {about.adapter}, which needs moe-conformance" if shown is None else ""
    head = f"{about.engine.name} {about.engine.version} ({about.stage}){through}: {about.clause}"
    return "\n".join(
        [
            _docstring(head, f"Found by case {about.case} of moe-conformance. Exit code 0: the fault is not there."),
            _environment(about.environment),
            "import sys\n\nimport torch\n",
            imports,
            tensors.helpers(),
            "# Memory that nobody wrote holds NaN.\n"
            "torch.use_deterministic_algorithms(True, warn_only=True)\n"
            "torch.utils.deterministic.fill_uninitialized_memory = True\n",
            "# The inputs.",
            tensors.lines(),
            "# The call.",
            call,
            _compared(want),
        ]
    )


def _docstring(*paragraphs: str) -> str:
    text = "\n\n".join(textwrap.fill(paragraph, _WIDTH, break_on_hyphens=False) for paragraph in paragraphs)
    return '"""' + text.replace("\\", "\\\\").replace('"""', "'''") + '\n"""\n'


def _environment(variables: Mapping[str, str]) -> str:
    return f"import os\n\nos.environ |= {dict(variables)!r}\n" if variables else ""


class _Tensors:
    """Tensors of the calls, each written once under a name of its own."""

    def __init__(self, made: Sequence[tuple[str, Tensor]], device: str) -> None:
        self.made, self.device = made, device
        self.written: list[tuple[str, Tensor, str]] = []
        self.used: set[str] = set()

    def name(self, tensor: Tensor, wish: str) -> str:
        tensor = tensor.detach().cpu()
        for name, there, _ in self.written:
            if _same(there, tensor) and there.stride() == tensor.stride():
                return name
        stem = re.sub(r"\W+", "_", wish).strip("_") or "tensor"
        taken = {name for name, *_ in self.written}
        name = next(name for name in (stem, *(f"{stem}_{n}" for n in range(2, 999))) if name not in taken)
        self.written.append((name, tensor, self._expression(tensor)))
        return name

    def _expression(self, tensor: Tensor) -> str:
        text = self._drawn(tensor) or self._literal(tensor)
        if not tensor.is_contiguous():
            text = f"torch.empty_strided({tuple(tensor.shape)}, {tensor.stride()}, dtype={tensor.dtype}).copy_({text})"
        return text if self.device == "cpu" else f"({text}).to({self.device!r})"

    def _drawn(self, tensor: Tensor) -> str:
        if not tensor.is_floating_point() or tensor.numel() <= _WRITTEN:
            return ""
        for call, drawn in self.made:
            if drawn.shape == tensor.shape and _same(drawn.to(tensor.dtype), tensor):
                self.used.add(call.partition("(")[0])
                return call if drawn.dtype == tensor.dtype else f"{call}.to({tensor.dtype})"
        return ""

    def _literal(self, tensor: Tensor) -> str:
        if tensor.numel() <= _WRITTEN:
            self.used.add("nan")
            return f"torch.tensor({tensor.tolist()}, dtype={tensor.dtype}).reshape({tuple(tensor.shape)})"
        self.used.add("unpacked")
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        text = base64.b85encode(zlib.compress(raw, 9)).decode()
        return f"unpacked({text!r}, {tensor.dtype}, {tuple(tensor.shape)})"

    def lines(self) -> str:
        return "".join(f"{name} = {text}\n" for name, _, text in self.written)

    def helpers(self) -> str:
        """What the expressions need, this project's own code for what is hashed."""
        found = ["from math import inf, nan\n"]
        if "unpacked" in self.used:
            found.append(_UNPACKED)
        if drawn := self.used & {"normal", "fine", "windows", "distinct_logits"}:
            names = ["_mix", "hashed", "normal", "fine", *(drawn - {"normal", "fine"})]
            sources = [inspect.getsource(getattr(drawing, name)) for name in names]
            text = "\n\n".join(re.sub(r"\n    note\(.*\n", "\n", source) for source in sources)
            text = text.replace("bits(", "hashed(").replace("Tensor", "torch.Tensor").replace("Sequence[int]", "tuple")
            found.append(f"import hashlib\nimport math\n\n\n{text}")
        return "\n".join(found)


_UNPACKED = '''import base64
import zlib


def unpacked(text, dtype, shape):
    """A tensor from its bytes."""
    return torch.frombuffer(bytearray(zlib.decompress(base64.b85decode(text))), dtype=dtype).reshape(shape)

'''


def _same(a: Tensor, b: Tensor) -> bool:
    """In shape, dtype and bits, NaN included."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(one, other)


def _by_adapter(about: About, earlier: Sequence[Any], calls: Sequence[Any], tensors: _Tensors) -> tuple[str, str]:
    """The calls, and what they import."""
    kinds: set[str] = set()
    before = [f"engine.{about.stage}({_built(call, '', tensors, kinds)})" for call in earlier]
    asked = [f"engine.{about.stage}({_built(call, '', tensors, kinds)})" for call in calls]
    place, _, name = about.adapter.rpartition(":")
    where = ""
    if place.endswith(".py"):
        where, place = f"sys.path.insert(0, {str(Path(place).resolve().parent)!r})\n", Path(place).stem
    imports = f"{where}from {place} import {name}\n"
    imports += f"from moe_conformance.engine import {', '.join(sorted(kinds))}\n"
    lines = [f"engine = {name}()", *before]
    if isinstance(calls[0], ShardInputs):
        lines.append("got = sum(part.double() for part in [\n    " + ",\n    ".join(asked) + ",\n])")
    else:
        lines.append(f"got = {asked[0]}")
    return "\n".join(lines) + "\n", imports


def _built(value: Any, name: str, tensors: _Tensors, kinds: set[str]) -> str:
    """The expression that makes a value again. name: under which a tensor is written."""
    if isinstance(value, Tensor):
        return tensors.name(value, name)
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value).__name__
        assert hasattr(door, kind), kind
        kinds.add(kind)
        parts = [
            f"{item.name}={_built(getattr(value, item.name), item.name, tensors, kinds)}"
            for item in fields(value)
            if not _is_default(item, getattr(value, item.name))
        ]
        return f"{kind}({', '.join(parts)})"
    if isinstance(value, Mapping):
        return (
            "{" + ", ".join(f"{key!r}: {_built(part, str(key), tensors, kinds)}" for key, part in value.items()) + "}"
        )
    if isinstance(value, tuple):
        return "(" + "".join(f"{_built(part, name, tensors, kinds)}, " for part in value) + ")"
    return repr(value)


def _is_default(item: Any, value: Any) -> bool:
    return not isinstance(value, Tensor) and not isinstance(value, Mapping) and value == item.default


def _compared(want: Rows | Chosen) -> str:
    if isinstance(want, Rows):
        return (
            f"# The right answer of some rows, in float64, and the largest error of a correct engine\n"
            f"# ({want.origin}).\n"
            f"rows, dtype = {want.rows}, {want.dtype}\n"
            f"want = torch.tensor({_numbers(want.want)}, dtype=torch.float64).reshape({tuple(want.want.shape)})\n"
            f"limit = torch.tensor({_numbers(want.limit)}, dtype=torch.float64).reshape({tuple(want.limit.shape)})\n"
            + _COMPARE_ROWS
        )
    rows = "".join(f"    {row}: {pairs},\n" for row, pairs in want.rows.items())
    return (
        "# Row -> expert -> its weight and the largest error of a correct router; or the experts that there must be,\n"
        "# and those that there may be.\n"
        f"want = {{\n{rows}}}\n"
        f"top_k, drops_zero = {want.top_k}, {want.drops_zero}\n" + _COMPARE_CHOSEN
    )


def _numbers(tensor: Tensor) -> str:
    return "[" + ",\n    ".join(map(str, tensor.tolist())) + "]"


_COMPARE_ROWS = """
if got.dtype not in (dtype, torch.float64):
    sys.exit(f"got {got.dtype}, want {dtype}")
if got.shape[1:] != want.shape[1:] or len(got) <= max(rows, default=-1):
    sys.exit(f"got shape {list(got.shape)}, want {list(want.shape[1:])} in each row")
got = got[rows].detach().cpu().double()
bad = ~((got - want).abs() <= limit)
if bad.any():
    row, column = bad.nonzero()[0].tolist()
    sys.exit(
        f"{int(bad.sum())} of {bad.numel()} elements of rows {rows} differ, first [{rows[row]}, {column}]: "
        f"got {got[row, column]}, want {want[row, column]} +- {limit[row, column]:.2g}"
    )
print("as it should be: the fault is not there")
"""

_COMPARE_CHOSEN = """
ids, weights = (part.detach().cpu().tolist() for part in got)
for row, pairs in want.items():
    answer = list(zip(ids[row], weights[row]))[:top_k]
    if isinstance(pairs, tuple):
        must, may = pairs
        there = {expert for expert, _ in answer}
        if len(there) < top_k or not set(must) <= there <= set(may):
            sys.exit(f"row {row}: got experts {ids[row]}, want {must} among {top_k} different ones of {may}")
        continue
    found = {expert: weight for expert, weight in answer if expert >= 0 and (weight or not drops_zero)}
    if found.keys() != pairs.keys():
        sys.exit(f"row {row}: got experts {sorted(found)}, want {sorted(pairs)}")
    for expert, (weight, limit) in pairs.items():
        if not abs(found[expert] - weight) <= limit:
            sys.exit(f"row {row}: weight of expert {expert}: got {found[expert]}, want {weight} +- {limit:.2g}")
print("as it should be: the fault is not there")
"""
