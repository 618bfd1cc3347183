"""Cases of block-aligned dispatch: who picks whom, how large a block is, and which experts the rank has."""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case

# The global ids of a rank's experts, in the order of their local ids; 0 to 59 is everybody's and 59 the last.
MAPS = {
    "first-ranks": tuple(range(20)),
    "last-ranks": tuple(range(40, 60)),
    "reversed": tuple(range(59, -1, -1)),
    "scattered": tuple(range(58, 0, -3)),
    "idle": (),
}


def _align(name: str, clause: str = "align.whole-blocks", tier: str = "core", **recipe: Any) -> Case:
    """T tokens, E experts, K of them, all different in a row.

    hot: everybody's first. unpicked: nobody's. turns: pairs name the experts in turn, so that all counts are equal.
    dropped: of 20 ids, so many are -1. held: global ids of this rank's experts in local order; None is no map.
    layout: of ids in memory, with poison between them: "rows" are further apart than they are long, "both" steps are
    larger than one, "transposed". "map": of the map alone, every other one of whose values is poison.
    """
    recipe = {
        "T": 63,
        "E": 60,
        "K": 6,
        "block": 16,
        "dtype": "int32",
        "layout": "contiguous",
        "hot": None,
        "unpicked": (),
        "turns": False,
        "dropped": 0,
        "held": None,
        **recipe,
    }
    return Case(f"align-{name}", stage="align", clause=clause, recipe=recipe, tier=tier)


def _sizes(row: str) -> Case:
    """A row is: T, E, K, block, dtype."""
    *sizes, dtype = row.split()
    T, E, K, block = map(int, sizes)
    return _align(f"sizes-t{T}-e{E}-k{K}-block{block}-{dtype}", T=T, E=E, K=K, block=block, dtype=dtype)


# Each two values of any two columns meet in a row, but for a K beyond E. Some engines have another kernel from 1024
# pairs on; beyond 512 experts E K is more than a block of threads counts.
SIZES = tuple(
    _sizes(row)
    for row in (
        "  1   5  1 128 int32",
        "  1   5  5   8 int64",
        "  1  60 22  64 int64",
        "  1 257  5   8 int64",
        "  1 896  8   1 int64",
        "  7   5  1  64 int64",
        "  7  60  1   1 int64",
        "  7  60  5 128 int64",
        "  7 257  8  64 int64",
        "  7 257 22   1 int32",
        "  7 896  1  64 int64",
        "  7 896 22   8 int64",
        "131   5  5   1 int64",
        "131  60  8   8 int32",
        "131 257  1   8 int64",
        "131 257 22 128 int32",
        "131 896  5  64 int32",
        "131 896  8 128 int64",
    )
)

# Neither T K nor the pairs of an expert fill whole blocks, unless a case says so.
WHOLE_BLOCKS = (
    _align("e60-k6", tier="smoke"),
    *SIZES,
    _align("0-tokens", T=0),
    # 315 pairs fill no histogram block of any kernel, and without padding every slot too many shows.
    _align("block-1", K=5, block=1),
    _align("e1-k1", E=1, K=1),
    _align("e1-k1-1-token", E=1, K=1, T=1),
    _align("e896-k16-1024-tokens", E=896, K=16, T=1024, tier="full"),
    _align("all-on-one", E=5, K=1, T=131, hot=3),
    _align("all-on-last-of-257", E=257, K=1, T=131, hot=256, block=8),
    _align("all-on-last-of-896", E=896, K=1, T=131, hot=895, block=8),
    _align("everybodys-first", hot=59, T=131, tier="smoke"),
    _align("unpicked", unpicked=(0, 30, 59)),
    _align("unpicked-but-two", K=2, unpicked=(*range(7), *range(8, 44), *range(45, 60)), block=8),
    # 32 pairs an expert: two whole blocks, no padding.
    _align("no-padding", E=4, K=2, T=64, turns=True, tier="smoke"),
    _align("no-padding-one-block-each", E=60, K=6, T=80, turns=True, block=8),
    _align("one-pair-over", E=5, K=3, T=27, turns=True),
    _align("many-tokens", T=700, K=8, E=128, block=64, tier="full"),
    _align("many-tokens-block-1", T=700, K=8, E=128, block=1, dtype="int64", tier="full"),
)

