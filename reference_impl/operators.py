"""Opaque operators, for what neither fake tensors nor torch.compile can follow: data-dependent rows, kernel launches.

Registered below torch.library.custom_op, whose first call imports all of Dynamo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import Field
from typing import Any

import torch


def arguments(fields: Sequence[Field[Any]]) -> str:
    """Fields of a spec as part of a schema; one that is neither number nor bool is a str."""
    return ", ".join(
        f"{field.type if field.type in ('int', 'float', 'bool') else 'str'} {field.name}" for field in fields
    )


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
