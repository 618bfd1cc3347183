"""Comparisons that explain themselves: each raises `Nonconformance` with the first bad place, got and want."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_conformance.errors import Nonconformance, Unsupported
from moe_conformance.oracle.bounds import Bound

# Bounds below are 0, and what a float32 loses when it underflows.
UNDERFLOW = 2.0**-100


def _where(flat_index: int, shape: Sequence[int]) -> str:
    index = []
    for size in reversed(shape):
        index.append(flat_index % size)
        flat_index //= size
    return "[" + ", ".join(str(i) for i in reversed(index)) + "]"


def shape_and_type(what: str, got: Any, shape: Sequence[int], integer: bool | None = None) -> Tensor:
    """`got` must be a tensor of this shape; integer says whether its dtype must be one (None: either)."""
    if not issubclass(type(got), Tensor):  # isinstance would ask the answer itself
        raise Nonconformance(f"{what}: got {type(got).__name__}, want a tensor")
    if tuple(got.shape) != tuple(shape):
        raise Nonconformance(f"{what}: got shape {list(got.shape)}, want {list(shape)}")
    if integer is not None and (got.is_complex() or integer == got.is_floating_point()):
        raise Nonconformance(f"{what}: got {got.dtype}, want {'an integer' if integer else 'a float'} dtype")
    return got  # type: ignore[no-any-return]


def numbers(what: str, got: Any, shape: Sequence[int], integer: bool | None = None) -> Tensor:
    """The numbers in an answer of this shape, on the CPU; a tensor subclass cannot intercept that."""
    shape_and_type(what, got, shape, integer)
    if type(got) is not Tensor and type(got).__torch_dispatch__ is Tensor.__torch_dispatch__:
        got = Tensor.as_subclass(got, Tensor)
    if got.is_meta or _is_fake(got) or got.layout is not torch.strided:
        raise Nonconformance(f"{what}: got a {type(got).__name__}, {got.layout} on {got.device}, want numbers")
    return got.detach().cpu()  # type: ignore[no-any-return]


def _is_fake(tensor: Tensor) -> bool:
    """Only if the module is already imported: importing it takes long."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def equal(what: str, got: Tensor, want: Tensor) -> None:
    """Same shape and same values; integer dtypes may differ in width, NaN equals NaN."""
    is_integer = not (want.is_floating_point() or want.dtype is torch.bool)
    got, want = numbers(what, got, want.shape, True if is_integer else None), want.detach().cpu()
    if got.is_complex():
        raise Nonconformance(f"{what}: got {got.dtype}, want {want.dtype}")
    if want.is_floating_point():
        bad = ~((got.double() == want.double()) | (got.isnan() & want.isnan()))
    else:
        bad = got.long() != want.long()
    _report(what, got, want, bad, "")


def close(what: str, got: Tensor, want: Tensor, bound: Bound) -> None:
    """|got - want| <= bound, element by element; NaN or infinity in `got` fails, and NaN in `want`, too."""
    got, want = numbers(what, got, want.shape, integer=False).double(), want.detach().cpu().double()
    error, limit = (got - want).abs(), bound.limit.cpu()
    bad = ~(error <= limit)
    _report(what, got, want, bad, _of_errors(error[bad], limit.expand(error.shape)[bad], bound.origin))


def _of_errors(errors: Tensor, limits: Tensor, origin: str) -> str:
    """How far beyond the bound the worst number is; of a bound of 0 no multiple says that."""
    numbers = ~errors.isnan()
    if not numbers.any():
        return ""
    errors, limits = errors[numbers], limits[numbers]
    worst = int((errors / limits).argmax())
    error, limit = errors[worst].item(), limits[worst].item()
    if limit > UNDERFLOW:
        return f"; largest error is {error / limit:.3g} times the bound ({origin})"
    return f"; largest error is {error:.3g} where the bound is {'about ' if limit else ''}0 ({origin})"


def is_close(got: Tensor, want: Tensor, bound: Bound) -> bool:
    """Whether `close` would let it pass."""
    return bool(((got.detach().cpu().double() - want.double()).abs() <= bound.limit).all())


def written(what: str, got: Tensor) -> None:
    """No element is NaN, which fresh memory holds while cases run, and no input of the call."""
    got = numbers(what, got, got.shape)
    bad = got.isnan() if got.is_floating_point() else got == torch.iinfo(got.dtype).max
    if count := int(bad.sum()):
        place = _where(int(bad.flatten().to(torch.uint8).argmax()), bad.shape)
        value = "NaN" if got.is_floating_point() else "the dtype's largest"
        raise Nonconformance(
            f"{what}: {count} of {bad.numel()} elements were never written, or made of what was not, first at {place}: "
            f"got {value}, which fresh memory holds while cases run; write every element, or begin with zeros"
        )


def _report(what: str, got: Tensor, want: Tensor, bad: Tensor, detail: str) -> None:
    count = int(bad.sum())
    if not count:
        return
    first = int(bad.flatten().to(torch.uint8).argmax())
    got_value, want_value = got.flatten()[first].item(), want.flatten()[first].item()
    place = _where(first, bad.shape) if bad.ndim else "value"
    holes = [name for name, value in (("got", got_value), ("want", want_value)) if value != value]
    if holes:
        detail = f"; hole in {' and in '.join(holes)}: never written, or made of what was not or of no number{detail}"
    raise Nonconformance(
        f"{what}: {count} of {bad.numel()} differ, first at {place}: got {got_value}, want {want_value}{detail}"
    )


def same(what: str, got: Any, want: Any) -> None:
    """Plain equality of plain data."""
    if got != want:
        raise Nonconformance(f"{what}: got {got!r}, want {want!r}")


def refused(what: str, call: Callable[[], Any], mentions: Sequence[str] = ()) -> BaseException:
    """`call` must raise, and the message must contain every word of `mentions`."""
    try:
        returned = call()
    except Unsupported:
        raise
    except Exception as error:
        text = str(error)
        absent = [word for word in mentions if word not in text]
        if absent:
            raise Nonconformance(
                f"{what}: raised {type(error).__name__}, but its message does not name {', '.join(absent)}: {text}"
            ) from error
        return error
    raise Nonconformance(f"{what}: got {_short(returned)}, want an error")


def _short(value: Any) -> str:
    if value is None:
        return "no error"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
