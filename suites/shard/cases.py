"""Cases of `shard`: what each rank holds, what the router chose, and what must come out in sum."""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case
from moe_conformance.model.specs import MLPSpec

# T tokens, E experts, K of them, D hidden, F expert and Fs shared intermediate width. 11 experts do not fill 3 ranks.
TINY = {"T": 33, "E": 11, "K": 4, "D": 20, "F": 12, "Fs": 24}
# 2F = D: a slice along the wrong dim has the right shape.
EQUAL = {"T": 16, "E": 8, "K": 2, "D": 24, "F": 12, "Fs": 12}
# 2F < D, as in most current models, and F > D: w13 and w2 are wider than high here, and higher than wide there.
NARROW = {**TINY, "F": 6}
WIDE = {**TINY, "F": 28}

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
    name: str,
    clause: str = "shard.sum",
    tier: str = "core",
    dims: dict[str, int] = TINY,
    activation: Any = "silu",
    gated: bool = True,
    bias: bool = False,
    shared: bool | dict[str, Any] = False,
    **recipe: Any,
) -> Case:
    """shared: fields of its MLPSpec, or whether there is one. rotated: local ids do not rise with global ids.

    dropped: of 20 ids, so many are -1. hot: everybody's first id.
    """
    dims = {**dims, **{key: recipe.pop(key) for key in tuple(recipe) if key in dims}}
    recipe = {
        **dims,
        "mlp": MLPSpec(dims["F"], activation, gated=gated, bias=bias),
        "shared": MLPSpec(dims["Fs"], **(shared if isinstance(shared, dict) else {})) if shared else None,
        "output_scale": 1.0,
        "identity_experts": 0,
        "owners": OWNERS["contiguous"],
        "rotated": False,
        "tp": 1,
        "dropped": 0,
        "hot": None,
        "copies": (),
        "dtype": "float32",
        "arguments": {},
        **recipe,
    }
    if dims["F"] % recipe["tp"]:
        recipe["needs"] = ("uneven_width",)
    return Case(f"shard-{name}", stage="shard", clause=clause, recipe=recipe, tier=tier)


SUMS = (
    _shard("ep3-contiguous", tier="smoke"),
    _shard("ep3-round-robin", owners=OWNERS["round-robin"]),
    _shard("ep3-scattered", owners=OWNERS["scattered"], rotated=True, tier="smoke"),
    _shard("ep3-empty-rank", owners=OWNERS["empty-rank"]),
    _shard("ep3-all-on-last", owners=OWNERS["all-on-last"]),
    _shard("ep3-nothing-dropped", dims=TINY | {"T": 40}),
    _shard("ep3-dropped", owners=OWNERS["scattered"], rotated=True, dropped=6),
    _shard("ep3-hot", owners=OWNERS["scattered"], hot=9),
    _shard("ep3-bf16", owners=OWNERS["scattered"], rotated=True, dtype="bfloat16"),
    *(_shard(f"ep3-{T}-tokens", T=T) for T in (0, 1, 7)),
    _shard("ep3-bias", bias=True, activation="gelu_tanh"),
    _shard("ep3-not-gated", gated=False, activation="relu2", bias=True),
    _shard("ep3-scale", owners=OWNERS["scattered"], rotated=True, output_scale=2.5),
    _shard("ep3-identity", owners=OWNERS["scattered"], rotated=True, identity_experts=3, output_scale=2.5),
    _shard("ep3-tp2-identity", tp=2, owners=OWNERS["scattered"], identity_experts=3),
    _shard("tp2", tp=2, owners=ONE_RANK, tier="smoke"),
    _shard("tp2-bias", tp=2, bias=True, owners=ONE_RANK),
    _shard("tp2-dropped-bias", tp=2, bias=True, owners=ONE_RANK, dropped=6),
    _shard("tp2-not-gated", tp=2, gated=False, activation="relu2", bias=True, owners=ONE_RANK),
    _shard("tp3-uneven", tp=3, F=10, bias=True, owners=ONE_RANK),
    _shard("tp2-0-tokens", tp=2, T=0, owners=ONE_RANK),
    _shard("ep3-tp2", tp=2, owners=OWNERS["scattered"], rotated=True, bias=True),
    _shard("ep3-tp2-bf16", tp=2, bias=True, activation="gelu_tanh", dtype="bfloat16"),
    *(
        _shard(f"{ranks}-narrow{name}", dims=NARROW, tier="smoke" if not name else "core", **where, **mlp)
        for ranks, where in (("ep3", {"owners": OWNERS["scattered"]}), ("tp2", {"owners": ONE_RANK, "tp": 2}))
        for name, mlp in (
            ("", {}),
            ("-bias", {"bias": True}),
            ("-not-gated", {"gated": False, "activation": "relu2"}),
            ("-not-gated-bias", {"gated": False, "activation": "relu2", "bias": True}),
        )
    ),
    _shard("ep3-tp2-narrow-bf16", dims=NARROW, owners=OWNERS["scattered"], tp=2, bias=True, dtype="bfloat16"),
)

