"""Capture writes the rows it is given, or nothing, and never another row."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.errors import InputError
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import bits, integers
from moe_conformance.kernels import capture as capture_kernels
from moe_conformance.kernels.capture import capture
from moe_conformance.reference_impl import capture as reference_capture


def test_capture_is_the_reference(device: str) -> None:
    for ids_dtype in (torch.int32, torch.int64):
        for dtype in (torch.int32, torch.int16, torch.uint8):
            for rows, start, count in ((9, 0, 9), (9, 2, 5), (5, 5, 0), (700, 3, 640)):
                ids = integers((2 * rows, 3), "ids", 256).to(ids_dtype)
                ids[: 2 * start] = torch.iinfo(ids_dtype).min  # another rank's rows are never looked at
                ids[2 * (start + count) :] = 256
                _same_capture(ids[::2], start, count, dtype, 256, device)


def test_capture_by_several_programs_is_the_reference(device: str) -> None:
    """The check and the copy in two launches, as for more ids than one program holds."""
    with patch.object(capture_kernels, "capture_blocks", lambda *_: {"BLOCK_R": 4, "BLOCK_K": 4}):
        _same_capture(integers((37, 3), "ids", 60), 1, 35, torch.uint8, 60, device)
        refused_ids_change_nothing(device)


def _same_capture(
    ids: Tensor, start: int, count: int, dtype: torch.dtype, experts: int, device: str, rejected: int = 0
) -> None:
    """Every element of buffer and flags as the reference leaves them, what must not be written included."""
    outcomes = []
    for call, place in ((capture, device), (reference_capture.capture, "cpu")):
        buffer = (bits((count + 2, 5, 3), "buffer") % 100).to(dtype).to(place)
        flags = torch.tensor([0, 0, 0, rejected, 0], dtype=torch.int32, device=place)
        call(ids.to(place), start, count, buffer, 3, experts, flags)
        outcomes.append((buffer, flags))
    compare.equal("buffer", outcomes[0][0], outcomes[1][0])
    compare.equal("rejected", outcomes[0][1], outcomes[1][1])


def test_refused_ids_change_nothing(device: str) -> None:
    for bad in (-1, 60, 2**31 - 1, 2**32 + 5, -(2**63)):
        ids = integers((11, 3), "ids", 60)
        ids[7, 2] = bad
        _same_capture(ids, 1, 9, torch.int16, 60, device)
        _same_capture(ids, 1, 5, torch.int16, 60, device)  # the bad id is another rank's
        ids[3, 0] = ids[4, 1] = bad
        _same_capture(ids, 1, 9, torch.int16, 60, device)
    _same_capture(integers((11, 3), "ids", 60), 1, 9, torch.int16, 60, device, rejected=4)


def test_capture_refuses_what_it_cannot_do(device: str) -> None:
    ids = torch.zeros(4, 3, dtype=torch.int64, device=device)
    buffer, flags = torch.zeros(4, 2, 3, dtype=torch.uint8, device=device), torch.zeros(2, dtype=torch.int32)
    flags = flags.to(device)
    for what, arguments, words in (
        ("layer", (ids, 0, 4, buffer, 2, 60, flags), ("layer_id", "2")),
        ("negative layer", (ids, 0, 4, buffer, -1, 60, flags), ("layer_id", "-1")),
        ("rows", (ids, 1, 4, buffer, 0, 60, flags), ("1 to 5", "4 rows")),
        ("negative rows", (ids, -1, 4, buffer, 0, 60, flags), ("-1",)),
        ("K", (ids[:, :2], 0, 4, buffer, 0, 60, flags), ("2",)),
        ("float ids", (ids.float(), 0, 4, buffer, 0, 60, flags), ("float32",)),
        ("narrow buffer", (ids, 0, 4, buffer, 0, 257, flags), ("uint8", "256")),
        ("flags apart", (ids, 0, 4, buffer, 0, 60, flags.repeat(2)[::2]), ("contiguous",)),
    ):
        compare.same(what, type(compare.refused(what, lambda a=arguments: capture(*a), words)), InputError)
