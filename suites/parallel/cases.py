"""Cases of experts on several ranks: what each rank holds, what the router chose, and what must come out in sum."""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case

# T tokens, E experts, K of them, D hidden, F expert and Fs shared intermediate width. 11 experts do not fill 3 ranks.
TINY = {"T": 33, "E": 11, "K": 4, "D": 20, "F": 12, "Fs": 24}
# 2F = D: a slice along the wrong dim has the right shape.
EQUAL = {"T": 16, "E": 8, "K": 2, "D": 24, "F": 12, "Fs": 12}

# The rank of each of 11 experts.
OWNERS = {
    "contiguous": (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2),
    "round-robin": (0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1),
    "scattered": (2, 0, 1, 1, 2, 0, 0, 2, 1, 2, 0),
    "empty-rank": (0, 2, 0, 2, 2, 0, 0, 2, 0, 2, 0),
    "all-on-last": (2,) * 11,
}
ONE_RANK = (0,) * 11

# The expert that each of 15 physical ones, five a rank, is a copy of; the second is the first after a rearrangement.
COPIES = ((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 3, 7, 3, 3), (3, 9, 0, 3, 7, 1, 10, 3, 3, 5, 7, 2, 8, 6, 4))


def _shard(
    name: str, clause: str = "ranks.sum", tier: str = "core", dims: dict[str, int] = TINY, **recipe: Any
) -> Case:
    """rotated: local ids do not rise with global ids. dropped: of 20 ids, so many are -1. hot: everybody's first id."""
    recipe = {
        **dims,
        "owners": OWNERS["contiguous"],
        "rotated": False,
        "tp": 1,
        "dropped": 6,
        "hot": None,
        "activation": "silu",
        "gated": True,
        "bias": False,
        "shared": False,
        "copies": (),
        "dtype": "float32",
        **recipe,
    }
    needs = {
        "not_gated": not recipe["gated"],
        "bias": recipe["bias"],
        recipe["activation"]: recipe["activation"] != "silu",
        "tensor_parallel": recipe["tp"] > 1,
        "uneven_width": recipe["F"] % recipe["tp"] > 0,
        "shared": recipe["shared"],
        "idle_ranks": len(set(recipe["owners"])) <= max(recipe["owners"]),
        "replicas": bool(recipe["copies"]),
    }
    needed = frozenset(feature for feature, needed in needs.items() if needed)
    return Case(f"shard-{name}", stage="shard", clause=clause, recipe=recipe, tier=tier, needs=needed)


SUMS = (
    _shard("ep3-contiguous", tier="smoke"),
    _shard("ep3-round-robin", owners=OWNERS["round-robin"]),
    _shard("ep3-scattered", owners=OWNERS["scattered"], rotated=True, tier="smoke"),
    _shard("ep3-empty-rank", owners=OWNERS["empty-rank"]),
    _shard("ep3-all-on-last", owners=OWNERS["all-on-last"]),
    _shard("ep3-nothing-dropped", dropped=0),
    _shard("ep3-hot", owners=OWNERS["scattered"], hot=9, dropped=0),
    _shard("ep4-equal-dims", dims=EQUAL, owners=(3, 0, 0, 1, 2, 2, 3, 1), rotated=True),
    _shard("ep3-bf16", owners=OWNERS["scattered"], rotated=True, dtype="bfloat16"),
    *(_shard(f"ep3-{T}-tokens", T=T) for T in (0, 1, 7)),
    _shard("ep3-bias", bias=True, activation="gelu_tanh"),
    _shard("ep3-not-gated", gated=False, activation="relu2", bias=True),
    _shard("tp2", tp=2, owners=ONE_RANK, tier="smoke"),
    _shard("tp2-bias", tp=2, bias=True, owners=ONE_RANK),
    _shard("tp2-not-gated", tp=2, gated=False, activation="relu2", bias=True, owners=ONE_RANK),
    _shard("tp2-equal-dims", tp=2, dims=EQUAL, owners=(0,) * 8),
    _shard("tp3-uneven", tp=3, F=10, bias=True, owners=ONE_RANK),
    _shard("tp2-0-tokens", tp=2, T=0, owners=ONE_RANK),
    _shard("ep3-tp2", tp=2, owners=OWNERS["scattered"], rotated=True, bias=True),
    _shard("ep3-tp2-bf16", tp=2, bias=True, activation="gelu_tanh", dtype="bfloat16"),
)

