"""Triton's interpreter made fit for a process of our own that interprets.

Triton 3.9 makes triton.language's functions interpreted ones anew for each device function that a kernel calls, which
was a third of what a small kernel cost when profiled, and checks each integer operation for overflow by computing it
twice. Triton 3.6 cannot count a loop with NumPy 2.4, which turns arrays of one element into numbers no longer.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton.language as tl

from moe_conformance.kernels.launch import interpreted


def make_light(check_overflow: bool = False) -> None:
    """Patch the interpreter of this process; nothing where kernels are compiled, or its parts have other names.

    One launch patches the language once, for all device functions at once.
    """
    if not interpreted():
        return
    from triton.runtime import interpreter

    parts = ("_patch_lang", "InterpretedFunction", "interpreter_builder")
    if not all(hasattr(interpreter, part) for part in parts) or getattr(interpreter, "_is_light", False):
        return
    patch_language = interpreter._patch_lang
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_once(fn: Any) -> Any:
        scope = patch_language(everything)
        tl.core.tensor.__index__ = lambda self: int(self.handle.data.item())
        return scope

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.InterpretedFunction.__call__ = call
    interpreter._is_light = True
    if not check_overflow:
        object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
