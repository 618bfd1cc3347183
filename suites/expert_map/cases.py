"""Cases of `expert_map`: how many experts on how many ranks, in runs or in turns."""

from __future__ import annotations

from moe_conformance.catalogue.case import Case

PLACES = tuple(
    Case(
        f"expert-map-{placement.replace('_', '-')}-{experts}-on-{ranks}",
        stage="expert_map",
        clause="expert-map.one-place",
        recipe={
            "experts": experts,
            "ranks": ranks,
            "placement": placement,
            "needs": ("idle_ranks",) if experts < ranks else (),
        },
        tier="smoke" if (experts, ranks) == (11, 3) else "core",
    )
    for placement in ("contiguous", "round_robin")
    # Uneven, even, fewer experts than ranks, alone, as many left over as can be, as many as the largest models have.
    for experts, ranks in ((11, 3), (8, 4), (5, 7), (9, 1), (63, 8), (896, 5))
)

CASES = PLACES
