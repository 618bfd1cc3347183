"""What a GPU's memory checker does, for interpreted kernels: no address outside the tensors that a launch was given.

Programs are also run last to first where asked: a GPU promises no order, so none may need another's result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime import interpreter


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a view, and the one behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size() if tensor.numel() else start


@contextlib.contextmanager
def checked(backwards: bool = False) -> Iterator[None]:
    """Inside, an access outside all tensors of its launch raises; TypeErrors of the checker itself do too."""
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    extents: list[tuple[int, int]] = []
    original = {name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store", "set_grid_idx")}
    original["create_atomic_rmw"] = builder.create_atomic_rmw
    to_host = executor._init_args_hst

    def remember(self: Any, positional: Any, named: Any) -> Any:
        host = to_host(self, positional, named)
        extents[:] = [_extent(arg) for arg in (*host[0], *host[1].values()) if isinstance(arg, torch.Tensor)]
        return host

    def check(kind: str, pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data)[np.broadcast_to(np.asarray(mask.data), np.shape(pointers.data))]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(addresses.shape, bool)
        for start, end in extents:
            inside |= (addresses >= start) & (addresses + np.uint64(size) <= end)
        if not inside.all():
            raise IndexError(f"{kind} of {(~inside).sum()} of {inside.size} elements outside all tensors of the launch")

    def load(pointers: Any, mask: Any, *rest: Any) -> Any:
        check("load", pointers, mask)
        return original["create_masked_load"](pointers, mask, *rest)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("store", pointers, mask)
        return original["create_masked_store"](pointers, value, mask, *rest)

    def atomic(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("atomic", pointers, mask)
        return original["create_atomic_rmw"](operation, pointers, value, mask, *rest)

    def place(*index: int) -> None:
        last = [size - 1 for size in builder.grid_dim]
        original["set_grid_idx"](*(end - i for end, i in zip(last, index, strict=True)) if backwards else index)

    with (
        patch.object(executor, "_init_args_hst", remember),
        patch.object(builder, "create_masked_load", load),
        patch.object(builder, "create_masked_store", store),
        patch.object(builder, "create_atomic_rmw", atomic),
        patch.object(builder, "set_grid_idx", place),
    ):
        yield
