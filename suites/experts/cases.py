"""Experts cases: what experts compute, and how their outputs are weighed and summed, at a routing that is given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_conformance.catalogue.case import Case
from moe_conformance.catalogue.layouts import LAYOUTS
from moe_conformance.model.specs import MLPSpec
from moe_conformance.suites.experts import stored

# T tokens, E experts, K of them, D hidden, F intermediate width. 2F > D.
TINY = {"T": 33, "E": 11, "K": 4, "D": 20, "F": 12}
# 2F < D, as most models have it.
NARROW = {**TINY, "F": 7}
# On a CPU with AMX torch's own product of bfloat16 lets rows meet where a width is no multiple of 32
# (findings/torch_amx_rows.py): where rows hold NaN, an engine is not judged by that.
WHOLE_TILES = {**TINY, "D": 64, "F": 32}
# 2F = D: w13 and its transpose have one shape. F = D: so have w2 and its own.
EQUAL = {"T": 16, "E": 8, "K": 2, "D": 24, "F": 12}
SQUARE = {**EQUAL, "F": 24}
BEYOND_512 = {"T": 9, "E": 896, "K": 16, "D": 20, "F": 7}
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

    dropped: of 20 ids so many are -1. hot: an expert that is every token's first. arguments: how x, ids, weights and
    tensors are given, where that is not contiguous and in the protocol's dtype.
    """
    recipe = {"function": "silu", "dropped": 0, "hot": None, "dtype": "float32", **recipe}
    mlp = replace(FUNCTIONS[recipe.pop("function")], width=dims["F"])
    recipe = {"output_scale": 1.0, "identity_experts": 0, "owners": (), "rank": 0, "arguments": {}, **recipe}
    return Case(
        f"experts-{name}",
        stage="experts",
        clause=clause,
        recipe={**dims, "mlp": mlp, **recipe},
        tier=tier,
    )


FUNCTION_CASES = (
    *(
        _case(f"{size}-{name}", "experts.function", dims, "smoke", function=name)
        for name in ("silu", "swiglu-oai")
        for size, dims in (("tiny", TINY), ("narrow", NARROW))
    ),
    *(
        _case(f"narrow-{name}", "experts.function", NARROW, function=name)
        for name in FUNCTIONS
        if name not in ("silu", "swiglu-oai")
    ),
    _case("swiglu-oai-bf16", "experts.function", NARROW, function="swiglu-oai", dtype="bfloat16"),
    _case("swiglu-oai-fp16", "experts.function", NARROW, function="swiglu-oai", dtype="float16"),
    # One token often takes a path of its own.
    _case("swiglu-oai-one-token", "experts.function", {**TINY, "T": 1}, function="swiglu-oai"),
)

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _sizes(row: str) -> Case:
    """A row is: T, E, K, D, F, dtype, function. With 520 tokens the last expert is everybody's first."""
    *dims, dtype, function = row.split()
    T, E, K, D, F = map(int, dims)
    name = f"sizes-t{T}-e{E}-k{K}-d{D}-f{F}-{dtype}-{function}"
    sizes = {"T": T, "E": E, "K": K, "D": D, "F": F}
    hot = E - 1 if T == 520 else None
    return _case(name, "experts.combine", sizes, dtype=_DTYPES[dtype], function=function, hot=hot)


# Each two values of any two columns meet in a row, but for a K beyond E: kernels branch by two sizes at once. 20 and 72
# columns fill no tile, 32 and 64 fill all.
SIZE_CASES = tuple(
    _sizes(row)
    for row in (
        "  1   5  1 20 32 fp32 swiglu-oai",
        "  1  24  2 72 32 fp32 silu",
        "  1 256 10 64  7 fp16 silu-bias",
        "  1 256 22 64 36 bf16 relu2-not-gated",
        " 17   5  1 20  7 bf16 relu2-not-gated",
        " 17  24  2 64 36 fp16 relu2-not-gated",
        " 17  24 10 64  7 fp32 swiglu-oai",
        " 17  24 22 72 32 bf16 silu-bias",
        " 17 256 10 20 36 fp32 silu",
        " 70   5  1 64 36 fp32 silu-bias",
        " 70  24  1 20  7 fp16 silu",
        " 70  24 10 72 36 fp16 relu2-not-gated",
        " 70  24 22 20 32 fp32 silu",
        " 70  24 22 72  7 fp32 relu2-not-gated",
        " 70 256  2 72 36 bf16 swiglu-oai",
        "520   5  1 72  7 fp32 silu",
        "520   5  2 20  7 fp16 silu-bias",
        "520  24 10 64 32 bf16 silu",
        "520  24 22 20 36 fp16 swiglu-oai",
        "520 256  1 72 32 fp16 relu2-not-gated",
    )
)

