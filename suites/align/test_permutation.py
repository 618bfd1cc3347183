"""Pairs in blocks of their experts: each once, none of another rank, and no more blocks than they fill."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import AlignInputs, Engine
from moe_conformance.errors import Nonconformance, Unsupported
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import bits, distinct_logits, integers, poison_, poisoned_allocations
from moe_conformance.judging.layouts import laid_out
from moe_conformance.protocol.moving import to_device
from moe_conformance.suites.align.cases import (
    EARLIER_CALLS,
    NO_EXPERT,
    OUT_OF_RANGE,
    PERMUTED,
    SPELLED_OUT,
    WHOLE_BLOCKS,
)


class Placed(NamedTuple):
    """Where an engine put the pairs, whichever order it gave them.

    times: [T, K], in how many of the slots in use each pair stands. experts: [T, K], the local expert of the block that
    it stands in, -1 for none. padded_count: slots in use, but for those in blocks of no expert.
    """

    times: Tensor
    experts: Tensor
    padded_count: int


def _ids(case: Case) -> Tensor:
    """[T, K], contiguous, on the CPU."""
    T, E, K = case["T"], case["E"], case["K"]
    logits = distinct_logits(T, E, "align-logits")
    logits[:, list(case["unpicked"])] = float(-E)
    if case["hot"] is not None:
        logits[:, case["hot"]] = float(E)
    ids = torch.arange(T * K).reshape(T, K) % E if case["turns"] else logits.topk(K).indices
    gone = integers((T, K), "align-dropped", 20) < case["dropped"]
    return ids.masked_fill(gone, -1).to(getattr(torch, case["dtype"]))


def _laid_out(ids: Tensor, layout: str, device: str) -> tuple[Tensor, Tensor]:
    """The ids as the case has them in memory, and all of that memory."""
    T, K = ids.shape
    memory = torch.empty({"rows": (T, K + 3), "both": (2 * T, 2 * K)}.get(layout, (T, K)), dtype=ids.dtype)
    memory = poison_(memory).to(device)
    if layout == "transposed":
        memory = memory.reshape(K, T)
    view = {"rows": memory[:, :K], "both": memory[::2, ::2], "transposed": memory.T}.get(layout, memory)
    view.copy_(ids)
    return view, memory


def inputs_of(case: Case, engine: Engine, ids: Tensor | None = None) -> AlignInputs:
    """The case's inputs on the engine's device, with these ids in place of the case's."""
    device, expert_map = engine.info.device, None
    if case["held"] is not None:
        expert_map = torch.full((case["E"],), -1, dtype=torch.int32)
        expert_map[list(case["held"])] = torch.arange(len(case["held"]), dtype=torch.int32)
        expert_map = to_device(laid_out(expert_map, "sliced") if case["layout"] == "map" else expert_map, device)
    view, _ = _laid_out(_ids(case) if ids is None else ids, case["layout"], device)
    return AlignInputs(view, case["E"], case["block"], expert_map)


def _local(inputs: AlignInputs) -> Tensor:
    """[T, K] int64, the local expert of each pair, -1 for one that has none here."""
    ids, local = inputs.ids.cpu().long(), torch.arange(inputs.experts)
    if inputs.expert_map is not None:
        local = inputs.expert_map.cpu().long()
    legal = (ids >= 0) & (ids < inputs.experts)
    return torch.where(legal, local[ids.where(legal, 0)], -1)


