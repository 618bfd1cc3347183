"""Whose memory an answer lies in, and whether a call wrote into what it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare


def tensors_in(value: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of inputs or of an answer, with its name; `where` names a tensor by itself."""
    if isinstance(value, Tensor):
        yield where, value
    elif is_dataclass(value):
        for item in fields(value):
            yield from tensors_in(getattr(value, item.name), item.name)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors_in(part, f"{where}[{key!r}]")
    elif isinstance(value, tuple):
        names = getattr(value, "_fields", None) or [f"{where}[{index}]" for index in range(len(value))]
        for name, part in zip(names, value, strict=True):
            yield from tensors_in(part, name)


def assert_unchanged(stage: str, call: Callable[[Any], Any], inputs: Any) -> None:
    """Two calls with these inputs leave every tensor of them as it was; the guard around a stage looks, too."""
    before = {name: tensor.clone() for name, tensor in tensors_in(inputs)}
    for _ in range(2):
        call(inputs)
        for name, tensor in tensors_in(inputs):
            compare.equal(f"{name}, after a call of {stage}", tensor, before[name])


def assert_own(stage: str, call: Callable[[Any], Any], inputs: Any, others: Any) -> None:
    """What a call returns lies in no memory of its inputs or of another output, and a later call does not change it."""
    answer = dict(tensors_in(call(inputs), stage))
    given = dict(tensors_in(inputs))
    for name, tensor in answer.items():
        for other, held in given.items():
            if _overlap(tensor, held):
                raise Nonconformance(f"{stage}: {name} lies in the memory of the input {other}; return a copy")
        for other, held in answer.items():
            if other != name and _overlap(tensor, held):
                raise Nonconformance(f"{stage}: {name} lies in the memory of {other}; give each its own")
    kept = {name: tensor.clone() for name, tensor in answer.items()}
    later = call(others)
    for name, tensor in answer.items():
        compare.equal(f"{name} of a call, after the next call", tensor, kept[name])
    del later


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether a byte may belong to both: their extents meet. Views that interleave do not count as apart."""
    if not a.numel() or not b.numel() or a.device != b.device:
        return False
    first, second = _extent(a), _extent(b)
    return first[0] < second[1] and second[0] < first[1]


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()