SUM_CASES = (
    *SIZE_CASES,
    _case("scale", "experts.combine", tier="smoke", output_scale=2.5),
    _case("scale-bias", "experts.combine", function="silu-bias", output_scale=2.5),
    _case("scale-bf16", "experts.combine", dtype="bfloat16", output_scale=2.5),
    _case("0-tokens", "experts.combine", {**NARROW, "T": 0}),
    _case("one-expert", "experts.combine", {**TINY, "E": 1, "K": 1}),
    _case("all-experts", "experts.combine", {**TINY, "E": 8, "K": 8}),
    _case("one-choice-scale", "experts.combine", {**TINY, "K": 1}, output_scale=2.5),
    # Llama 4: the only weight multiplies what the expert reads.
    _case("one-choice-weight-on-input", "experts.combine", {**TINY, "K": 1}, function="weight-on-input"),
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
    # Every token chose an expert of rank 2.
    _case("ep3-cold-rank", "experts.no-expert", {**TINY, "K": 1}, hot=0, owners=SCATTERED, rank=1),
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

_PARTS = ("x", "ids", "weights", "tensors")
_SLICED = {"x": "sliced", "ids": "sliced", "weights": "sliced"}
# Each argument in each layout, and no two arguments in the same, so that strides of one taken for another's show.
_MIXED = tuple(
    {part: LAYOUTS[(start + place) % len(LAYOUTS)] for place, part in enumerate(_PARTS)}
    for start in range(len(LAYOUTS))
)

ARGUMENT_CASES = (
    _case("strided", "inputs.strides", arguments=_SLICED, tier="smoke"),
    _case("strided-131-tokens", "inputs.strides", {**NARROW, "T": 131}, arguments=_SLICED),
    *(_case(f"x-{mixed['x']}", "inputs.strides", arguments=mixed, function="silu-bias") for mixed in _MIXED),
    *(_case(f"x-{mixed['x']}-bf16", "inputs.strides", NARROW, arguments=mixed, dtype="bfloat16") for mixed in _MIXED),
    # Strides of a dim of one element may be anything.
    *(_case(f"x-{mixed['x']}-one-token", "inputs.strides", {**TINY, "T": 1}, arguments=mixed) for mixed in _MIXED[:1]),
    _case(
        "x-columns-ep3",
        "inputs.strides",
        arguments=_MIXED[0],
        function="relu2-not-gated-bias",
        owners=SCATTERED,
        rank=1,
        dropped=6,
    ),
    # A map that is a column of all ranks' maps.
    _case("map-sliced-ep3", "inputs.strides", arguments={"expert_map": "sliced"}, owners=SCATTERED, rank=1),
    *(
        _case(f"ids-int32-{short}", "inputs.dtypes", NARROW, arguments={"ids": "int32"}, dtype=long, dropped=dropped)
        for short, long, dropped in (("fp32", "float32", 6), ("bf16", "bfloat16", 0), ("fp16", "float16", 0))
    ),
    _case("ids-int32-ep3", "inputs.dtypes", arguments={"ids": "int32"}, owners=SCATTERED, rank=2),
    _case("ids-int32-one-token", "inputs.dtypes", {**TINY, "T": 1}, arguments={"ids": "int32"}),
    _case("weights-bf16", "inputs.dtypes", NARROW, arguments={"weights": "bfloat16"}, dtype="bfloat16"),
    _case("weights-fp16", "inputs.dtypes", NARROW, arguments={"weights": "float16"}, dtype="float16"),
)

_SHAPES = {
    "2f-is-d": {"D": 24, "F": 12, "E": 8},
    "f-is-d": {"D": 24, "F": 24, "E": 8},
    "2f-below-d": {"D": 24, "F": 7, "E": 8},
    "f-above-d": {"D": 12, "F": 28, "E": 8},
    "e-is-d": {"D": 24, "F": 10, "E": 24},
    "e-is-f": {"D": 20, "F": 14, "E": 14},
    "e-is-2f": {"D": 20, "F": 8, "E": 16},
    "all-are-one": {"D": 24, "F": 24, "E": 24, "T": 24},
}

ORIENTED_CASES = (
    *(
        _case(f"{size}-{name}", "matrices.orientation", dims, "smoke" if name == "silu" else "core", function=name)
        for name in ("silu", "silu-bias", "relu2-not-gated")
        for size, dims in (("equal", EQUAL), ("square", SQUARE))
    ),
    *(
        _case(
            f"{size}-{name}-{short}", "matrices.orientation", {"T": 9, "K": 2, **dims}, tier, function=name, dtype=long
        )
        for size, dims in _SHAPES.items()
        for name, short, long, tier in (
            ("silu", "bf16", "bfloat16", "core"),
            ("relu2-not-gated", "fp32", "float32", "core" if size in ("2f-is-d", "f-is-d", "2f-below-d") else "full"),
            ("silu-bias", "fp32", "float32", "core" if size in ("e-is-d", "all-are-one") else "full"),
        )
    ),
)

# Around the borders of chunks and tiles of 64, 128 and 256, and more pairs of one expert than any tile has, and 512.
_SMALL = {"T": 33, "E": 5, "K": 2, "D": 20, "F": 7}
CHUNK_CASES = (
    _case("131-tokens", "batches.any-size", {**NARROW, "T": 131}, tier="smoke"),
    _case("hot", "batches.any-size", {**NARROW, "T": 600, "K": 2}, hot=9),
    *(_case(f"{T}-tokens", "batches.any-size", {**_SMALL, "T": T}) for T in (64, 65, 129, 130, 257)),
    *(
        _case(f"{T}-tokens-bf16", "batches.any-size", {**_SMALL, "T": T}, dtype="bfloat16", function="silu-bias")
        for T in (65, 129, 257)
    ),
    _case("129-tokens-ep3", "batches.any-size", {**NARROW, "T": 129}, owners=SCATTERED, rank=1, dropped=6),
    *(
        _case(f"{T}-tokens", "batches.any-size", {**_SMALL, "T": T}, "full")
        for T in (63, 127, 128, 511, 513, 1025, 2050, 4097)
    ),
)

# The last rows are padding. Its ids are legal, or -1 where an engine knows that.
PADDING_CASES = (
    _case("padding", "rows.padding", tier="smoke", padding=21),
    _case("padding-bf16", "rows.padding", WHOLE_TILES, padding=32, dtype="bfloat16"),
    _case("padding-one-token-fp16", "rows.padding", {**NARROW, "T": 8}, padding=7, dtype="float16"),
    _case("padding-dropped", "rows.padding", padding=13, dropped=6),
    _case("padding-131-tokens-bias", "rows.padding", {**NARROW, "T": 131}, "full", padding=61, function="silu-bias"),
    _case("padding-ep3", "rows.padding", padding=13, owners=SCATTERED, rank=2),
)

UNCHANGED_CASES = (
    _case("unchanged-scale", "calls.inputs-unchanged", tier="smoke", output_scale=2.5),
    _case("unchanged-bf16", "calls.inputs-unchanged", NARROW, dtype="bfloat16", function="silu-bias"),
    _case("unchanged-one-token", "calls.inputs-unchanged", {**TINY, "T": 1}, dtype="bfloat16"),
    _case("unchanged-weight-on-input", "calls.inputs-unchanged", tier="full", function="weight-on-input"),
    _case("unchanged-131-tokens", "calls.inputs-unchanged", {**NARROW, "T": 131}, "full"),
    _case("unchanged-ep3-dropped", "calls.inputs-unchanged", owners=SCATTERED, rank=1, dropped=6),
)

OWN_MEMORY_CASES = (
    _case("own-memory", "outputs.own-memory"),
    _case("own-memory-bf16", "outputs.own-memory", {**NARROW, "T": 131}, "full", dtype="bfloat16"),
    _case("own-memory-one-token", "outputs.own-memory", {**TINY, "T": 1}),
    _case("own-memory-all-dropped", "outputs.own-memory", {**TINY, "T": 5}, dropped=20),
    _case("own-memory-identity", "outputs.own-memory", {**TINY, "K": 2}, identity_experts=3),
)

# A row of x, ids or weights lies 2^30 elements and more behind the one before, in a file of which little is written.
FAR_CASES = (
    _case("far-x", "inputs.beyond-int32", {**TINY, "T": 3}, "smoke", dtype="bfloat16", arguments={"x": "far"}),
    _case(
        "far-x-stored",
        "inputs.beyond-int32",
        {**stored.WHOLE, "T": 3},
        arguments={"x": "far"},
        quant=stored.FORMS["fp8-block"],
    ),
    _case("far-ids", "inputs.beyond-int32", {**TINY, "T": 3}, arguments={"ids": "far"}),
    _case("far-weights", "inputs.beyond-int32", {**TINY, "T": 3}, arguments={"weights": "far"}),
    _case(
        "far-matrices-bf16",
        "inputs.beyond-int32",
        {**TINY, "E": 3, "K": 2},
        dtype="bfloat16",
        arguments={"tensors": "far"},
    ),
    _case("far-x-fp32", "inputs.beyond-int32", {**TINY, "T": 4}, "full", arguments={"x": "far"}),
    _case("far-matrices", "inputs.beyond-int32", {**TINY, "E": 3, "K": 2}, "full", arguments={"tensors": "far"}),
)

# Fresh memory is poisoned in every case; here much of it is for nobody.
WRITTEN_CASES = (
    _case("written-rows-without-expert", "outputs.written", tier="smoke", dropped=12),
    _case("written-all-dropped-bf16", "outputs.written", {**NARROW, "T": 5}, dropped=20, dtype="bfloat16"),
    _case("written-idle-experts", "outputs.written", {**NARROW, "T": 3, "E": 40, "K": 2}),
    _case("written-idle-experts-bf16", "outputs.written", {**TINY, "T": 1, "E": 40, "K": 8, "D": 72}, dtype="bfloat16"),
    _case("written-one-token-fp16", "outputs.written", {**NARROW, "T": 1, "D": 33}, dtype="float16"),
    _case("written-ep3", "outputs.written", {**TINY, "T": 3}, owners=SCATTERED, rank=0, dropped=6),
    _case("written-ep3-idle-tokens", "outputs.written", {**TINY, "K": 2}, owners=SCATTERED, rank=0),
    # What is added up of one choice needs no buffer, but for its scale.
    _case("written-one-choice-scale", "outputs.written", {**TINY, "K": 1}, output_scale=2.5),
    _case("written-no-tokens", "outputs.written", {**TINY, "T": 0}),
    _case("written-no-tokens-bias-ep3", "outputs.written", {**TINY, "T": 0}, function="silu-bias", owners=SCATTERED),
    _case("written-wide-tail", "outputs.written", {**TINY, "T": 17, "D": 136, "F": 68}, function="silu-bias"),
)

# What is called before the same call again: another layer of the same shape, and calls of other sizes and dtypes.
_OTHER_LAYER: dict[str, Any] = {}
_OTHERS = (_OTHER_LAYER, {"T": 131}, {"dtype": "bfloat16"}, {"T": 1, "E": 3, "K": 2}, {"T": 0})

STATE_CASES = (
    _case("after-others", "calls.same-result", tier="smoke", between=_OTHERS),
    _case(
        "after-others-bf16", "calls.same-result", NARROW, dtype="bfloat16", between=(*_OTHERS[:2], {"dtype": "float32"})
    ),
    _case(
        "after-others-bias", "calls.same-result", {**NARROW, "T": 70}, "full", function="silu-bias", between=_OTHERS[:2]
    ),
    _case("after-others-one-token", "calls.same-result", {**TINY, "T": 1}, "full", between=_OTHERS[:2]),
    _case("after-others-ep3", "calls.same-result", owners=SCATTERED, rank=1, dropped=6, between=_OTHERS[:2]),
    _case("after-wider", "calls.same-result", tier="full", between=({"D": 40}, {"D": 12, "T": 70})),
    _case("again", "calls.same-bits", {**NARROW, "T": 131}, "full", between=(_OTHER_LAYER,)),
    _case("again-bf16", "calls.same-bits", NARROW, dtype="bfloat16", between=(_OTHER_LAYER,)),
    _case("again-hot", "calls.same-bits", {**NARROW, "T": 70, "K": 2}, hot=9, between=()),
)

INVARIANT_CASES = (
    _case("rows-alone", "rows.batch-invariant", {**TINY, "T": 35}, tier="smoke"),
    _case("rows-alone-bf16", "rows.batch-invariant", {**NARROW, "T": 18}, dtype="bfloat16"),
    _case(
        "rows-alone-wide", "rows.batch-invariant", {**TINY, "T": 18, "D": 72, "F": 136}, "full", function="silu-bias"
    ),
)

CASES = (
    *FUNCTION_CASES,
    *SUM_CASES,
    *NO_EXPERT_CASES,
    *OUTSIDE_CASES,
    *ARGUMENT_CASES,
    *ORIENTED_CASES,
    *CHUNK_CASES,
    *PADDING_CASES,
    *UNCHANGED_CASES,
    *OWN_MEMORY_CASES,
    *FAR_CASES,
    *WRITTEN_CASES,
    *STATE_CASES,
    *INVARIANT_CASES,
    *stored.CASES,
)
