"""Judges a router's answer: ids by the acceptable sets, weights at the reported ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare
from moe_conformance.oracle.capacity import fitting
from moe_conformance.oracle.choice import accepted, best, group_scores, ids_of_table, interval, room_of, without_expert
from moe_conformance.oracle.precision import wide
from moe_conformance.oracle.scores import compared_value, conditioned
from moe_conformance.oracle.value import Value
from moe_conformance.oracle.weights import weights_value
from moe_conformance.protocol.routing import FusedShared, RouteInputs, Routing

# How many orders of the chosen experts are tried if rounding leaves the order open: 4!, all orders of four near ties.
ORDERS = 24


def judge_routing(
    what: str,
    answer: Routing,
    inputs: RouteInputs,
    logits: Value | None = None,
    *,
    shift: float = 0.0,
    stored: torch.dtype | None = None,
) -> None:
    """Raise Nonconformance, with row, got and want, unless a correct router may give this answer.

    - ids and weights are [T, inputs.slots], ids integer. Rows after inputs.valid_rows are ignored.
    - ids of a row are unique and name experts. -1, and weight 0, is "no expert" where the method drops or skips pairs.
    - The set of ids is a best K for some scores within their errors, in any order.
    - Weights are those of the reported ids within the bound. In the sparse mixer they depend on the order in which
      experts are chosen; a row whose near ties leave more than ORDERS orders has weights that are not judged.
    - A row with a logit that is not finite is judged by the second rule alone. If a method chooses more experts than
      the kept groups have, it must choose all of these; the others and their weights are open, and so is every weight
      that is divided by the sum over all.

    logits: the router's, with their errors, where the engine computed them itself; None: inputs.logits are exact.
    shift: a constant that was added to all logits given to the engine, for softmax. stored: the dtype in which weights
    may be handed on, None for that of the logits; weights with a per-expert scale are float32 (Gemma 4).
    """
    judgement = _Judgement(what, _valid(what, answer, inputs), inputs, logits, shift, stored)
    judgement.names()
    judgement.sets()
    judgement.weights()
    if inputs.fused_shared is not None:
        judgement.fused_shared(inputs.fused_shared)


def judge_names(what: str, answer: Routing, inputs: RouteInputs) -> None:
    """Whether ids are unique and in range, as `judge_routing` judges them, and nothing else."""
    _Judgement(what, _valid(what, answer, inputs), inputs).names()


def judge_fused_shared(what: str, answer: Routing, inputs: RouteInputs) -> None:
    """The last slots alone, as `judge_routing` judges them, for logits that are exact."""
    assert inputs.fused_shared is not None
    judgement = _Judgement(what, _valid(what, answer, inputs), inputs)
    judgement.names()
    judgement.fused_shared(inputs.fused_shared)


def _valid(what: str, answer: Routing, inputs: RouteInputs) -> Routing:
    """The valid rows of an answer on the CPU. Raises Nonconformance for another form than [T, slots]."""
    shape = (len(inputs.logits), inputs.slots)
    ids = compare.shape_and_type(f"{what}: ids", answer.ids, shape, integer=True)
    weights = compare.shape_and_type(f"{what}: weights", answer.weights, shape, integer=False)
    return Routing(ids[: inputs.valid_rows].detach().cpu().long(), weights[: inputs.valid_rows].detach().cpu())


class _Judgement:
    """One answer, and what it is judged against; each method raises Nonconformance for a kind of fault."""

    def __init__(
        self,
        what: str,
        answer: Routing,
        inputs: RouteInputs,
        logits: Value | None = None,
        shift: float = 0.0,
        stored: torch.dtype | None = None,
    ) -> None:
        rows, spec = len(answer.ids), inputs.routing
        self.what, self.spec, self.shift = what, spec, shift
        self.routed = Routing(*(part[:, : spec.top_k] for part in answer))
        self.last = Routing(*(part[:, spec.top_k :] for part in answer))
        token_ids = None if inputs.token_ids is None else inputs.token_ids[:rows]
        self.inputs = replace(inputs, logits=inputs.logits[:rows], token_ids=token_ids, valid_rows=None)
        self.dtype = inputs.logits.dtype
        given = Value.of(inputs.logits) if logits is None else logits
        given = given[:rows]
        self.numbers = given.exact.isfinite().all(1)
        if spec.selector == "product_keys":  # a row has logits of two tokens
            self.numbers = conditioned(given, spec, torch.float64).exact.isfinite().all(1)
        self.given = given.map(lambda part: part.nan_to_num(0.0, 0.0, 0.0))
        self.compared = compared_value(self.given, spec, inputs.tensors, self.dtype)
        self.experts = self.compared.exact.shape[1] - spec.skip_expert
        self.none = without_expert(self.routed, spec)
        # Pairs whose expert is not reported get one below, as far as it is known.
        self.ids = self.routed.ids.masked_fill(self.none, self.experts if spec.skip_expert else 0)
        self.narrow = None if spec.per_expert_scale else stored or self.dtype

    def names(self) -> None:
        """ids of a row are unique and in range, whatever its logits are."""
        ids, spec = self.routed.ids, self.spec
        may_lack = spec.capacity is not None or spec.skip_expert
        outside = ~self.none & (ids >= self.experts) if may_lack else (ids < 0) | (ids >= self.experts)
        if outside.any():
            row, slot = outside.nonzero()[0].tolist()
            allowed = f"0 to {self.experts - 1}" + (", or -1 for a pair without expert" if may_lack else "")
            raise Nonconformance(f"{self.what}: ids[{row}, {slot}]: got {ids[row, slot].item()}, want {allowed}")
        slots = torch.arange(spec.top_k)
        told_apart = ids.where(~self.none, -1 - slots)  # two pairs without an expert are not a repeated id
        twice = told_apart.sort(1).values.diff(dim=1).eq(0).any(1)
        if twice.any():
            row = int(twice.nonzero()[0])
            raise Nonconformance(
                f"{self.what}: row {row}: got ids {ids[row].tolist()}, want {spec.top_k} different experts"
            )

    def sets(self) -> None:
        """The chosen experts are a best K for some scores within their errors."""
        if self.spec.selector == "table":
            want = ids_of_table(self.inputs)
            right = (self.ids.sort(1).values == want.sort(1).values).all(1)
        else:
            want, _ = best(self.compared, self.spec)
            if self.spec.capacity is not None:
                right = self._fits_capacity()
            else:
                right = accepted(self.ids, self.compared, self.spec) & (self.none.sum(1) <= 1)
        bad = self.numbers & ~right
        if bad.any():
            raise Nonconformance(self._of_sets(int(bad.nonzero()[0]), int(bad.sum()), want))

    def _fits_capacity(self) -> Tensor:
        """[T] bool; and ids of pairs without expert become those of experts that have no place for the token."""
        found = room_of(self.given, self.compared, self.inputs, self.numbers)
        picked = torch.zeros_like(self.compared.exact).scatter_add(1, self.ids, (~self.none).double()) > 0
        right = fitting(picked, interval(self.compared), found, self.spec.top_k)
        lost = self.compared.exact.masked_fill(picked | ~found.drops, -torch.inf)
        place = (self.none.cumsum(1) - 1).clamp(min=0)
        self.ids = self.ids.where(~self.none, lost.argsort(1, descending=True).gather(1, place))
        return right

    def _of_sets(self, row: int, rows: int, want: Tensor) -> str:
        ids, none = self.routed.ids[row], self.none[row]
        got = sorted(ids[~none].tolist()) + [-1] * int(none.sum())
        text = f"{self.what}: {rows} rows have wrong experts, first row {row}: got {got}"
        text = f"{text}, want {sorted(want[row].tolist())}"
        if self.spec.capacity is not None:
            return f"{text} as far as these have a place for the token"
        left = sorted(set(want[row].tolist()) - set(self.ids[row].tolist()))
        if not left or self.spec.selector == "table":
            return text
        instead = sorted(set(self.ids[row].tolist()) - set(want[row].tolist()))
        others = "" if self.spec.groups == 1 else f", {self.spec.top_groups} of {self.spec.groups} groups kept"
        places = f"left out: {self._scores(row, left)}; chosen: {self._scores(row, instead)}{others}"
        return f"{text} or others within rounding ({places})"

    def _scores(self, row: int, experts: list[int]) -> str:
        exact, limit = self.compared.exact[row], self.compared.limit[row]
        return ", ".join(f"{e} at {exact[e].item():.7g} +- {limit[e].item():.1g}" for e in experts)

    def weights(self) -> None:
        """The weights of the reported experts are the method's, within their errors."""
        judged = self.numbers[:, None] & ~self.none & self._of_kept_groups()
        orders = self._orders()
        right = torch.tensor([len(row) > ORDERS for row in orders], dtype=torch.bool)
        wrong = []
        for rows, want, _ in self._weights(orders):
            bad = judged[rows] & ~self._near(self.routed.weights[rows], want)
            right[rows] |= ~bad.any(1)
            wrong.append((want, bad))
        if not right.all():
            row = int((~right).nonzero()[0])
            want, bad = wrong[0]
            slot = int(bad[row].to(torch.uint8).argmax())
            got, limit = self.routed.weights[row, slot].item(), self._limit(self.routed.weights, want)[row, slot].item()
            raise Nonconformance(
                f"{self.what}: {int((~right).sum())} rows have wrong weights, first [{row}, {slot}], of expert "
                f"{self.ids[row, slot].item()}: got {got}, want {want.exact[row, slot].item()} +- {limit:.2g} (ids "
                f"{self.routed.ids[row].tolist()}: got {_numbers(self.routed.weights[row])}, want "
                f"{_numbers(want.exact[row])})"
            )

    def _of_kept_groups(self) -> Tensor:
        """If K exceeds the experts of the kept groups: those certainly in one, [T, K] bool; none if a sum has all."""
        spec, size = self.spec, self.compared.exact.shape[1] // self.spec.groups
        if spec.top_k <= size * spec.top_groups:
            return torch.ones_like(self.none)
        if spec.renormalize != "no":
            return torch.zeros_like(self.none)
        best = group_scores(self.compared, spec)
        rivals = (best.high[:, None] >= best.low[:, :, None]).sum(2) - 1  # [T, G], groups that may be better
        return (rivals < spec.top_groups).gather(1, self.ids // size)

    def _orders(self) -> list[list[tuple[int, ...]]]:
        """The orders in which each row's slots may have been chosen, at most ORDERS + 1 of them.

        The first is the order that the engine reports, if it is possible. It is the only one if weights do not depend
        on the order.
        """
        slots = list(range(self.spec.top_k))
        if self.spec.selector != "sparsemixer":
            return [[tuple(slots)] for _ in self.ids]
        low, high = (bound.gather(1, self.ids).tolist() for bound in interval(self.compared))
        return [list(islice(_in_turn(slots, *row), ORDERS + 1)) for row in zip(low, high, strict=True)]

    def _weights(self, orders: list[list[tuple[int, ...]]]) -> Iterator[tuple[Tensor, Value, Value | None]]:
        """For the first order of all rows, then each further one: rows [R], their weights, those of shared experts."""
        for number in range(max(map(len, orders), default=1)):
            rows = [row for row, there in enumerate(orders) if number == 0 or number < len(there) <= ORDERS]
            slots = torch.tensor([orders[row][number] for row in rows], dtype=torch.long).view(-1, self.spec.top_k)
            want, shared = weights_value(
                self.given[rows],
                self.ids[rows].gather(1, slots),
                self.spec,
                self.inputs.tensors,
                self.dtype,
                self.none[rows].gather(1, slots),
                shift=self.shift,
                stored=wide(self.dtype),
            )
            yield torch.tensor(rows, dtype=torch.long), want.gather(slots.argsort(1)), shared

    def _near(self, got: Tensor, want: Value) -> Tensor:
        return (got.double() - want.exact).abs() <= self._limit(got, want)

    def _limit(self, got: Tensor, want: Value) -> Tensor:
        """A weight returned in a narrow dtype has one more rounding error, and only bits that the dtype has."""
        if self.narrow is None or self.narrow == wide(self.narrow):
            return want.limit
        is_narrow = got.double() == got.to(self.narrow).double()
        return torch.where(is_narrow, want.stored(self.narrow).limit, want.limit)

    def fused_shared(self, fused: FusedShared) -> None:
        """The last slots are the shared experts, each once, with weights by their rule."""
        index = self.last.ids - self.experts
        strange = (index.sort(1).values != torch.arange(fused.count)).any(1)
        if strange.any():
            row = int(strange.nonzero()[0])
            there = list(range(self.experts, self.experts + fused.count))
            raise Nonconformance(
                f"{self.what}: row {row}: ids of shared experts: got {self.last.ids[row].tolist()}, want {there} in "
                f"any order, in the last {fused.count} slots"
            )
        want = self._of_shared(fused, index)
        bad = self.numbers[:, None] & ~self._near(self.last.weights, want)
        if bad.any():
            row, slot = bad.nonzero()[0].tolist()
            got, limit = self.last.weights[row, slot].item(), want.limit[row, slot].item()
            raise Nonconformance(
                f"{self.what}: weights[{row}, {self.spec.top_k + slot}], of shared expert {index[row, slot].item()} by "
                f"rule {fused.rule!r}: got {got}, want {want.exact[row, slot].item()} +- {limit:.2g}"
            )

    def _of_shared(self, fused: FusedShared, index: Tensor) -> Value:
        compute = wide(self.dtype)
        if fused.rule == "constant":
            return Value.of(torch.full(index.shape, fused.weight, dtype=torch.float64)).stored(compute)
        if fused.rule == "router":
            shared = next(self._weights(self._orders()))[2]
            if shared is None:
                raise ValueError("inputs are no good: fused_shared: got rule 'router', want shared_classes in routing")
            return shared.gather(index)
        # Computed from the engine's own weights, which may be from before or after a rounding.
        routed = self.routed.weights.double()
        size = routed.abs().sum(1, keepdim=True)
        total = Value.of(routed.sum(1, keepdim=True)).erring(size, 2 * self.spec.top_k, compute)
        if self.narrow is not None and self.narrow != compute:
            total = total.erring(size, 1, self.narrow)
        share = (total * Value.of(fused.weight).stored(compute)).stored(compute)
        return share.map(lambda part: part.expand(index.shape))


def _in_turn(left: list[int], low: list[float], high: list[float]) -> Iterator[tuple[int, ...]]:
    """Every order of the slots in `left` in which none comes after one that it certainly exceeds."""
    if not left:
        yield ()
    most = max((low[slot] for slot in left), default=0.0)
    for slot in left:
        if high[slot] >= most:
            others = [other for other in left if other != slot]
            yield from ((slot, *behind) for behind in _in_turn(others, low, high))


def _numbers(row: Tensor) -> list[float]:
    return [float(f"{value:.7g}") for value in row.tolist()]