NO_EXPERT = (
    _align("dropped", "align.no-expert", dropped=7, tier="smoke"),
    _align("dropped-int64", "align.no-expert", dropped=7, dtype="int64", E=5, K=2, T=131, block=64),
    _align("dropped-1-token", "align.no-expert", dropped=7, T=1, K=22),
    _align("dropped-e257-k22", "align.no-expert", dropped=8, E=257, K=22, T=131),
    _align("all-dropped", "align.no-expert", dropped=20),
    _align("all-dropped-e1", "align.no-expert", dropped=20, E=1, K=1, T=7),
    _align("map-first-ranks", "align.no-expert", held=MAPS["first-ranks"]),
    _align("map-last-ranks", "align.no-expert", held=MAPS["last-ranks"], tier="smoke"),
    _align("map-reversed", "align.no-expert", held=MAPS["reversed"], dtype="int64"),
    _align("map-scattered", "align.no-expert", held=MAPS["scattered"], T=131, block=64),
    _align("map-idle", "align.no-expert", held=MAPS["idle"]),
    _align("map-0-tokens", "align.no-expert", held=MAPS["scattered"], T=0),
    _align("map-dropped", "align.no-expert", held=MAPS["last-ranks"], dropped=7, tier="smoke"),
    _align("map-scattered-dropped", "align.no-expert", held=MAPS["scattered"], dropped=8, dtype="int64", K=22),
    _align("map-e896-k16", "align.no-expert", E=896, K=16, T=131, held=tuple(range(895, 4, -5))),
    _align("map-unpicked", "align.no-expert", held=MAPS["last-ranks"], unpicked=tuple(range(40, 60))),
    _align("map-no-padding", "align.no-expert", held=MAPS["scattered"], T=80, turns=True, block=8),
    _align("many-tokens-dropped", "align.no-expert", T=700, K=8, E=128, block=64, dropped=7, tier="full"),
    _align("many-tokens-map", "align.no-expert", T=700, K=8, E=128, held=tuple(range(127, 64, -2)), tier="full"),
)

# 60 is E, 63 the last id of 64 padded ones; -2 and -60 would wrap to experts 58 and 0, 2^32 + 3 cut to 32 bits is 3.
OUT_OF_RANGE = tuple(
    _align(f"out-of-range-{name}{suffix}", "align.no-expert", tier, T=7, outside=outside, dtype=dtype, held=held)
    for name, outside, dtype, tier in (
        ("e", 60, "int32", "smoke"),
        ("63", 63, "int64", "core"),
        ("minus-2", -2, "int32", "core"),
        ("minus-e", -60, "int64", "core"),
        ("int32-max", 2**31 - 1, "int32", "core"),
        ("int32-min", -(2**31), "int32", "core"),
        ("beyond-int32", 2**32 + 3, "int64", "full"),
    )
    for suffix, held in (("", None), ("-map", MAPS["reversed"]))
)

# between: what is asked between the two times; larger and of another shape in every respect.
EARLIER_CALLS = tuple(
    _align(f"earlier-calls-{name}", "align.ids-alone", between={"T": 131, "E": 257, "K": 22, "block": 64}, **recipe)
    for name, recipe in (
        ("e60-k6", {"tier": "smoke"}),
        ("1-token", {"T": 1}),
        ("e5-int64", {"E": 5, "K": 2, "T": 131, "dtype": "int64"}),
        ("dropped", {"dropped": 7}),
        ("map", {"held": MAPS["scattered"]}),
        ("rows-apart", {"layout": "rows"}),
        ("both-apart", {"layout": "both"}),
    )
)

PERMUTED = tuple(
    _align(f"permuted-{name}", "align.ids-alone", **recipe)
    for name, recipe in (
        ("e60-k6", {"tier": "smoke"}),
        ("e257-k22", {"E": 257, "K": 22, "T": 131, "dtype": "int64"}),
        ("hot", {"hot": 59, "T": 131, "block": 64}),
        ("map-dropped", {"held": MAPS["scattered"], "dropped": 7}),
    )
)

UNCHANGED = (
    _align("unchanged", "calls.inputs-unchanged"),
    _align("unchanged-map-dropped-int64", "calls.inputs-unchanged", held=MAPS["scattered"], dropped=7, dtype="int64"),
)
OWN_MEMORY = (_align("own-memory", "outputs.own-memory"), _align("own-memory-block-1", "outputs.own-memory", block=1))

WRITTEN = (
    _align("written-no-tokens", "outputs.written", T=0, E=5, K=2, tier="smoke"),
    _align("written-idle", "outputs.written", held=MAPS["idle"], T=7),
    _align("written-all-dropped", "outputs.written", dropped=20, T=7, E=5, K=2, block=64),
    _align("written-unpicked", "outputs.written", T=3, K=2, block=64, dtype="int64"),
)

ARGUMENTS = (
    _align("rows-apart", "inputs.strides", layout="rows", tier="smoke"),
    _align("both-apart", "inputs.strides", layout="both"),
    _align("both-apart-int64", "inputs.strides", layout="both", dtype="int64", T=131, E=257, K=8),
    _align("transposed", "inputs.strides", layout="transposed"),
    _align("dropped-both-apart", "inputs.strides", dropped=7, layout="both"),
    _align("map-apart", "inputs.strides", held=MAPS["scattered"], layout="map"),
    _align("map-reversed-dropped-both-apart", "inputs.strides", held=MAPS["reversed"], dropped=7, layout="both"),
)

SPELLED_OUT = (
    _align("spelled-out", T=7, E=5, K=2, block=4, unpicked=(2,)),
    _align("spelled-out-map", "align.no-expert", T=7, E=5, K=2, block=4, dropped=5, held=(4, 0, 3)),
)

CASES = (
    *WHOLE_BLOCKS,
    *NO_EXPERT,
    *OUT_OF_RANGE,
    *EARLIER_CALLS,
    *PERMUTED,
    *UNCHANGED,
    *OWN_MEMORY,
    *WRITTEN,
    *ARGUMENTS,
    *SPELLED_OUT,
)
