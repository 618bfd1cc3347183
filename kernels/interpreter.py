"""Triton's interpreter without what it does over and over; for a process of our own that interprets.

Triton 3.9 makes triton.language's functions interpreted ones anew for each device function that a kernel calls, which
is half of what a small kernel costs, and checks each integer operation for overflow by computing it twice.
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

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang = lambda fn: patch_language(everything)
    interpreter.InterpretedFunction.__call__ = call
    interpreter._is_light = True
    if not check_overflow:
        options = interpreter.interpreter_builder.options
        object.__setattr__(options, "sanitize_overflow", False)
