"""What files of vLLM's models have beside experts, and a machine lacks: stand-ins through which nothing is put."""

from __future__ import annotations

import collections
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from torch import nn


class _Inert(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class Nothing(metaclass=_Inert):
    """Stands for any class, function or constant of what is absent, and for a CUDA event."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


class _State(nn.Module):
    """Stands for a cache that keeps no float32."""

    def __init__(self, **_: Any) -> None:
        super().__init__()


class _Tokenizer:
    def __init__(self) -> None:
        self.vocab = collections.defaultdict[str, int](int)


# By module and name, what models have beside experts that wants a tokenizer, or takes no float32.
BESIDE: Mapping[tuple[str, str], Any] = {
    ("vllm.model_executor.models.deepseek_ocr", "cached_tokenizer_from_config"): lambda *_: _Tokenizer(),
    ("vllm.model_executor.models.deepseek_ocr2", "cached_tokenizer_from_config"): lambda *_: _Tokenizer(),
    ("vllm.models.inkling.nvidia.model", "InklingConvState"): _State,
}


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


# Packages that files of models import for images and for attention on GPUs; nothing is put through either.
IMPORTED = ("torchvision", "cutlass", "cuda")


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in _absent():
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@cache
def _absent() -> tuple[str, ...]:
    return tuple(name for name in IMPORTED if importlib.util.find_spec(name) is None)


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Files of models can be imported although this machine lacks what their other parts need.

    What was imported meanwhile goes again, so that nobody else takes the stand-in for the package.
    """
    if not _absent():
        yield
        return
    finder = _Absent()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in _absent()]:
            del sys.modules[name]
