"""What a stage is called with and what form its answer must have: the protocol's own signatures and docstrings."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from moe_conformance import engine
from moe_conformance.protocol.engine import Engine

_WIDTH = 110
# Further methods of a stage, besides the one with its name.
_BESIDE = {"capture_store": ("capture_reader",)}


def form(stages: Iterable[str]) -> str:
    """For each stage: its method, and each type of its signature with its fields. Each type is described once."""
    letters = inspect.cleandoc(engine.__doc__ or "").partition("Letters:")[2].partition("\n\n")[0]
    lines = [textwrap.fill(f"letters: {' '.join(letters.split())}", _WIDTH)]
    told: set[str] = set()
    for stage in stages:
        lines.append("")
        for name in (stage, *_BESIDE.get(stage, ())):
            lines += _method(getattr(Engine, name), told)
        lines.append(f"  what it may decline: moe-conformance features {stage}")
    return "\n".join(lines)


def _method(method: Any, told: set[str]) -> Iterator[str]:
    """A signature, the docstring below it, and the types in it that were not told yet."""
    signature = inspect.signature(method)
    takes = [f"{item.name}: {item.annotation}" for item in signature.parameters.values() if item.name != "self"]
    yield _wrapped(f"{method.__name__}({', '.join(takes)}) -> {signature.return_annotation}")
    yield from _indented(inspect.getdoc(method) or "")
    yield from _types(f"{takes} {signature.return_annotation}", told)


def _types(annotations: str, told: set[str]) -> Iterator[str]:
    """The types of the protocol that are named here, each once: its fields or methods, and its docstring."""
    for name in re.findall(r"\w+", annotations):
        kind = getattr(engine, name, None) if name in engine.__all__ else None
        if not inspect.isclass(kind) or name in told:
            continue
        told.add(name)
        # A NamedTuple keeps its annotations as ForwardRef, a dataclass as text.
        found = inspect.get_annotations(kind).items()
        fields = {field: str(getattr(what, "__forward_arg__", what)) for field, what in found}
        held = [f"{field}: {what}" for field, what in fields.items() if not what.startswith("ClassVar")]
        yield textwrap.indent(_wrapped(f"{name}({', '.join(held)})" if held else name), "  ")
        # a dataclass without a docstring gets a generated one that only repeats the fields.
        doc = inspect.cleandoc(kind.__doc__ or "")
        yield from ([] if doc.startswith(f"{name}(") else _indented(doc, "    "))
        if getattr(kind, "_is_protocol", False):
            for method in vars(kind).values():
                if inspect.isfunction(method) and not method.__name__.startswith("_"):
                    yield from _indented("\n".join(_method(method, told)), "    ")


def _indented(text: str, indent: str = "  ") -> list[str]:
    return [textwrap.indent(line, indent) for line in text.splitlines()]


def _wrapped(signature: str) -> str:
    return textwrap.fill(signature, _WIDTH, subsequent_indent="    ", break_long_words=False)