def _want_count(inputs: AlignInputs) -> int:
    local = _local(inputs)
    return sum(-(-int(pairs) // inputs.block) * inputs.block for pairs in local[local >= 0].bincount())


def _placed(engine: Engine, inputs: AlignInputs) -> Placed:
    """What the engine answers, after a look at its form; every fresh allocation is poisoned."""
    with poisoned_allocations():
        slots, blocks, count = engine.align(inputs)
    for what, tensor in (("slot_to_pair", slots), ("expert_of_block", blocks)):
        compare.shape_and_type(what, tensor, (tensor.numel(),), integer=True)
    if isinstance(count, Tensor) and count.numel() != 1:
        raise Nonconformance(f"padded_count: got {list(count.shape)}, want one number")
    used, block = int(count), inputs.block
    if not 0 <= used <= min(len(slots), len(blocks) * block):
        raise Nonconformance(
            f"padded_count: got {used}, want at most {len(slots)} slots, {len(blocks)} blocks of {block}, as returned"
        )
    pairs, largest = inputs.ids.numel(), torch.iinfo(slots.dtype).max
    slots, expert_of_slot = slots[:used].cpu().long(), blocks.cpu().long().repeat_interleave(block)[:used]
    strange = (slots < 0) | (slots == largest)
    if strange.any():
        slot = int(strange.nonzero()[0])
        raise Nonconformance(
            f"slot_to_pair: {int(strange.sum())} of {used} slots in use are no pair and no mark of padding, first at "
            f"[{slot}]: got {slots[slot]}, want a pair below {pairs}, or padding from {pairs} to {largest - 1}"
        )
    held = ((slots < pairs) & (expert_of_slot >= 0)).nonzero().flatten()
    pair_of, expert_of = slots[held], expert_of_slot[held]
    times = pair_of.bincount(minlength=pairs).reshape(inputs.ids.shape)
    experts = torch.full((pairs,), -1).scatter(0, pair_of, expert_of).reshape(inputs.ids.shape)
    return Placed(times, experts, int((expert_of_slot >= 0).sum()))


@check((*WHOLE_BLOCKS, *NO_EXPERT))
def test_every_kept_pair_stands_once_in_a_block_of_its_expert(engine: Engine, case: Case) -> None:
    """A pair of an expert of this rank is in one slot in use, and the block of that slot names that expert."""
    assert_placed(engine, case)


def assert_placed(engine: Engine, case: Case) -> None:
    """Each kept pair stands in one slot, in a block of its expert."""
    inputs = inputs_of(case, engine)
    local = _local(inputs)
    kept, got = local >= 0, _placed(engine, inputs)
    compare.equal("slots in which each kept pair [t, k] stands", got.times.where(kept, 0), kept.long())
    compare.equal("local expert of the block that each pair [t, k] stands in", got.experts.where(kept, -1), local)


@check((*WHOLE_BLOCKS, *NO_EXPERT))
def test_padded_count_is_exact(engine: Engine, case: Case) -> None:
    """Slots in use are the sum over experts of their pairs, each rounded up to whole blocks."""
    inputs = inputs_of(case, engine)
    compare.same("padded_count", _placed(engine, inputs).padded_count, _want_count(inputs))


@check(NO_EXPERT)
def test_ids_that_name_no_expert_never_appear(engine: Engine, case: Case) -> None:
    """A pair with an id of -1 or of another rank's expert is in no slot in use."""
    inputs = inputs_of(case, engine)
    none = _placed(engine, inputs).times.where(_local(inputs) < 0, 0)
    compare.equal("slots in which each pair [t, k] without an expert stands", none, torch.zeros_like(none))


@check(OUT_OF_RANGE)
def test_ids_out_of_range_are_refused_or_left_out(engine: Engine, case: Case) -> None:
    """A batch with an id outside [-1, E) raises, or places all other pairs and not that."""
    ids = _ids(case)
    ids[0, 1] = ids[3, 0] = case["outside"]
    inputs = inputs_of(case, engine, ids)
    try:
        got = _placed(engine, inputs)
    except (Unsupported, Nonconformance):
        raise
    except Exception:
        return
    local, what = _local(inputs), f"with ids of {case['outside']}"
    compare.equal(f"slots in which each pair [t, k] stands, {what}", got.times, (local >= 0).long())
    compare.equal(f"local expert of the block that each pair [t, k] stands in, {what}", got.experts, local)
    compare.same(f"padded_count {what}", got.padded_count, _want_count(inputs))


@check(EARLIER_CALLS)
def test_earlier_calls_change_nothing(engine: Engine, case: Case) -> None:
    """The same ids again, after a larger batch: the same pairs with each expert; what was given is as it was.

    Pairs of one expert may change places, as they do where threads race for slots.
    """
    view, memory = _laid_out(_ids(case), case["layout"], engine.info.device)
    inputs, before = replace(inputs_of(case, engine), ids=view), memory.clone()
    first = _placed(engine, inputs)
    between = replace(case, recipe={**case.recipe, "held": None, **case["between"]})
    _placed(engine, inputs_of(between, engine))
    second = _placed(engine, inputs)
    compare.equal("slots in which each pair [t, k] stands, second time", second.times, first.times)
    compare.equal("local expert of each pair [t, k], second time", second.experts, first.experts)
    compare.same("padded_count, second time", second.padded_count, first.padded_count)
    compare.equal("memory of ids, after both", memory, before)


@check(PERMUTED)
def test_permuted_tokens_keep_their_experts(engine: Engine, case: Case) -> None:
    """The same tokens in another order: each pair is with the expert that it was with, in as many slots."""
    ids = _ids(case)
    order = bits((len(ids),), "align-order").argsort()
    straight, permuted = (_placed(engine, inputs_of(case, engine, rows)) for rows in (ids, ids[order]))
    compare.equal("slots in which each pair [t, k] stands, permuted", permuted.times, straight.times[order])
    compare.equal("local expert of each pair [t, k], permuted", permuted.experts, straight.experts[order])
    compare.same("padded_count, permuted", permuted.padded_count, straight.padded_count)


@check(SPELLED_OUT)
def test_blocks_of_a_small_batch(engine: Engine, case: Case) -> dict[str, object]:
    """Each local expert's pairs, t K + k, as often as they stand in a slot, and the slots in use."""
    inputs = inputs_of(case, engine)
    got, local = _placed(engine, inputs), _local(inputs)
    compare.equal("slots in which each pair [t, k] stands", got.times, (local >= 0).long())
    compare.equal("local expert of the block that each pair [t, k] stands in", got.experts, local)
    compare.same("padded_count", got.padded_count, _want_count(inputs))
    pairs: dict[str, str] = {}
    for expert in got.experts[got.times > 0].unique().tolist():
        mine = torch.where(got.experts == expert, got.times, 0).flatten()
        pairs[f"expert {expert}"] = " ".join(map(str, torch.arange(len(mine)).repeat_interleave(mine).tolist()))
    ids = [" ".join(map(str, row)) for row in inputs.ids.tolist()]
    return {"ids of each token": ids, "pairs": pairs, "padded count": got.padded_count}
