"""What stands in for compiled operators of vLLM's, beside the reference: the adapter's only code that computes."""

from __future__ import annotations

import math

import pytest
import torch

from moe_conformance.engines.vllm import interpreted
from moe_conformance.judging.inputs import integers
from moe_conformance.reference_impl import dispatch

T, K, E, BLOCK = 37, 3, 11, 4
OWNED = torch.tensor([2, -1, 0, -1, 1, -1, 3, -1, -1, 4, -1], dtype=torch.int32)


def _ids() -> torch.Tensor:
    """Three different experts a row."""
    first = integers((T, 1), "stand-in", E)
    return ((first + torch.tensor([0, 4, 7])) % E).int()


def _aligned(ids: torch.Tensor, expert_map: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    slots = torch.empty(ids.numel() + E * (BLOCK - 1), dtype=torch.int32)
    blocks = torch.empty(math.ceil(len(slots) / BLOCK), dtype=torch.int32)
    count = torch.empty(1, dtype=torch.int32)
    interpreted.align(ids, E, BLOCK, slots, blocks, count, expert_map)
    return slots, blocks, count


@pytest.mark.parametrize("expert_map", [None, OWNED], ids=["all experts", "some experts"])
def test_every_pair_lies_in_a_block_of_its_expert_as_in_the_reference(expert_map: torch.Tensor | None) -> None:
    ids = _ids()
    slots, blocks, count = _aligned(ids, expert_map)
    want = dispatch.align(ids, E, BLOCK, expert_map)
    used = int(want.padded_count)
    assert int(count) == used
    pairs = {(int(s), int(blocks[i // BLOCK])) for i, s in enumerate(slots[:used]) if s < ids.numel()}
    assert pairs == {
        (int(s), int(want.expert_of_block[i // BLOCK]))
        for i, s in enumerate(want.slot_to_pair[:used])
        if s < ids.numel()
    }


def test_pairs_without_an_expert_get_no_slot() -> None:
    ids = _ids()
    ids[3] = -1
    slots, _, _ = _aligned(ids, torch.arange(E, dtype=torch.int32))
    assert not {9, 10, 11} & set(slots.tolist())


def test_the_sum_leaves_out_rows_of_other_ranks_and_of_no_expert() -> None:
    rows = torch.ones(2, 3, 4)
    rows[0, 1] = rows[1, 2] = float("nan")  # nobody wrote them
    out = torch.empty(2, 4)
    interpreted.moe_sum(rows, out, torch.tensor([[0, 1, 2], [0, 2, -1]]), OWNED)
    assert out.tolist() == [[2.0] * 4, [2.0] * 4]
