"""Inputs of a stage on the engine's device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Moved = TypeVar("Moved")


def to_device(inputs: Moved, device: str) -> Moved:
    """The same with every tensor on that device: in dataclasses, mappings, tuples, NamedTuples and lists, at any depth.

    Tensors keep their strides and the memory between their rows. A value in which no tensor moves is returned as it is.
    """
    found: Any = _moved(inputs, device)
    return found  # type: ignore[no-any-return]


def _moved(value: Any, device: str) -> Any:
    from torch import Tensor

    if isinstance(value, Tensor):
        return _tensor(value, device)
    if is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in fields(value)}
        changed = {name: new for name, part in old.items() if (new := _moved(part, device)) is not part}
        return replace(value, **changed) if changed else value
    if isinstance(value, Mapping):
        items = {key: _moved(part, device) for key, part in value.items()}
        return items if any(items[key] is not part for key, part in value.items()) else value
    if isinstance(value, (tuple, list)):
        parts = [_moved(part, device) for part in value]
        if all(new is part for new, part in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


# Memory that is larger, in bytes, is mostly room between rows, which is not read to be moved.
_MOVED_WHOLE = 1 << 30


def _tensor(tensor: Tensor, device: str) -> Tensor:
    if tensor.is_contiguous() or tensor.device.type == device:
        return tensor.to(device)
    if tensor.untyped_storage().nbytes() > _MOVED_WHOLE:
        import torch

        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)
    memory = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return memory.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
