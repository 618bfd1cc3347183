"""Cases of `exchange`: how many tokens each rank has, where the experts lie, and which of them are chosen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from moe_conformance.catalogue.case import Case
from moe_conformance.model.specs import MLPSpec

# E experts, K of them, D hidden, F expert and Fs shared width: of those that torch's grouped product takes in bfloat16.
DIMS = {"E": 12, "K": 3, "D": 24, "F": 16, "Fs": 8}
# The rank of each of 12 experts.
OWNERS = {
    "alone": (0,) * 12,
    "2": (0,) * 6 + (1,) * 6,
    "3": (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2),
    "4": (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3),
    "scattered": (2, 0, 1, 1, 2, 0, 0, 2, 1, 2, 0, 2),
    "idle-rank": (0, 2, 0, 2, 2, 0, 0, 2, 0, 2, 0, 2),
}


def _exchange(name: str, clause: str, tier: str = "core", shared: bool = False, **recipe: Any) -> Case:
    """rotated, dropped, hot: as for `shard`."""
    recipe = {
        **DIMS,
        "counts": (4, 4, 4),
        "between": (),
        "owners": OWNERS["3"],
        "rotated": False,
        "dropped": 0,
        "poison": False,
        "hot": None,
        "unpicked": (),
        "x": "distinct",
        "dtype": "float32",
        "processes": False,
        "mlp": MLPSpec(DIMS["F"]),
        "shared": MLPSpec(DIMS["Fs"]) if shared else None,
        **recipe,
    }
    return Case(f"exchange-{name}", "exchange", clause, recipe, tier)


def in_processes(cases: Iterable[Case]) -> tuple[Case, ...]:
    """The same with each rank a process, also in bfloat16, which trainers' libraries compute experts in."""
    return tuple(
        replace(
            case,
            id=f"{case.id.removesuffix('-bf16')}-processes{'-bf16' * (dtype == 'bfloat16')}",
            recipe={**case.recipe, "processes": True, "dtype": dtype},
            tier="full",
        )
        for case in cases
        for dtype in ("float32", "bfloat16")
        if case["dtype"] == "float32"
    )


_OWN = "exchange.own-tokens"
_IN_ONE = (
    _exchange("ep3", _OWN),
    _exchange("ep2", _OWN, counts=(5, 5), owners=OWNERS["2"]),
    _exchange("ep4", _OWN, "full", counts=(3, 3, 3, 3), owners=OWNERS["4"]),
    _exchange("alone", _OWN, "full", counts=(5,), owners=OWNERS["alone"]),
    _exchange("one-expert-each", _OWN, "full", K=1),
    _exchange("one-token-each", _OWN, counts=(1, 1, 1)),
    _exchange("scattered", _OWN, owners=OWNERS["scattered"], rotated=True),
    _exchange("idle-rank", _OWN, owners=OWNERS["idle-rank"]),
    # All experts of every token on the last rank, and none on it.
    _exchange("all-to-one-rank", _OWN, unpicked=tuple(range(8))),
    _exchange("unpicked-rank", _OWN, unpicked=(8, 9, 10, 11)),
    _exchange("unpicked-first-rank", _OWN, "full", unpicked=(0, 1, 2, 3)),
    _exchange("hot", _OWN, hot=6),
    _exchange("many-tokens", _OWN, "full", counts=(70, 70, 70), hot=6),
    # Every row twice, by tokens that chose other experts.
    _exchange("repeated-rows", _OWN, x="repeated"),
)
OWN = (*_IN_ONE, _exchange("ep3-bf16", _OWN, dtype="bfloat16"), *in_processes(_IN_ONE))

_COUNTS = "exchange.counts"
_COUNTS_IN_ONE = (
    _exchange("uneven", _COUNTS, "smoke", counts=(3, 7, 1)),
    _exchange("uneven-falling", _COUNTS, "full", counts=(9, 2), owners=OWNERS["2"]),
    _exchange("no-tokens-in-the-middle", _COUNTS, counts=(5, 0, 2)),
    _exchange("no-tokens-first", _COUNTS, "full", counts=(0, 4, 4)),
    _exchange("tokens-on-the-last-alone", _COUNTS, counts=(0, 0, 6)),
    _exchange("one-token-in-all", _COUNTS, "full", counts=(0, 1, 0)),
    _exchange("no-tokens", _COUNTS, counts=(0, 0, 0)),
    _exchange("uneven-scattered", _COUNTS, "full", counts=(2, 0, 7), owners=OWNERS["scattered"], rotated=True),
    _exchange("uneven-to-one-rank", _COUNTS, "full", counts=(0, 6, 3), unpicked=tuple(range(8))),
    _exchange("uneven-ep4", _COUNTS, "full", counts=(0, 5, 1, 0), owners=OWNERS["4"]),
)
COUNTS = (*_COUNTS_IN_ONE, *in_processes(_COUNTS_IN_ONE))

# poison: pairs of no expert have NaN weights, and tokens without any expert NaN in x.
_NO_EXPERT = "exchange.no-expert"
_NO_EXPERT_IN_ONE = (
    _exchange("dropped", _NO_EXPERT, counts=(5, 7, 5), dropped=6),
    _exchange("dropped-poison", _NO_EXPERT, counts=(5, 7, 5), dropped=6, poison=True),
    _exchange("all-dropped", _NO_EXPERT, "full", counts=(5, 5, 5), dropped=20),
)
NO_EXPERT = (*_NO_EXPERT_IN_ONE, *in_processes(_NO_EXPERT_IN_ONE))

_ARRIVALS = "exchange.arrivals"
_ARRIVALS_IN_ONE = (
    _exchange("arrivals", _ARRIVALS, counts=(3, 7, 1)),
    _exchange("arrivals-even", _ARRIVALS, "full"),
    _exchange("arrivals-scattered", _ARRIVALS, owners=OWNERS["scattered"], rotated=True),
    _exchange("arrivals-idle-rank", _ARRIVALS, "full", owners=OWNERS["idle-rank"]),
    _exchange("arrivals-no-tokens", _ARRIVALS, "full", counts=(0, 6, 0)),
    _exchange("arrivals-unpicked-rank", _ARRIVALS, "full", unpicked=(8, 9, 10, 11)),
    _exchange("arrivals-repeated-rows", _ARRIVALS, "full", x="repeated"),
    _exchange("arrivals-dropped", _ARRIVALS, counts=(5, 7, 5), dropped=6),
)
ARRIVALS = (*_ARRIVALS_IN_ONE, *in_processes(_ARRIVALS_IN_ONE))

_SHARED = "exchange.shared"
_SHARED_IN_ONE = (
    _exchange("shared", _SHARED, shared=True),
    _exchange("shared-uneven", _SHARED, shared=True, counts=(4, 0, 3)),
    _exchange("shared-dropped", _SHARED, "full", shared=True, counts=(5, 7, 5), dropped=6),
)
SHARED = (*_SHARED_IN_ONE, *in_processes(_SHARED_IN_ONE))

_STATE = "calls.same-result"
_STATE_IN_ONE = (
    _exchange("after-larger", _STATE, counts=(2, 0, 3), between=((6, 1, 9),)),
    _exchange("after-smaller", _STATE, counts=(6, 1, 9), between=((2, 0, 3), (0, 0, 0))),
    _exchange("after-even", _STATE, "full", between=((4, 4, 4),)),
)
STATE = (*_STATE_IN_ONE, *in_processes(_STATE_IN_ONE))

CASES = (*OWN, *COUNTS, *NO_EXPERT, *ARRIVALS, *SHARED, *STATE)
