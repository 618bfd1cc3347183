"""Experts cases: what experts compute, and how their outputs are weighed and summed, at a routing that is given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_conformance.catalogue.case import Case
from moe_conformance.model.specs import MLPSpec
from moe_conformance.suites.experts import stored

# T tokens, E experts, K of them, D hidden, F intermediate width. 2F > D.
TINY = {"T": 33, "E": 11, "K": 4, "D": 20, "F": 12}
# 2F < D, as most models have it.
NARROW = {**TINY, "F": 7}
# 2F = D: w13 and its transpose have one shape. F = D: so have w2 and its own.
EQUAL = {"T": 16, "E": 8, "K": 2, "D": 24, "F": 12}
SQUARE = {**EQUAL, "F": 24}
HUNDREDS = {"T": 9, "E": 256, "K": 8, "D": 20, "F": 7}
BEYOND_512 = {**HUNDREDS, "E": 896, "K": 16}
# Widths of Qwen3-30B-A3B and Gemma 4 26B-A4B, of a few experts.
QWEN3 = {"T": 3, "E": 3, "K": 2, "D": 2048, "F": 768}
GEMMA4 = {**QWEN3, "D": 2816, "F": 704}

# The rank of each of 11 experts.
SCATTERED = (2, 0, 1, 1, 2, 0, 0, 2, 1, 2, 0)

_SILU = MLPSpec(0)
FUNCTIONS: dict[str, MLPSpec] = {
    "silu": _SILU,
    "gelu": replace(_SILU, activation="gelu"),
    "gelu-tanh": replace(_SILU, activation="gelu_tanh"),
    "relu": replace(_SILU, activation="relu"),
    "relu2": replace(_SILU, activation="relu2"),
    "silu-bias": replace(_SILU, bias=True),
    "silu-not-gated": replace(_SILU, gated=False),
    "gelu-not-gated": replace(_SILU, activation="gelu", gated=False),
    "relu2-not-gated": replace(_SILU, activation="relu2", gated=False),
    "relu2-not-gated-bias": replace(_SILU, activation="relu2", gated=False, bias=True),
    # gpt-oss, DeepSeek-V4, Step-3.7, Inkling 2: half of all gates and ups are beyond the limit.
    "swiglu-oai": replace(_SILU, clamp="before", limit=0.75, alpha=1.75, up_offset=1.0, bias=True),
    "clamp-before": replace(_SILU, clamp="before", limit=0.75),
    "clamp-after": replace(_SILU, clamp="after", limit=0.5),
    "softcap": replace(_SILU, clamp="tanh", limit=0.75, up_limit=2.25),
    "weight-on-input": replace(_SILU, weight_on="input"),
    "weight-on-w2-input": replace(_SILU, weight_on="w2_input"),
    "output-norm": replace(_SILU, output_norm=0.0625),
}


def _case(name: str, clause: str, dims: dict[str, int] = TINY, tier: str = "core", **recipe: Any) -> Case:
    """function: by name. owners, rank: the rank of each expert and whose part is asked for; local ids rotated.

    dropped: of 20 ids so many are -1. hot: an expert that is every token's first.
    """
    recipe = {"function": "silu", "dropped": 0, "hot": None, "dtype": "float32", **recipe}
    mlp = replace(FUNCTIONS[recipe.pop("function")], width=dims["F"])
    recipe = {"output_scale": 1.0, "identity_experts": 0, "owners": (), "rank": 0, "layout": "contiguous", **recipe}
    return Case(
        f"experts-{name}",
        stage="experts",
        clause=clause,
        recipe={**dims, "mlp": mlp, **recipe},
        tier=tier,
    )


FUNCTION_CASES = (
    *(
        _case(
            f"{size}-{name}",
            "experts.function",
            dims,
            "smoke" if name in ("silu", "swiglu-oai") else "core",
            function=name,
        )
        for name in FUNCTIONS
        for size, dims in (("tiny", TINY), ("narrow", NARROW))
    ),
    *(
        _case(f"{size}-{name}", "experts.function", dims, function=name)
        for name in ("silu", "silu-bias", "relu2-not-gated")
        for size, dims in (("equal", EQUAL), ("square", SQUARE))
    ),
    *(
        _case(f"{name}-{dtype}", "experts.function", NARROW, function=name, dtype=long)
        for name in ("silu", "swiglu-oai", "gelu-tanh", "relu2-not-gated")
        for dtype, long in (("bf16", "bfloat16"), ("fp16", "float16"))
    ),
)

SUM_CASES = (
    _case("scale", "experts.combine", tier="smoke", output_scale=2.5),
    _case("scale-bias", "experts.combine", function="silu-bias", output_scale=2.5),
    _case("scale-bf16", "experts.combine", dtype="bfloat16", output_scale=2.5),
    *(_case(f"{T}-tokens", "experts.combine", {**NARROW, "T": T}) for T in (0, 1, 2, 131)),
    _case("one-expert", "experts.combine", {**TINY, "E": 1, "K": 1}),
    _case("all-experts", "experts.combine", {**TINY, "E": 8, "K": 8}),
    # More pairs of one expert than any tile has rows, and than 512.
    _case("hot", "experts.combine", {**NARROW, "T": 600, "K": 2}, hot=9),
    _case("hundreds", "experts.combine", HUNDREDS),
    _case("hundreds-bias", "experts.combine", HUNDREDS, function="silu-bias"),
    _case(
        "131-tokens-bias-not-gated-bf16",
        "experts.combine",
        {**NARROW, "T": 131},
        function="relu2-not-gated-bias",
        dtype="bfloat16",
    ),
    _case("strided", "experts.combine", layout="strided"),
    _case("strided-131-tokens", "experts.combine", {**NARROW, "T": 131}, layout="strided"),
    _case("hundreds-one-token", "experts.combine", {**HUNDREDS, "T": 1}),
    _case("beyond-512", "experts.combine", BEYOND_512),
    _case("beyond-512-many", "experts.combine", {**BEYOND_512, "T": 70, "K": 22}, "full"),
    _case("qwen3", "experts.combine", QWEN3),
    _case("qwen3-bf16", "experts.combine", QWEN3, "full", dtype="bfloat16"),
    _case("gemma4", "experts.combine", GEMMA4, "full", function="gelu-tanh"),
    _case("identity", "experts.combine", identity_experts=3),
    _case("identity-scale", "experts.combine", identity_experts=3, output_scale=2.5, dropped=6),
)

# A third of the pairs has no expert; every rank but one lacks most.
NO_EXPERT_CASES = (
    _case("dropped", "experts.no-expert", tier="smoke", dropped=6),
    _case("dropped-bias", "experts.no-expert", function="silu-bias", dropped=6),
    _case("all-dropped", "experts.no-expert", dropped=20),
    *(_case(f"ep3-rank{rank}", "experts.no-expert", owners=SCATTERED, rank=rank) for rank in range(3)),
    # On every rank: an id of -1 that wraps is the last expert, which one of them has.
    *(
        _case(f"ep3-dropped-rank{rank}", "experts.no-expert", NARROW, owners=SCATTERED, rank=rank, dropped=6)
        for rank in range(3)
    ),
    _case("ep3-bias-dropped", "experts.no-expert", function="silu-bias", owners=SCATTERED, rank=0, dropped=6),
    _case("input-weight-dropped", "experts.no-expert", function="weight-on-input", dropped=6),
    _case("ep3-scale-dropped", "experts.no-expert", owners=SCATTERED, rank=1, dropped=6, output_scale=2.5),
    _case("ep3-identity", "experts.no-expert", owners=SCATTERED, rank=1, identity_experts=3, output_scale=2.5),
    _case("ep5-beyond-512", "experts.no-expert", BEYOND_512, owners=tuple(e * 7 % 5 for e in range(896)), rank=3),
)

# Ids as they come, which an engine that checks them refuses or ignores.
OUTSIDE_CASES = (
    _case("id-minus-one", "experts.out-of-range", outside=-1),
    _case("id-e", "experts.out-of-range", outside=11),
    _case("id-minus-two", "experts.out-of-range", outside=-2),
    _case("id-large", "experts.out-of-range", outside=1 << 20),
    _case("id-e-ep3", "experts.out-of-range", owners=SCATTERED, rank=1, outside=11),
)

CASES = (*FUNCTION_CASES, *SUM_CASES, *NO_EXPERT_CASES, *OUTSIDE_CASES, *stored.CASES)
