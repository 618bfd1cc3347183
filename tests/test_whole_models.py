"""The whole models that engines serve: their files are what tools/whole_models.py makes, and answers are told apart."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from whole_models import MODELS, made

from moe_conformance.engine import Generated
from moe_conformance.errors import Nonconformance
from moe_conformance.suites.generate import cases
from moe_conformance.suites.generate.models import PLACE, whole_model
from moe_conformance.suites.generate.served import as_stored, misplaced, wrong_routes, wrong_tokens


def test_every_model_is_served_and_every_file_made() -> None:
    assert sorted(file.stem for file in PLACE.iterdir()) == sorted(MODELS) == sorted(cases.MODELS)
    assert {name: model_type for name, (model_type, _) in MODELS.items()} == cases.MODELS


@pytest.mark.parametrize(
    "name", ["qwen3-moe", *(pytest.param(n, marks=pytest.mark.nightly) for n in MODELS if n != "qwen3-moe")]
)
def test_a_file_says_what_its_model_answers(name: str) -> None:
    assert json.loads((PLACE / f"{name}.json").read_text()) == json.loads(json.dumps(made(name)))


@pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith("-alike")])
def test_requests_show_what_they_are_for(name: str) -> None:
    """A prefix of more than a block of 32, one token alone, experts of each token, and ids beyond a byte where E is."""
    model = whole_model(name)
    first, second, alone, _ = model.prompts
    assert first[:33] == second[:33] and first[33] != second[33] and len(alone) == 1
    assert all(len(row) == len(prompt) + 7 for row, prompt in zip(model.routed, model.prompts, strict=True))
    assert len({str(row) for rows in model.routed for row in rows}) > sum(map(len, model.prompts)) // 2
    largest = max(max(ids) for rows in model.routed for row in rows for ids in row)
    assert (largest > 255) == name.endswith("e300")


def _wrong(answer: Generated) -> str:
    model = whole_model("qwen3-moe")
    return "\n".join([*wrong_tokens(model, answer), *wrong_routes(model, answer)])


def _right(**changes: Any) -> Generated:
    model = whole_model("qwen3-moe")
    return Generated(tuple(map(tuple, model.tokens)), as_stored(model))._replace(**changes)


def test_what_is_wrong_is_said_with_whose_it_is() -> None:
    assert _wrong(_right()) == ""
    tokens, routed = _right()
    assert routed is not None
    swapped = _wrong(_right(tokens=(tokens[1], *tokens[1:])))
    assert swapped.startswith("request 0: token 0 is ") and "these are the tokens of request 1" in swapped
    assert "request 0: 7 tokens, want 8" in _wrong(_right(tokens=(tokens[0][:7], *tokens[1:])))
    shifted = _wrong(_right(routed=(routed[0].roll(1, 0), *routed[1:])))
    assert "position 0: experts" in shifted and "this is the row of request 0, position 46" in shifted
    assert _wrong(_right(routed=routed[:3])) == "routed experts of 3 requests, want of 4"
    with pytest.raises(Nonconformance, match=r"request 0: routed experts \[P \+ G - 1, L, K\]: got shape \[48, 3, 2\]"):
        _wrong(_right(routed=(torch.cat([routed[0], routed[0][-1:]]), *routed[1:])))
    with pytest.raises(Nonconformance, match="want an integer"):
        _wrong(_right(routed=(routed[0].float(), *routed[1:])))


def test_rows_in_other_places_are_told_where_single_ones_are_not() -> None:
    """What is judged in a narrow dtype: no shift, no other request's rows; but one row in four may be others."""
    model = whole_model("qwen3-moe")
    _, routed = _right()
    assert routed is not None
    assert list(misplaced(model, _right())) == []
    for shift in (1, 2, 7, -1):
        wrong = list(misplaced(model, _right(routed=tuple(rows.roll(shift, 0) for rows in routed))))
        assert [line.partition(":")[0] for line in wrong] == ["request 0", "request 1", "request 3"]
    stale = (torch.cat([routed[3], routed[0]])[: len(routed[0])], *routed[1:])
    assert len(list(misplaced(model, _right(routed=stale)))) == 1
    flipped = tuple(rows.clone() for rows in routed)
    for rows in flipped:
        rows[::4] = (rows[::4] + 1) % 8
    assert list(misplaced(model, _right(routed=flipped))) == []
