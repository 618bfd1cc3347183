"""Speeds up Triton's interpreter in processes of this project that interpret.

Results are unchanged; work that it repeats for each operation is done once (profiled with Triton 3.9, where a small
kernel's time is all overhead):

- types of blocks, their shapes and numpy dtypes are made anew for every operation: here each is kept (light_types);
- the language's functions are patched anew for every launch, and for every device function that a kernel calls, and
  each call of them goes through two wrappers: here they are found once, and called directly (light_language);
- each sum or comparison of tensors looks up in what type they meet, casts, broadcasts and checks them: here this is
  found out once for each pair of types, by the interpreter itself, and numpy does the rest at once (light_operator,
  light_broadcast).

Triton 3.9 also checks each integer operation for overflow by computing it twice, and Triton 3.6 cannot count a loop
with NumPy 2.4, which no longer converts one-element arrays to scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl

from moe_conformance.kernels.launch import interpreted

Operator = Callable[..., Any]

# What `make_light` replaces. If a Triton lacks one of them, nothing is replaced.
PARTS = (
    *("_patch_lang", "_patch_attr", "_LangPatchScope", "_get_np_dtype"),
    *("InterpretedFunction", "TensorHandle", "interpreter_builder", "interpreter_semantic"),
)


def quotient(left: Any, right: Any) -> Any:
    """Integer division, rounding towards zero."""
    return (left - np.fmod(left, right)) // right


# What operators of tensors compute, in the types of EXACT.
FUNCTIONS: dict[str, Operator] = {
    "__getitem__": np.ndarray.__getitem__,
    **{"__add__": np.add, "__radd__": np.add, "__sub__": np.subtract, "__mul__": np.multiply, "__rmul__": np.multiply},
    **{"__lt__": np.less, "__le__": np.less_equal, "__gt__": np.greater, "__ge__": np.greater_equal},
    **{"__eq__": np.equal, "__ne__": np.not_equal, "__and__": np.bitwise_and, "__or__": np.bitwise_or},
    **{"__floordiv__": quotient, "__mod__": np.fmod},
}
CHECKED = (np.add, np.subtract, np.multiply)  # for overflow of integers
EXACT = (np.dtype("int32"), np.dtype("int64"), np.dtype("float32"))


def make_light(check_overflow: bool = False) -> None:
    """Patch the interpreter of this process. Does nothing if kernels are compiled, or if its parts have other names."""
    if not interpreted():
        return
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, part) for part in PARTS) or getattr(interpreter, "_is_light", False):
        return
    light_types(interpreter)
    light_language(interpreter, check_overflow)
    light_broadcast(interpreter)
    interpreter._is_light = True
    if not check_overflow:
        object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


def light_types(interpreter: Any) -> None:
    """Attributes of a type, or of a tensor of that type, are copied from the first one that was made."""
    types: dict[tuple[Any, ...], dict[str, Any]] = {}
    make_type, make_tensor, find_dtype = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    scalar: dict[str, Any] = {}
    dtypes: dict[str, Any] = {}

    def of_tensors(kind: Any) -> dict[str, Any]:
        """All attributes of a tensor that are the same for every tensor of its type."""
        tensor = object.__new__(tl.tensor)
        make_tensor(tensor, None, kind)
        return {name: value for name, value in vars(tensor).items() if name not in ("handle", "type", "dtype")}

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        place = getattr(element_ty, "address_space", None)
        key = (element_ty.name, place, *[getattr(size, "value", size) for size in shape])
        kept = types.get(key)
        if kept is None:
            make_type(self, element_ty, shape)
            vars(self)["of_tensors"] = {**of_tensors(self), "kind": key}
            types[key] = dict(vars(self))
        else:
            vars(self).update(kept)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        shared = vars(type).get("of_tensors")
        if shared is not None:
            vars(self).update(shared, handle=handle, type=type, dtype=type.scalar)
        elif type.is_block():
            vars(self).update(of_tensors(type), handle=handle, type=type, dtype=type.scalar)
        else:
            vars(self).update(scalar, handle=handle, type=type, dtype=type.scalar, kind=type.name)

    def np_dtype(kind: Any) -> Any:
        found = dtypes.get(kind.name)
        if found is None:
            found = dtypes[kind.name] = find_dtype(kind)
        return found

    scalar.update(of_tensors(tl.int32))
    tl.block_type.__init__ = init_type
    tl.tensor.__init__ = init_tensor
    interpreter._get_np_dtype = np_dtype


def light_language(interpreter: Any, check_overflow: bool) -> None:
    """One launch patches the language once, by a list that is made once."""
    patch_language, patch_attribute = interpreter._patch_lang, interpreter._patch_attr
    semantic = interpreter.interpreter_semantic
    wrapper = tl.core.builtin(lambda: None).__code__
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    found: list[tuple[Any, str, Any, Any]] = []

    def patch_directly(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        """As `_patch_attr`, without the wrapper that only looks whether somebody gave _semantic."""
        if getattr(member, "__code__", None) is not wrapper:
            patch_attribute(obj, name, member, builder, scope)
            return
        function = member.__wrapped__

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        if obj is tl.core.tensor:
            call = light_operator(interpreter, name, call, check_overflow)
        scope.set_attr(obj, name, call)

    def patch_once(fn: Any) -> Any:
        if not found:
            scope = patch_language(everything)
            tl.core.tensor.__index__ = lambda self: int(self.handle.data.item())
            found.extend((obj, name, before, vars(obj)[name]) for obj, name, before in scope._changes)
            return scope
        scope = interpreter._LangPatchScope()
        scope._changes = [change[:3] for change in found]
        for obj, name, _, after in found:
            setattr(obj, name, after)
        return scope

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_attr = patch_directly
    interpreter._patch_lang = patch_once
    interpreter.InterpretedFunction.__call__ = call


def light_broadcast(interpreter: Any) -> None:
    """Two tensors of one type are returned as they are; for others the broadcast types are computed once."""
    semantic = interpreter.interpreter_semantic
    broadcast = semantic.broadcast_impl_value
    plans: dict[tuple[Any, Any], tuple[Any, Any]] = {}

    def spread(tensor: Any, kind: Any) -> Any:
        if kind is None:
            return tensor
        data = np.broadcast_to(tensor.handle.data, kind.shape)
        return tl.tensor(interpreter.TensorHandle(data, tensor.handle.dtype), kind)

    def broadcast_planned(left: Any, right: Any) -> tuple[Any, Any]:
        kinds = kind_of(left), kind_of(right)
        if None in kinds:
            return tuple(broadcast(left, right))
        if kinds[0] == kinds[1]:
            return left, right
        if kinds in plans:
            mine, others = plans[kinds]
            return spread(left, mine), spread(right, others)
        wide_left, wide_right = broadcast(left, right)
        plans[kinds] = (
            None if wide_left is left else wide_left.type,
            None if wide_right is right else wide_right.type,
        )
        return wide_left, wide_right

    semantic.broadcast_impl_value = broadcast_planned


def light_operator(interpreter: Any, name: str, operator: Operator, check_overflow: bool) -> Operator:
    """The operator, which computes by a plan where there is one for the kinds of its operands.

    A plan is made beside the operator's own first result for those kinds, and kept if it gives that result to the bit.
    check_overflow: sums and products of integers are left to the operator, which checks them.
    """
    function = FUNCTIONS.get(name)
    if function is None:
        return operator
    plans: dict[tuple[Any, Any], Operator | None] = {}

    def operate(left: Any, right: Any) -> Any:
        if type(right) is tl.constexpr:
            right = right.value
        kinds = kind_of(left), kind_of(right)
        plan = plans.get(kinds)
        if plan is not None:
            return plan(left, right)
        result = operator(left, right)
        if None not in kinds and kinds not in plans:
            compute = plan_of(function, left, right, result, check_overflow)
            plans[kinds] = compute and computed_as(interpreter, compute, left, right, result)
        return result

    return operate


def kind_of(operand: Any) -> Any:
    """What the type of a result depends on; None for what no plan is made for.

    The type of a tensor, or of a number that fits 32 bits; of an index that adds axes and selects nothing, which axes.
    """
    if type(operand) is tl.tensor:
        return vars(operand).get("kind")
    if type(operand) is int:
        return int if -(2**31) <= operand < 2**31 else None
    if type(operand) is float:
        return float if operand == 0 or 2**-126 <= abs(operand) < 2**127 else None
    if type(operand) is tuple and all(part is None or part == slice(None) for part in operand):
        return tuple(part is None for part in operand)
    return None


def plan_of(function: Operator, left: Any, right: Any, result: Any, check_overflow: bool) -> Operator | None:
    """How numpy computes the data of a result, for all operands of these kinds; None where Triton's types have rules
    of their own."""
    if function is np.ndarray.__getitem__:
        return lambda tensor, index: tensor.handle.data[index]
    number = type(right) is not tl.tensor
    mine = left.handle.data.dtype
    others = mine if number else right.handle.data.dtype
    element = left.type.scalar
    size = max(1, element.element_ty.primitive_bitwidth // 8) if element.is_ptr() else 0
    met = result.handle.data.dtype if function in CHECKED else np.promote_types(mine, others)
    if size:
        fits = function is np.add and (number or others in EXACT[:2])
    elif mine == others == np.dtype(bool):
        fits = function in (np.bitwise_and, np.bitwise_or) and not number
    else:
        fits = {mine, others, met} <= set(EXACT) and not (check_overflow and function in CHECKED and met.kind == "i")
    if not fits or (type(right) is float and met.kind != "f"):
        return None

    def compute(left: Any, right: Any) -> Any:
        a = left.handle.data.astype(met, copy=False)
        b = np.array([right]).astype(met) if number else right.handle.data.astype(met, copy=False)
        return function(a, b * size if size else b)

    return compute


def computed_as(interpreter: Any, compute: Operator, left: Any, right: Any, result: Any) -> Operator | None:
    """An operator whose tensors are like result, with data as computed; None where those of result are others."""
    found, data = compute(left, right), result.handle.data
    if (found.dtype, found.shape, found.tobytes()) != (data.dtype, data.shape, data.tobytes()):
        return None
    attributes = {name: value for name, value in vars(result).items() if name != "handle"}
    element, new, make_handle = result.handle.dtype, object.__new__, interpreter.TensorHandle

    def plan(left: Any, right: Any) -> Any:
        handle, tensor = new(make_handle), new(tl.tensor)
        vars(handle).update(data=compute(left, right), dtype=element, attr={})
        vars(tensor).update(attributes, handle=handle)
        return tensor

    return plan
