"""Dispatch gives each pair the reference's own slot, in one launch or in three."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from moe_conformance.errors import InputError
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import bits, distinct_logits, integers, poison_, poisoned_allocations
from moe_conformance.kernels import dispatch
from moe_conformance.reference_impl import dispatch as reference_dispatch

# T, K, E, block: pairs that fill no tile, an expert for each and many for one, the largest K and E.
SHAPES = (
    *((1, 1, 1, 1), (1, 8, 128, 16), (7, 3, 5, 8), (63, 4, 60, 16), (131, 8, 128, 64), (33, 22, 512, 16)),
    *((0, 3, 5, 8), (5, 3, 257, 1), (128, 2, 4, 64), (40, 1, 1, 128), (9, 4, 1024, 4)),
    # Two programs of 16 pairs, whose even shares of 8 leave one over.
    (17, 1, 17, 1),
    # More slots of padding, and more blocks times experts, than a program fills at a time.
    (8, 8, 1024, 128),
)


def _maps(experts: int) -> dict[str, Tensor | None]:
    """All experts, every second one in another order than theirs, and none at all."""
    some = torch.full((experts,), -1, dtype=torch.int32)
    held = bits((experts,), "held").argsort()[: experts // 2]
    some[held] = torch.arange(len(held), dtype=torch.int32)
    return {"no map": None, "half": some, "idle": torch.full((experts,), -1, dtype=torch.int32)}


def _ids(tokens: int, top_k: int, experts: int, kind: str) -> Tensor:
    if kind == "one expert":
        return torch.full((tokens, top_k), experts - 1)
    if kind == "outside":
        ids = integers((tokens, top_k), "outside", experts + 4, -3)
        ids[::5, 0] = 2**32  # cut to 32 bits it is expert 0
        return ids
    return distinct_logits(tokens, experts, "ids").topk(min(top_k, experts)).indices


def _same_alignment(what: str, ids: Tensor, experts: int, block: int, expert_map: Tensor | None, device: str) -> None:
    on_device = None if expert_map is None else expert_map.to(device)
    with poisoned_allocations():
        got = dispatch.align(ids.to(device) if ids.is_contiguous() else ids, experts, block, on_device)
    named = (ids >= 0) & (ids < experts)
    want = reference_dispatch.align(ids.cpu().where(named.cpu(), -1), experts, block, expert_map)
    for field, tensor in want._asdict().items():
        compare.equal(f"{what}: {field}", getattr(got, field), tensor)


SMALL = [shape for shape in SHAPES if shape[0] * shape[1] <= 150]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
small_shapes = pytest.mark.parametrize("shape", SMALL, ids=str)


@shapes
def test_every_pair_has_the_slot_of_the_reference(device: str, shape: tuple[int, int, int, int]) -> None:
    _all_alignments(device, *shape)


def _all_alignments(device: str, tokens: int, top_k: int, experts: int, block: int) -> None:
    for name, expert_map in _maps(experts).items():
        for kind in ("distinct", "outside") if name != "half" else ("distinct", "outside", "one expert"):
            ids = _ids(tokens, top_k, experts, kind)
            dtype = torch.int64 if kind == "outside" or tokens % 2 else torch.int32
            _same_alignment(f"{name}, {kind}", ids.to(dtype), experts, block, expert_map, device)


def _small_programs(pairs: int = 16) -> Any:
    return patch.dict(dispatch.MOST_PAIRS, {name: pairs for name in dispatch.MOST_PAIRS})


@small_shapes
def test_several_programs_place_what_each_counts(device: str, shape: tuple[int, int, int, int]) -> None:
    with _small_programs():
        _all_alignments(device, *shape)


@small_shapes
def test_pairs_are_counted_first(device: str, shape: tuple[int, int, int, int]) -> None:
    with patch.object(dispatch, "_ONE_LAUNCH", 8), _small_programs():
        _all_alignments(device, *shape)


def test_many_pairs_are_counted_first(device: str) -> None:
    with patch.object(dispatch, "_ONE_LAUNCH", 8), _small_programs(2):
        _same_alignment("130 chunks, more than are summed at once", _ids(130, 2, 3, "distinct"), 3, 8, None, device)
    _same_alignment("5600 pairs", _ids(700, 8, 128, "distinct"), 128, 64, _maps(128)["half"], device)


def test_strided_ids_are_read_where_they_lie(device: str) -> None:
    room = poison_(torch.empty(2 * 33, 7, dtype=torch.int64))
    room[1::2, 1:7:2] = _ids(33, 3, 20, "distinct")
    _same_alignment("every second", room.to(device)[1::2, 1:7:2], 20, 8, None, device)
    spaced = poison_(torch.empty(40, dtype=torch.int32))
    spaced[::2] = _maps(20)["half"]
    _same_alignment("every second entry of a map", room.to(device)[1::2, 1:7:2], 20, 8, spaced[::2], device)
    transposed = _ids(33, 3, 20, "distinct").T.contiguous().to(device).T
    _same_alignment("transposed", transposed, 20, 8, None, device)


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "one dim": ({"ids": torch.zeros(3, dtype=torch.int32)}, ("[3]",)),
    "float": ({"ids": torch.zeros(4, 3)}, ("float32",)),
    "block of 12": ({"block": 12}, ("12",)),
    "block of 0": ({"block": 0}, ("0",)),
    "no experts": ({"experts": 0}, ("0",)),
    "short map": ({"expert_map": torch.zeros(4, dtype=torch.int32)}, ("[4]", "[5]")),
    "map of int64": ({"expert_map": torch.zeros(5, dtype=torch.int64)}, ("int64",)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_alignment_is_refused_in_words(device: str, what: str) -> None:
    changed, words = REFUSED[what]
    given = {"ids": torch.zeros(4, 3, dtype=torch.int32), "experts": 5, "block": 8} | changed
    on = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    compare.same("error", type(compare.refused(what, lambda: dispatch.align(**on), words)), InputError)
