"""Block-aligned dispatch of the reference, by hand and against a loop over experts; what its suite leaves open."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_conformance.engine import Aligned, AlignInputs
from moe_conformance.engines.reference import Reference
from moe_conformance.errors import InputError
from moe_conformance.judging.goldens import matches
from moe_conformance.judging.inputs import bits, integers
from moe_conformance.judging.judge import Judged
from moe_conformance.reference_impl.dispatch import align
from moe_conformance.suites.align import test_permutation


def written(aligned: Aligned) -> tuple[list[int], list[int], list[int]]:
    assert {tensor.dtype for tensor in aligned} == {torch.int32}
    return aligned.slot_to_pair.tolist(), aligned.expert_of_block.tolist(), aligned.padded_count.tolist()


def by_hand(ids: Tensor, experts: int, block: int, held: list[int]) -> tuple[list[int], list[int], list[int]]:
    """held: global id of each local expert."""
    flat = ids.flatten().tolist()
    pairs, slots, blocks = len(flat), [], []
    for local, expert in enumerate(held):
        mine = [pair for pair, name in enumerate(flat) if name == expert]
        mine += [pairs] * (-len(mine) % block)
        slots += mine
        blocks += [local] * (len(mine) // block)
    used = len(slots)
    bound = min(experts, pairs) * (block - 1) + pairs
    bound += -bound % block
    return slots + [pairs] * (bound - used), blocks + [-1] * (bound // block - len(blocks)), [used]


def test_a_batch_by_hand() -> None:
    # Expert 0 has pairs 1, 2, 6, expert 1 none, expert 2 has 0, 3, 4, 7, which is two whole blocks; 5 is dropped.
    ids = torch.tensor([[2, 0], [0, 2], [2, -1], [0, 2]])
    # min(3, 8) * 1 + 8 = 11 slots at most, rounded up to 12.
    assert written(align(ids, 3, 2)) == ([1, 2, 6, 8, 0, 3, 4, 7, 8, 8, 8, 8], [0, 0, 2, 2, -1, -1], [8])


def test_the_worked_example_of_the_docstring() -> None:
    aligned = align(torch.tensor([[0, 2], [-1, 0], [2, 0]]), experts=3, block=2)
    assert written(aligned) == ([0, 3, 5, 6, 1, 4, 6, 6, 6, 6], [0, 0, 2, -1, -1], [6])


def test_a_map_gives_local_ids_and_their_order() -> None:
    # This rank has experts 2 and 0, in this order; expert 1 is another's.
    ids, expert_map = torch.tensor([[2, 0], [0, 1], [1, -1]], dtype=torch.int32), torch.tensor([1, -1, 0])
    assert written(align(ids, 3, 2, expert_map)) == ([0, 6, 1, 2, 6, 6, 6, 6, 6, 6], [0, 1, -1, -1, -1], [4])


@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
@pytest.mark.parametrize(("experts", "held"), [(1, [0]), (5, [0, 1, 2, 3, 4]), (5, [3, 0]), (5, []), (37, [36, 1, 7])])
@pytest.mark.parametrize("block", [1, 3, 16])
def test_slots_are_those_of_a_loop_over_experts(tokens: int, experts: int, held: list[int], block: int) -> None:
    # Ids may repeat in a row: nothing here depends on it.
    ids = integers((tokens, 3), "dispatch", experts, low=-1)
    expert_map = torch.tensor([held.index(expert) if expert in held else -1 for expert in range(experts)])
    for dtype in (torch.int32, torch.int64):
        aligned = align(ids.to(dtype), experts, block, expert_map.to(dtype))
        assert written(aligned) == by_hand(ids, experts, block, held)


def test_the_number_of_slots_is_enough_and_no_more() -> None:
    """One pair for each expert is the most padding there can be; then all slots are in use."""
    for tokens in (1, 3, 4):
        slots, blocks, (used,) = written(align(torch.arange(tokens)[:, None], 4, 8))
        assert len(slots) == used == 8 * tokens
        assert blocks == list(range(tokens))


def test_strides_are_honoured_and_ids_left_alone() -> None:
    wide = torch.full((4, 6), torch.iinfo(torch.int32).min, dtype=torch.int32)
    ids = integers((4, 3), "dispatch", 5).int()
    wide[:, ::2] = ids
    before = wide.clone()
    assert written(align(wide[:, ::2], 5, 4)) == written(align(ids, 5, 4))
    assert torch.equal(wide, before)


@pytest.mark.parametrize("outside", [-2, -5, 5, 2**31 - 1])
@pytest.mark.parametrize("expert_map", [None, torch.tensor([1, -1, 0, -1, 2], dtype=torch.int32)])
def test_ids_out_of_range_are_refused(outside: int, expert_map: Tensor | None) -> None:
    with pytest.raises(InputError, match=r"want -1 or 0 to 4"):
        align(torch.tensor([[0, 1], [outside, 2]]), 5, 4, expert_map)


@pytest.mark.parametrize(
    ("ids", "experts", "block", "expert_map", "named"),
    [
        (torch.zeros(4, dtype=torch.int32), 5, 4, None, r"ids: got \[4\]"),
        (torch.zeros(2, 2), 5, 4, None, "float32, want .* int32 or int64"),
        (torch.zeros(2, 2, dtype=torch.bool), 5, 4, None, "bool"),
        (torch.zeros(2, 2, dtype=torch.uint8), 5, 4, None, "uint8"),
        (torch.zeros(2, 2, dtype=torch.int32), 5, 0, None, "a block of 0"),
        (torch.zeros(2, 2, dtype=torch.int32), 0, 4, None, "0 experts"),
        (torch.zeros(2, 2, dtype=torch.int32), 5, 4, torch.arange(4), r"expert_map: got \[4\] .* want \[5\]"),
        (torch.zeros(2, 2, dtype=torch.int32), 2, 4, torch.tensor([True, False]), "expert_map: .*bool"),
        (torch.zeros(2, 2, dtype=torch.int32), 2, 4, torch.tensor([0, 0]), "want each of 0 to 1 once"),
        # 2^31 - 1 pairs fit, their padding does not; one id in memory stands for all of them.
        (torch.zeros(1, 1, dtype=torch.int32).expand(2**31 - 1, 1), 1, 2, None, "want at most 2147483647"),
    ],
)
def test_what_is_no_batch_is_refused(
    ids: Tensor, experts: int, block: int, expert_map: Tensor | None, named: str
) -> None:
    with pytest.raises(InputError, match=named):
        align(ids, experts, block, expert_map)


class AnotherOrder(Reference):
    """As free as the protocol is: blocks in no order, an expert's not side by side, its pairs shuffled, padding between
    them and marked by several numbers, pairs without an expert in blocks of expert -1, garbage behind the slots in use,
    the count an int."""

    def align(self, inputs: AlignInputs) -> Aligned:
        legal = (inputs.ids >= 0) & (inputs.ids < inputs.experts)
        slots, experts, count = super().align(
            AlignInputs(inputs.ids.where(legal, -1), inputs.experts, inputs.block, inputs.expert_map)
        )
        blocks, experts = slots[:count].reshape(-1, inputs.block), experts[: int(count) // inputs.block]
        pairs = inputs.ids.numel()
        nobodys = torch.ones(pairs, dtype=torch.bool)
        nobodys[blocks[blocks < pairs].long()] = False
        more = blocks.new_full((-(-int(nobodys.sum()) // inputs.block), inputs.block), pairs)
        more.view(-1)[: int(nobodys.sum())] = nobodys.nonzero().flatten().int()
        blocks, experts = torch.cat([blocks, more]), torch.cat([experts, experts.new_full((len(more),), -1)])
        blocks = torch.where(blocks == inputs.ids.numel(), blocks + torch.arange(inputs.block) * 3, blocks)
        blocks = blocks.gather(1, bits(blocks.shape, "another-order").argsort(1))
        for expert in experts.unique():
            mine = (experts == expert).nonzero().flatten()
            blocks[mine] = blocks[mine].T.reshape(len(mine), -1)
        order = bits(experts.shape, "another-order").argsort()
        behind = slots.new_full((3 * inputs.block,), -7)
        return Aligned(
            torch.cat([blocks[order].flatten(), behind]).long(),
            torch.cat([experts[order], experts.new_full((3,), 10**6)]).long(),
            blocks.numel(),  # type: ignore[arg-type]
        )


@pytest.mark.parametrize(
    "check", [name for name, found in vars(test_permutation).items() if hasattr(found, "moe_cases")]
)
def test_every_freedom_that_engines_have_passes(check: str) -> None:
    function = getattr(test_permutation, check)
    for case in function.moe_cases:
        facts = function(Judged(AnotherOrder(), ""), case)
        assert facts is None or matches(case.bug_class, check.removeprefix("test_"), case.id, facts)