# poison: pairs of others and of none have NaN weights, and tokens without any expert NaN in x.
NOTHING = (
    _shard("nothing-of-others", "ranks.nothing-of-others", poison=False, owners=OWNERS["scattered"], tier="smoke"),
    _shard("nothing-of-others-empty-rank", "ranks.nothing-of-others", poison=False, owners=OWNERS["empty-rank"]),
    _shard("nothing-of-others-tp2-bias", "ranks.nothing-of-others", poison=False, tp=2, bias=True),
    _shard("nothing-of-others-poison", "ranks.nothing-of-others", poison=True, bias=True),
)

# -2 and -11 would wrap to experts 9 and 0; 2^31 - 1 times a row's bytes lies far outside any buffer.
OUT_OF_RANGE = tuple(
    _shard(f"out-of-range-{name}", "ranks.out-of-range", T=7, outside=outside, bias=True)
    for name, outside in (("e", 11), ("minus-2", -2), ("minus-e", -11), ("int32-max", 2**31 - 1))
)

SHARED = (
    _shard("shared-ep3", "shared.once", shared=True, tier="smoke"),
    _shard("shared-ep3-empty-rank", "shared.once", shared=True, owners=OWNERS["empty-rank"]),
    _shard("shared-tp2", "shared.once", shared=True, tp=2, owners=ONE_RANK),
    _shard("shared-ep3-tp2", "shared.once", shared=True, tp=2, owners=OWNERS["scattered"]),
)

REPLICAS = (
    _shard("replicas", "replicas.same-output", copies=COPIES, tier="smoke"),
    _shard("replicas-nothing-dropped", "replicas.same-output", copies=COPIES, dropped=0, hot=3),
    _shard("replicas-1-token", "replicas.same-output", copies=COPIES, T=1),
    _shard("replicas-tp2-bias", "replicas.same-output", copies=COPIES, tp=2, bias=True),
)

PLACES = tuple(
    Case(
        f"expert-map-{placement.replace('_', '-')}-{experts}-on-{ranks}",
        stage="expert_map",
        clause="ranks.one-place",
        recipe={"experts": experts, "ranks": ranks, "placement": placement},
        needs=frozenset({placement, "idle_ranks"} if experts < ranks else {placement}),
        tier="smoke" if (experts, ranks) == (11, 3) else "core",
    )
    for placement in ("contiguous", "round_robin")
    # Uneven, even, fewer experts than ranks, alone, as many left over as can be.
    for experts, ranks in ((11, 3), (8, 4), (5, 7), (9, 1), (63, 8))
)


def _replicate(name: str, copies: tuple[int, ...], tokens: int, tier: str = "core", **recipe: Any) -> tuple[Case, ...]:
    """For the choice and for the load. padding: rows behind the real ones, whose ids are as legal as any."""
    recipe = {"E": 6, "K": 3, "T": tokens, "padding": 5, "dropped": 6, "copies": copies, **recipe}
    return tuple(
        Case(f"replicate-{what}-{name}", stage="replicate", clause=f"replicas.{what}", recipe=recipe, tier=tier)
        for what in ("choice", "load")
    )


REPLICATE = (
    *_replicate("two-copies", (0, 1, 2, 3, 4, 5, 2, 5), 33, "smoke"),
    *_replicate("one-copy-each", (0, 1, 2, 3, 4, 5), 33),
    *_replicate("moved", (4, 0, 5, 2, 3, 1, 0, 0, 2), 33),
    *_replicate("many-of-last", (5, 5, 0, 1, 5, 2, 5, 3, 5, 4), 130),
    *_replicate("nothing-dropped", (0, 1, 2, 3, 4, 5, 2, 5), 33, dropped=0, padding=0),
    *_replicate("no-tokens", (0, 1, 2, 3, 4, 5, 2, 5), 0),
    *_replicate("one-token", (0, 1, 2, 3, 4, 5, 2, 5), 1),
)

CASES = (*SUMS, *NOTHING, *OUT_OF_RANGE, *SHARED, *REPLICAS, *PLACES, *REPLICATE)
