"""Stand-ins for packages that SGLang imports beside its MoE code, where they are absent: for import only.

Whatever such a package is asked for is a class that raises Unsupported when it is called, so that nothing of it can
compute, or leave out, a routing, an expert or a sum.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any, NoReturn

from moe_conformance.errors import Unsupported

# Compiled kernels (sgl_kernel, tvm_ffi), images, tokenizers, checkpoint formats and grammars (to 0.5.20).
NAMES = ("gguf", "sentencepiece", "sgl_kernel", "torchvision", "tvm_ffi", "xgrammar")


class _Inert(type):
    """A class whose attributes are itself, and which cannot be called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *_: Any, **__: Any) -> NoReturn:
        raise Unsupported(f"SGLang calls {cls.__module__}, which is absent here: a stand-in is for import only")


def _any(*_: Any) -> dict[str, str]:
    """For pydantic, which asks the types of a model's fields: any value."""
    return {"type": "any"}


class _Package(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Inert(name, (), {"__module__": f"{self.__name__}.{name}", "__get_pydantic_core_schema__": _any})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Package(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def absent() -> tuple[str, ...]:
    """Those of NAMES that have a stand-in here."""
    finder = next((found for found in sys.meta_path if isinstance(found, _Finder)), None)
    if finder is not None:
        return finder.names
    return tuple(name for name in NAMES if importlib.util.find_spec(name) is None)


def install() -> None:
    """Put the stand-ins behind every other way to find a module. transformers, which looks too, is asked first."""
    names = absent()
    if not names or any(isinstance(found, _Finder) for found in sys.meta_path):
        return
    from transformers.utils import import_utils

    for name in names:
        asked = getattr(import_utils, f"is_{name}_available", None)
        if asked is not None:
            asked()  # it keeps its answer
    sys.meta_path.append(_Finder(names))
