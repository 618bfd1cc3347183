"""Capture writes the rows it is given, or nothing, and never another row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from moe_conformance.errors import InputError
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import bits, integers
from moe_conformance.kernels import capture as capture_kernels
from moe_conformance.kernels.capture import capture
from moe_conformance.reference_impl import capture as reference_capture


@pytest.mark.parametrize("ids_dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("dtype", (torch.int32, torch.int16, torch.uint8), ids=str)
@pytest.mark.parametrize("rows, start, count", ((9, 0, 9), (9, 2, 5), (5, 5, 0), (700, 3, 640)))
def test_capture_is_the_reference(
    device: str, rows: int, start: int, count: int, dtype: torch.dtype, ids_dtype: torch.dtype
) -> None:
    ids = integers((2 * rows, 3), "ids", 256).to(ids_dtype)
    ids[: 2 * start] = torch.iinfo(ids_dtype).min  # another rank's rows are never looked at
    ids[2 * (start + count) :] = 256
    _same_capture(ids[::2], start, count, dtype, 256, device)


@pytest.fixture(params=("one program", "several programs"))
def programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Several: the check and the copy in two launches, as for more ids than one program holds."""
    blocks = capture_kernels.capture_blocks
    few = {"BLOCK_R": 4, "BLOCK_K": 4}
    chosen = blocks if request.param == "one program" else lambda *_: few
    with patch.object(capture_kernels, "capture_blocks", chosen):
        yield


@pytest.mark.usefixtures("programs")
def test_every_row_is_captured(device: str) -> None:
    _same_capture(integers((37, 3), "ids", 60), 1, 35, torch.uint8, 60, device)


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


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("bad", (-1, 60, 2**31 - 1, 2**32 + 5, -(2**63)))
def test_refused_ids_change_nothing(device: str, bad: int) -> None:
    ids = integers((11, 3), "ids", 60)
    ids[7, 2] = bad
    _same_capture(ids, 1, 9, torch.int16, 60, device)
    _same_capture(ids, 1, 5, torch.int16, 60, device)  # the bad id is another rank's
    ids[3, 0] = ids[4, 1] = bad
    _same_capture(ids, 1, 9, torch.int16, 60, device)


@pytest.mark.usefixtures("programs")
def test_a_layer_that_has_refused_ids_takes_nothing_more(device: str) -> None:
    _same_capture(integers((11, 3), "ids", 60), 1, 9, torch.int16, 60, device, rejected=4)


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "layer": ({"layer_id": 2}, ("layer_id", "2")),
    "negative layer": ({"layer_id": -1}, ("layer_id", "-1")),
    "rows": ({"start": 1}, ("1 to 5", "4 rows")),
    "negative rows": ({"start": -1}, ("-1",)),
    "K": ({"ids": torch.zeros(4, 2, dtype=torch.int64)}, ("2",)),
    "float ids": ({"ids": torch.zeros(4, 3)}, ("float32",)),
    "narrow buffer": ({"experts": 257}, ("uint8", "256")),
    "flags apart": ({"rejected": torch.zeros(4, dtype=torch.int32)[::2]}, ("contiguous",)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_capture_refuses_what_it_cannot_do(device: str, what: str) -> None:
    changed, words = REFUSED[what]
    room = {"ids": torch.zeros(4, 3, dtype=torch.int64), "buffer": torch.zeros(4, 2, 3, dtype=torch.uint8)}
    given = room | {"rejected": torch.zeros(2, dtype=torch.int32)}
    given = {"start": 0, "count": 4, "layer_id": 0, "experts": 60, **given, **changed}
    on = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    compare.same("error", type(compare.refused(what, lambda: capture(**on), words)), InputError)
