"""Triton's interpreter made fit for a process of our own that interprets.

What it computes stays as it is; what it does for each operation, time and again, is done once (profiled with Triton
3.9, where a small kernel's time is all overhead):

- types of blocks, their shapes and numpy dtypes are made anew for every operation: here each is kept (light_types);
- the language's functions are patched anew for every launch, and for every device function that a kernel calls, and
  each call of them goes through two wrappers: here they are found once, and called directly (light_language).

Triton 3.9 also checks each integer operation for overflow by computing it twice, and Triton 3.6 cannot count a loop
with NumPy 2.4, which no longer converts one-element arrays to scalars.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton.language as tl

from moe_conformance.kernels.launch import interpreted

# What `make_light` replaces; a Triton that lacks one of them is left alone.
PARTS = (
    *("_patch_lang", "_patch_attr", "_LangPatchScope", "_get_np_dtype"),
    *("InterpretedFunction", "interpreter_builder", "interpreter_semantic"),
)


def make_light(check_overflow: bool = False) -> None:
    """Patch the interpreter of this process; nothing where kernels are compiled, or its parts have other names."""
    if not interpreted():
        return
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, part) for part in PARTS) or getattr(interpreter, "_is_light", False):
        return
    light_types(interpreter)
    light_language(interpreter)
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
        """All attributes of a tensor but those that are its own."""
        tensor = object.__new__(tl.tensor)
        make_tensor(tensor, None, kind)
        return {name: value for name, value in vars(tensor).items() if name not in ("handle", "type", "dtype")}

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        place = getattr(element_ty, "address_space", None)
        key = (element_ty.name, place, *[getattr(size, "value", size) for size in shape])
        kept = types.get(key)
        if kept is None:
            make_type(self, element_ty, shape)
            vars(self)["of_tensors"] = of_tensors(self)
            types[key] = dict(vars(self))
        else:
            vars(self).update(kept)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        shared = vars(type).get("of_tensors")
        if shared is None:
            shared = scalar if not type.is_block() else of_tensors(type)
        vars(self).update(shared, handle=handle, type=type, dtype=type.scalar)

    def np_dtype(kind: Any) -> Any:
        found = dtypes.get(kind.name)
        if found is None:
            found = dtypes[kind.name] = find_dtype(kind)
        return found

    scalar.update(of_tensors(tl.int32))
    tl.block_type.__init__ = init_type
    tl.tensor.__init__ = init_tensor
    interpreter._get_np_dtype = np_dtype


def light_language(interpreter: Any) -> None:
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
