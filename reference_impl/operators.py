"""Opaque operators for what neither fake tensors nor torch.compile can trace: data-dependent rows, kernel launches.

Registered with torch.library directly, because the first call of custom_op imports all of Dynamo.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

_SCHEMA_TYPES = {int: "int", float: "float", bool: "bool", str: "str"}


def arguments(spec: type, without: Collection[str] = ()) -> str:
    """A spec's fields as the keyword arguments of a schema: "*, int width, str activation, ...".

    without: fields that the operator does not take. Raises TypeError for a field that is neither number, bool, str nor
    a Literal of strings.

    >>> from moe_conformance.model.specs import LatentSpec
    >>> arguments(LatentSpec)
    '*, int width, float norm_eps, bool bias'
    """
    hints = get_type_hints(spec)
    taken = [field.name for field in fields(spec) if field.name not in without]
    return "*, " + ", ".join(f"{_schema_type(spec, name, hints[name])} {name}" for name in taken)


def keywords(spec: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """The arguments of an operator with `arguments` of this spec's class; `type(spec)(**keywords)` is the spec."""
    return {field.name: getattr(spec, field.name) for field in fields(spec) if field.name not in without}


def _schema_type(spec: type, name: str, hint: Any) -> str:
    if get_origin(hint) is Literal and all(isinstance(value, str) for value in get_args(hint)):
        return "str"
    if hint not in _SCHEMA_TYPES:
        raise TypeError(
            f"{spec.__name__}.{name}: got {hint}, want int, float, bool, str or a Literal of strings; "
            "leave it out by `without`, or say how a schema has it"
        )
    return _SCHEMA_TYPES[hint]


_library = torch.library.Library("moe_conformance", "FRAGMENT")


def operator(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator `torch.ops.moe_conformance.NAME` with this schema, "NAME(Tensor x, ...) -> ...".

    function computes it on any device; fake gives the shapes and dtypes of its results.
    """
    _library.define(schema)
    name = schema.partition("(")[0]
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moe_conformance::{name}", fake, lib=_library)
    return getattr(torch.ops.moe_conformance, name)
