"""Each row of a record beside the router's own answer: the same experts, others within rounding, or wrong ones.

The reference is the model's forward one precision wider than it is served in, on weights as they are served. How far
a router's scores may be off there has two parts, and both are of this row and layer:

- the router's own roundings, as the oracle derives them (moe_conformance/oracle, docs/trust.md);
- those of all that comes before it, which no bound follows through whole layers. They are measured: the forward is run
  in the serving precision as well, and what moves the logits of a row between the two is the size of one such error.

A set of experts is within rounding where it is a best K for some scores within these errors. From the same margins
follows how many rows a correct engine is expected to answer otherwise: each score is moved at random by its error, and
the rows are counted of which another set is then the best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_conformance.model.specs import LayerSpec
from moe_conformance.oracle.choice import accepted, best
from moe_conformance.oracle.logits import logits_value
from moe_conformance.oracle.scores import compared_value
from moe_conformance.oracle.value import Value
from moe_conformance.routes.layerwise import Observed

# Rows at a time: of 512 experts, a float64 of each is 4 MiB.
ROWS = 1024
# Times that all scores are moved at random: the share that they give is known to a tenth where 100 rows of 1,000 flip.
DRAWS = 8


@dataclass(frozen=True)
class Margins:
    """Of one layer and all rows. compared: what top-k compares, and its errors. flips: [T], how probably rounding alone
    changes the row's experts. table: the experts themselves, of a layer that looks them up by token id."""

    spec: LayerSpec
    compared: Value | None
    flips: Tensor
    table: Tensor | None = None

    def accepts(self, ids: Tensor, rows: Tensor) -> Tensor:
        """[R] bool: whether these ids [R, K] of these rows may be a correct router's. ids: unique, in range."""
        if self.compared is None:
            assert self.table is not None
            return (ids.sort(1).values == self.table[rows].sort(1).values).all(1)
        found = [
            accepted(ids[at], self.compared[rows[at]], self.spec.routing) for at in torch.arange(len(rows)).split(ROWS)
        ]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.bool)


def margins(spec: LayerSpec, narrow: Observed, wider: Observed, dtype: torch.dtype, token_ids: Tensor) -> Margins:
    """narrow, wider: the layer in the precision of serving, and one wider."""
    routing = spec.routing
    if routing.selector == "table":
        table = wider.tensors["router.table"][token_ids].long()
        return Margins(spec, None, torch.zeros(len(token_ids)), table)
    parts = [_scores(spec, narrow, wider, dtype, rows) for rows in torch.arange(len(wider.x)).split(ROWS)]
    compared = Value(torch.cat([value.exact for value, _ in parts]), torch.cat([value.spread for value, _ in parts]))
    return Margins(spec, compared, torch.cat([flips for _, flips in parts]))


def _scores(
    spec: LayerSpec, narrow: Observed, wider: Observed, dtype: torch.dtype, rows: Tensor
) -> tuple[Value, Tensor]:
    """What is compared, [R, E], with its errors, and the probability of another choice, [R]."""
    own = logits_value(narrow.x[rows].to(dtype), spec.logits, narrow.tensors)
    exact = logits_value(wider.x[rows], spec.logits, wider.tensors).exact
    moved = (own.exact - exact).square().mean(1, keepdim=True).sqrt()  # [R, 1]
    moved = moved.maximum(moved.median())  # one row's own may be small by chance
    logits = Value(exact, torch.hypot(own.spread, moved.expand_as(exact)))
    compared = compared_value(logits, spec.routing, wider.tensors, dtype)
    # A rounding of at most u is as likely anywhere in between; its root mean square is u / sqrt(3).
    spread = torch.hypot(own.spread / math.sqrt(3), moved)
    ids = _best(logits.exact, spec, wider.tensors, dtype)
    flips = torch.zeros(len(rows), dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        noise = torch.randn(exact.shape, generator=random, dtype=torch.float64) * spread
        flips += (_best(exact + noise, spec, wider.tensors, dtype) != ids).any(1).double() / DRAWS
    return Value(compared.exact, compared.spread), flips


def _best(logits: Tensor, spec: LayerSpec, tensors: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """The ids of the best K, ascending."""
    compared = compared_value(Value.of(logits), spec.routing, tensors, dtype)
    return best(compared, spec.routing)[0].sort(1).values
