"""A whole model served by the engine, and its answers beside the model's own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import Engine, Generated, GenerateInputs
from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare
from moe_conformance.suites.generate.models import WholeModel, whole_model

_OPTIONS = tuple(item.name for item in fields(GenerateInputs) if item.name not in ("folder", "prompts", "new_tokens"))


def served(engine: Engine, case: Case) -> tuple[WholeModel, Generated]:
    """The model, of which each answer has an entry, and the answers; those of withdrawn requests are left out."""
    model = whole_model(case["model"])
    options = {name: case[name] for name in _OPTIONS if name in case.recipe}
    with tempfile.TemporaryDirectory() as folder:
        model.write(Path(folder))
        prompts = tuple(map(tuple, model.prompts))
        answer = engine.generate(GenerateInputs(Path(folder), prompts, model.new_tokens, **options))
    each = options.get("answers_each", 1)
    if len(answer.tokens) != len(prompts) * each:
        raise Nonconformance(
            f"generate: got {len(answer.tokens)} answers, want {len(prompts) * each}, {each} a request"
        )
    kept = [number for number in range(len(prompts)) if number not in options.get("withdrawn", ())]
    return _of(model, [number for number in kept for _ in range(each)]), _kept(answer, kept, each)


def _of(model: WholeModel, requests: Sequence[int]) -> WholeModel:
    return replace(
        model,
        prompts=[model.prompts[number] for number in requests],
        tokens=[model.tokens[number] for number in requests],
        routed=[model.routed[number] for number in requests],
    )


def _kept(answer: Generated, requests: Sequence[int], each: int) -> Generated:
    places = [number * each + copy for number in requests for copy in range(each)]
    routed = answer.routed
    if routed is not None and len(routed) == len(answer.tokens):
        routed = tuple(routed[place] for place in places)
    return Generated(tuple(answer.tokens[place] for place in places), routed)


def wrong_tokens(model: WholeModel, answer: Generated) -> Iterator[str]:
    """A line for each request that is answered otherwise, with the first token that differs."""
    for number, (got, want) in enumerate(zip(answer.tokens, model.tokens, strict=True)):
        if list(got) != want:
            at = next((i for i, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1]), None)
            what = f"{len(got)} tokens" if at is None else f"token {at} is {got[at]}"
            other = [i for i, tokens in enumerate(model.tokens) if tokens == list(got)]
            hint = f"; these are the tokens of request {other[0]}" if other else ""
            wanted = len(want) if at is None else want[at]
            yield f"request {number}: {what}, want {wanted} (got {list(got)}, want {want}{hint})"


def wrong_routes(model: WholeModel, answer: Generated) -> Iterator[str]:
    """A line for each request of which other experts are returned, with the first place and what its row is of."""
    if answer.routed is None or len(answer.routed) != len(model.prompts):
        yield f"routed experts of {len(answer.routed or ())} requests, want of {len(model.prompts)}"
        return
    for number, (got, want) in enumerate(zip(answer.routed, model.routed, strict=True)):
        top_k = len(want[0][0])
        shape = [len(want), model.layers, top_k]
        compare.shape_and_type(f"request {number}: routed experts [P + G - 1, L, K]", got, shape, integer=True)
        rows = got.long().sort().values[:, model.moe_layers].tolist()
        if rows != want:
            at = next(position for position, row in enumerate(rows) if row != want[position])
            yield (
                f"request {number}: position {at}: experts {rows[at]}, want {want[at]} of layers {model.moe_layers}"
                f"{_whose(rows[at], number, at, model.routed)}"
            )


# Of fewer rows a few that are others weigh too much.
_ENOUGH_ROWS = 8


def misplaced(model: WholeModel, answer: Generated) -> Iterator[str]:
    """A line for each request the rows of whose prompt share too few experts with their own; new tokens are left out.

    In a narrow dtype single rows may be others, so that nearly all experts are their own; of rows in wrong places the
    part K / E is, by chance. What lies below the middle of the two is wrong.
    """
    if answer.routed is None or len(answer.routed) != len(model.prompts):
        yield f"routed experts of {len(answer.routed or ())} requests, want of {len(model.prompts)}"
        return
    for number, (got, want) in enumerate(zip(answer.routed, model.routed, strict=True)):
        compare.shape_and_type(
            f"request {number}: routed experts [P + G - 1, L, K]",
            got,
            [len(want), model.layers, len(want[0][0])],
            integer=True,
        )
        length = len(model.prompts[number])
        rows = got.long().sort().values[:length, model.moe_layers].tolist()
        shared = [_shared(row, own) for row, own in zip(rows, want, strict=False)]
        if length >= _ENOUGH_ROWS and sum(shared) / length < (1 + len(want[0][0]) / model.experts) / 2:
            at = min(range(length), key=shared.__getitem__)
            yield (
                f"request {number}: the {length} rows of the prompt share {sum(shared) / length:.0%} of their experts "
                f"with their own; position {at}: experts {rows[at]}, want {want[at]}"
                f"{_whose(rows[at], number, at, model.routed)}"
            )


def _shared(row: list[list[int]], want: list[list[int]]) -> float:
    """The part of a row's experts that are those wanted."""
    pairs = [len(set(got) & set(ids)) / len(ids) for got, ids in zip(row, want, strict=True)]
    return sum(pairs) / len(pairs)


def _whose(row: list[list[int]], number: int, position: int, routed: Sequence[list[list[list[int]]]]) -> str:
    """Where the row belongs, if it is another's."""
    for request, rows in enumerate(routed):
        for place, own in enumerate(rows):
            if own == row and (request, place) != (number, position):
                return f"; this is the row of request {request}, position {place}"
    return ""


def as_stored(model: WholeModel) -> tuple[Tensor, ...]:
    """The experts of each request as an engine returns them, 0 in layers without any."""
    found = []
    for rows in model.routed:
        own = torch.tensor(rows)
        whole = own.new_zeros(len(rows), model.layers, own.shape[-1])
        whole[:, model.moe_layers] = own
        found.append(whole)
    return tuple(found)
