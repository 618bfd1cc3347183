"""What is right for one call of a stage, by the oracle, and in which rows an answer is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import ExpertsInputs, LayerInputs, RouteInputs, ShardInputs
from moe_conformance.errors import Unsupported
from moe_conformance.oracle.choice import best, choose
from moe_conformance.oracle.experts import expected_experts, expected_parts
from moe_conformance.oracle.layer import expected_layer
from moe_conformance.oracle.precision import wide
from moe_conformance.oracle.scores import compared_value
from moe_conformance.oracle.value import Value
from moe_conformance.repro import STAGES

# Rows of an answer that a script compares; those that are wrong.
ROWS = 3


@dataclass(frozen=True)
class Rows:
    """What some rows of an answer [T, D] must be: want and limit [n, D] float64, from `origin`. dtype: of
    the answer."""

    dtype: torch.dtype
    rows: list[int]
    want: Tensor
    limit: Tensor
    origin: str


@dataclass(frozen=True)
class Chosen:
    """What some rows of a routing must be: expert -> (weight, limit); or where rounding or a tie leaves it open, the
    experts that there must be and those that there may be, whatever their weights."""

    rows: dict[int, dict[int, tuple[float, float]] | tuple[list[int], list[int]]]
    top_k: int
    drops_zero: bool


def calls_of_an_answer(inputs: Any) -> int:
    """How many calls make one answer: a shard's is the sum of all ranks' parts."""
    return inputs.ep_size * inputs.tp_size if isinstance(inputs, ShardInputs) else 1


class Wanted:
    """The right answer to these calls, computed before they are made; `wrong` says whether one got it."""

    def __init__(self, calls: Sequence[Any]) -> None:
        self.first = calls[0]
        self.chosen: Chosen | None = None
        if isinstance(self.first, RouteInputs):
            self.chosen = _chosen(self.first)
            return
        want, bound = _expected(self.first)
        self.want, self.limit, self.origin = want, bound.limit, bound.origin

    def shown(self, answers: Sequence[Any]) -> Rows | Chosen:
        """The rows that are wrong, or the first ones where there is no answer yet or its form is wrong."""
        if self.chosen is not None:
            wrong = self._wrong_rows(answers)
            rows = (wrong or list(self.chosen.rows))[:ROWS]
            return replace(self.chosen, rows={row: self.chosen.rows[row] for row in rows})
        rows = (self._wrong_rows(answers) or list(range(len(self.want))))[:ROWS]
        return Rows(self._x.dtype, rows, self.want[rows], self.limit[rows], self.origin)

    def is_wrong(self, answers: Sequence[Any]) -> bool:
        return not self._has_form(answers) or bool(self._wrong_rows(answers))

    def _has_form(self, answers: Sequence[Any]) -> bool:
        if self.chosen is not None:
            shape = (len(self.first.logits), self.first.slots)
            return all(tuple(part.shape) == shape for part in answers[0])
        form = self._x.shape, self._x.dtype
        return all((answer.shape, answer.dtype) == form for answer in answers)

    @property
    def _x(self) -> Tensor:
        x: Tensor = self.first.whole.x if isinstance(self.first, ShardInputs) else self.first.x
        return x

    def _wrong_rows(self, answers: Sequence[Any]) -> list[int]:
        if not answers or not self._has_form(answers):
            return []
        if self.chosen is not None:
            ids, weights = (part.cpu() for part in answers[0])
            return [row for row in self.chosen.rows if differs(self.chosen, row, ids[row], weights[row])]
        got = sum((answer.cpu().double() for answer in answers), start=torch.zeros(()))
        wrong: list[int] = (~((got - self.want).abs() <= self.limit)).any(-1).nonzero().flatten().tolist()
        return wrong


def differs(chosen: Chosen, row: int, ids: Tensor, weights: Tensor) -> bool:
    pairs = list(zip(ids.tolist(), weights.tolist(), strict=True))[: chosen.top_k]
    want = chosen.rows[row]
    if isinstance(want, tuple):
        there = {i for i, _ in pairs}
        return len(there) < chosen.top_k or not set(want[0]) <= there <= set(want[1])
    got = {i: w for i, w in pairs if i >= 0 and (w or not chosen.drops_zero)}
    return got.keys() != want.keys() or any(not abs(got[i] - w) <= limit for i, (w, limit) in want.items())


def _expected(inputs: Any) -> Any:
    match inputs:
        case ExpertsInputs():
            return expected_experts(_cleared(inputs))
        case LayerInputs():
            return expected_layer(inputs)
        case ShardInputs():
            whole = _cleared(inputs.whole)
            return expected_parts(whole, inputs.shared, inputs.shared_tensors, inputs.ep_size, inputs.tp_size)
    raise Unsupported(f"repro: got {type(inputs).__name__}, want inputs of {', '.join(STAGES)}")


def _cleared(inputs: ExpertsInputs) -> ExpertsInputs:
    """Ids that name no expert as -1; weights of pairs that are not here, which nobody may look at, as 0."""
    legal = (inputs.ids >= 0) & (inputs.ids < inputs.experts + inputs.identity_experts)
    ids = inputs.ids.where(legal, -1)
    held = legal.clone()
    if inputs.expert_map is not None:
        inside = ids.clamp(0, inputs.experts - 1)
        held &= (ids >= inputs.experts) | (inputs.expert_map[inside] >= 0)
    x = inputs.x.masked_fill(~held.any(-1, keepdim=True), 0)
    return replace(inputs, x=x, ids=ids, weights=inputs.weights.masked_fill(~held, 0))


def _chosen(inputs: RouteInputs) -> Chosen:
    """Of rows whose experts no rounding changes, all; of others what is certain, or nothing where groups are tied."""
    spec, dtype = inputs.routing, inputs.logits.dtype
    tokens = len(inputs.logits) if inputs.valid_rows is None else inputs.valid_rows
    numbers = inputs.logits.isfinite().all(-1)
    rows: dict[int, dict[int, tuple[float, float]] | tuple[list[int], list[int]]] = {}
    every = list(range(spec.experts(inputs.logits.shape[1]) + spec.identity_experts))
    kept = numbers & (torch.arange(len(numbers)) < tokens)
    if spec.capacity is None and not spec.skip_expert and spec.selector != "table":
        rows = {row: ([], every) for row in range(tokens) if not numbers[row]}
        compared = compared_value(Value.of(inputs.logits[kept]), spec, inputs.tensors, dtype)
        certain, there = best(compared, spec)[1], kept.nonzero().flatten()
        if spec.groups == 1 and spec.selector == "topk":
            open_rows = zip(there[~certain].tolist(), *_bounds(compared[~certain], spec.top_k), strict=True)
            rows |= {row: (must, may) for row, must, may in open_rows}
        kept[there[~certain]] = False
    token_ids = None if inputs.token_ids is None else inputs.token_ids[kept]
    own = replace(inputs, logits=inputs.logits[kept], token_ids=token_ids, valid_rows=None, fused_shared=None)
    if kept.any():
        choice = choose(own, None, wide(dtype) if spec.score_dtype == "float32" else dtype)
        parts = (choice.ids, choice.weights.exact, choice.weights.limit)
        for row, *each in zip(kept.nonzero().flatten().tolist(), *(part.tolist() for part in parts), strict=True):
            rows[row] = {i: (w, limit) for i, w, limit in zip(*each, strict=True) if i >= 0}
    if not rows:
        raise Unsupported("repro: rounding may change the experts of every row")
    drops_zero = spec.capacity is not None or spec.skip_expert
    return Chosen(dict(sorted(rows.items())), spec.top_k, drops_zero)


def _bounds(compared: Value, top_k: int) -> tuple[list[list[int]], list[list[int]]]:
    """Of each row the experts that are surely among the best, and those that may be."""
    low, high = compared.exact - compared.limit, compared.exact + compared.limit
    may = high >= low.topk(top_k).values[:, -1:]
    # Surely in: fewer than K others may be above.
    rivals = (high[:, None] >= low[:, :, None]).sum(2) - 1
    found = [[flags.nonzero().flatten().tolist() for flags in part] for part in (rivals < top_k, may)]
    return found[0], found[1]


def is_legal(inputs: Any) -> bool:
    """Whether an engine may not refuse this call."""
    return not getattr(getattr(inputs, "whole", inputs), "native_ids", False)