# poison: pairs of others and of none have NaN weights, and tokens without any expert NaN in x.
NOTHING = (
    _shard("nothing-of-others", "shard.nothing-of-others", poison=False, owners=OWNERS["scattered"], tier="smoke"),
    _shard("nothing-of-others-empty-rank", "shard.nothing-of-others", poison=False, owners=OWNERS["empty-rank"]),
    _shard("nothing-of-others-tp2-bias", "shard.nothing-of-others", poison=False, tp=2, bias=True),
    _shard("nothing-of-others-poison", "shard.nothing-of-others", poison=True, bias=True),
    _shard(
        "nothing-of-dropped", "shard.nothing-of-others", poison=False, owners=OWNERS["scattered"], dropped=6, bias=True
    ),
    _shard("nothing-of-dropped-poison", "shard.nothing-of-others", poison=True, dropped=6, bias=True),
)

# -2 and -11 would wrap to experts 9 and 0; 2^31 - 1 times a row's bytes lies far outside any buffer. The part is held
# against that of the same batch with -1 in the id's place.
OUT_OF_RANGE = tuple(
    _shard(f"out-of-range-{name}", "shard.out-of-range", T=7, outside=outside, bias=True)
    for name, outside in (("e", 11), ("minus-2", -2), ("minus-e", -11), ("int32-max", 2**31 - 1))
)

SHARED = (
    _shard("shared-ep3", "shard.shared", shared=True, tier="smoke"),
    _shard("shared-ep3-empty-rank", "shard.shared", shared=True, owners=OWNERS["empty-rank"]),
    _shard("shared-tp2", "shard.shared", shared=True, tp=2, owners=ONE_RANK),
    _shard("shared-ep3-tp2", "shard.shared", shared=True, tp=2, owners=OWNERS["scattered"]),
    _shard("shared-ep3-dropped", "shard.shared", shared=True, dropped=6),
    _shard("shared-ep3-scale", "shard.shared", shared=True, output_scale=2.5),
    # Nemotron-H's has no gate; a bias of the second projection is in the sum once, too.
    _shard(
        "shared-tp2-not-gated", "shard.shared", shared={"activation": "relu2", "gated": False}, tp=2, owners=ONE_RANK
    ),
    _shard("shared-ep3-tp2-bias", "shard.shared", shared={"bias": True}, tp=2, owners=OWNERS["scattered"]),
)

REPLICAS = (
    _shard("replicas", "shard.same-output", copies=COPIES, tier="smoke"),
    _shard("replicas-nothing-dropped", "shard.same-output", copies=COPIES, hot=3),
    _shard("replicas-dropped", "shard.same-output", copies=COPIES, dropped=6),
    _shard("replicas-1-token", "shard.same-output", copies=COPIES, T=1),
    _shard("replicas-tp2-bias", "shard.same-output", copies=COPIES, tp=2, bias=True),
)

ARGUMENTS = (
    _shard("x-columns", "inputs.strides", arguments={"x": "columns", "ids": "sliced", "weights": "transposed"}),
    _shard("x-transposed-bias", "inputs.strides", arguments={"x": "transposed", "ids": "columns"}, bias=True),
    _shard("x-sliced-tp2", "inputs.strides", arguments={"x": "sliced", "tensors": "transposed"}, tp=2),
    _shard("x-expanded-bf16", "inputs.strides", arguments={"x": "expanded", "weights": "sliced"}, dtype="bfloat16"),
    _shard("ids-int32", "inputs.dtypes", arguments={"ids": "int32"}, owners=OWNERS["scattered"], dropped=6),
)

_ORIENTED = "matrices.orientation"
ORIENTED = (
    _shard("ep4-equal-dims", _ORIENTED, dims=EQUAL, owners=(3, 0, 0, 1, 2, 2, 3, 1), rotated=True),
    _shard("tp2-equal-dims", _ORIENTED, tp=2, dims=EQUAL, owners=(0,) * 8),
    _shard("ep3-wide", _ORIENTED, dims=WIDE, owners=OWNERS["scattered"]),
    _shard("tp2-wide-not-gated", _ORIENTED, dims=WIDE, owners=ONE_RANK, tp=2, gated=False, activation="relu2"),
    _shard("tp2-square", _ORIENTED, tp=2, dims={**EQUAL, "F": 24, "E": 24}, owners=(0,) * 24),
)

CHUNKS = (
    _shard("ep3-129-tokens", "batches.any-size", T=129, owners=OWNERS["scattered"]),
    _shard("tp2-130-tokens-bf16", "batches.any-size", T=130, tp=2, owners=ONE_RANK, dtype="bfloat16"),
)

WRITTEN = (
    _shard("written-empty-rank", "outputs.written", owners=OWNERS["empty-rank"], T=3),
    _shard("written-all-dropped", "outputs.written", dropped=20, T=5),
    _shard("written-no-tokens-tp2", "outputs.written", T=0, tp=2),
    _shard("written-one-token", "outputs.written", owners=OWNERS["scattered"], T=1, dtype="bfloat16"),
)

STATE = (
    _shard("after-others", "calls.same-result", owners=OWNERS["scattered"], dropped=6),
    _shard("after-others-tp2", "calls.same-result", tp=2, T=7),
)

CASES = (*SUMS, *NOTHING, *OUT_OF_RANGE, *SHARED, *REPLICAS, *ARGUMENTS, *ORIENTED, *CHUNKS, *WRITTEN, *STATE)
