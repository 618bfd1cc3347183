"""Tensors by canonical name, compared with what a spec asks for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moe_conformance.errors import InputError
from moe_conformance.model.specs import Shape


def check_tensors(want: Mapping[str, Shape], tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError, naming every one, for tensors that are missing, unknown or of another shape."""
    troubles = [f"{name} is missing, want {list(shape)}" for name, shape in want.items() if name not in tensors]
    troubles += [f"{name} is unknown" for name in tensors if name not in want]
    troubles += [
        f"{name}: got {list(tensors[name].shape)}, want {list(shape)}"
        for name, shape in want.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if troubles:
        raise InputError(f"tensors: {'; '.join(troubles)}; give exactly those of the spec")
