"""Cases of `capture_session`: which rows arrive on which rank, and what is read of them."""

from __future__ import annotations

from collections.abc import Iterator

from moe_conformance.catalogue.case import Case

# Own rows ---------------------------------------------------------------------------------------------------------

# Tokens of each data-parallel rank. Every rank of every case is judged: rank 0 hides most faults.
COUNTS = {
    "dp1": (7,),
    "dp2-equal": (4, 4),
    "dp2-fewer-first": (3, 5),
    "dp2-fewer-last": (5, 3),
    "dp2-none-first": (0, 5),
    "dp2-none-last": (5, 0),
    "dp2-one-first": (1, 6),
    "dp2-none": (0, 0),
    "dp3-none-last": (4, 5, 0),  # [-0:] is every rank's rows, more than this one has room for
    "dp4-equal": (3, 3, 3, 3),
    "dp4-unequal": (2, 7, 1, 5),
    "dp4-some-none": (0, 6, 0, 3),
}

WHOLE = ("concatenated", "local")
# A tensor-parallel group splits its rows among its ranks only where data-parallel ranks exchange tokens, so these
# layouts are tried with two data-parallel ranks or more.
SPLIT = ("sequence_shard", "sequence_gathered")


def tp_ranks_judged(kind: str, count: int, tp: int) -> tuple[int, ...]:
    """The tensor-parallel ranks of one data-parallel rank on which the number of rows tells what to record.

    Engines exist that see the rows and the counts only and take the first layout whose size matches. With counts c, own
    count n = c[rank] and P tensor-parallel ranks, the sizes are sum(c), n, ceil(n / P) and the sum of P ceil(c / P).
    Where two of them are equal, the two readings select the same rows: sum(c) = n means that the others have none, and
    sum(c) = sum of P ceil(c / P) that no slice is padded. The exception is n = 1 and P > 1: a slice has 1 row, as many
    as this rank owns. On the first tensor-parallel rank it is the token itself, on the others it is padding.
    """
    return (0,) if kind == "sequence_shard" and count == 1 else tuple(range(tp))


def _own(kind: str, tp: int, names: tuple[str, ...]) -> Iterator[Case]:
    for name in names:
        yield Case(
            f"capture-{kind.replace('_', '-')}-tp{tp}-{name}",
            stage="capture_session",
            clause="capture.own-rows",
            recipe={"kind": kind, "counts": COUNTS[name], "tp": tp},
            tier="smoke" if name == "dp2-fewer-first" else "core",
        )


_ALL = tuple(COUNTS)
_DP2_UP = tuple(name for name in COUNTS if name != "dp1")
OWN_ROWS = (
    *(case for kind in WHOLE for case in _own(kind, 1, _ALL)),
    *(case for kind in WHOLE for case in _own(kind, 2, ("dp1", "dp2-one-first", "dp4-unequal"))),
    *(case for kind in SPLIT for case in _own(kind, 1, ("dp2-fewer-last",))),
    *(case for kind in SPLIT for case in _own(kind, 2, _DP2_UP)),
    *(case for kind in SPLIT for case in _own(kind, 3, ("dp2-fewer-first", "dp2-none-last", "dp4-unequal"))),
)

# The record itself, spelled out in the golden file: small enough to be checked by hand.
SPELLED_OUT = tuple(
    Case(
        f"capture-{kind.replace('_', '-')}-spelled-out",
        stage="capture_session",
        clause="capture.own-rows",
        recipe={"kind": kind, "counts": (1, 3), "tp": 2},
    )
    for kind in (*WHOLE, *SPLIT)
)

# Some engines mark padding rows with an id of -1.
MARKED_PADDING = tuple(
    Case(
        f"capture-{kind.replace('_', '-')}-padding-marked",
        stage="capture_session",
        clause="capture.own-rows",
        recipe={"kind": kind, "counts": (5, 3), "tp": 2, "padding": -1},
    )
    for kind in SPLIT
)

# One expert a token, and a rank with one token: shapes that squeeze() and broadcasting change.
ONE_EXPERT = tuple(
    Case(
        f"capture-{kind.replace('_', '-')}-one-expert-a-token",
        stage="capture_session",
        clause="capture.own-rows",
        recipe={"kind": kind, "counts": (1, 4), "tp": 2, "top_k": 1},
    )
    for kind in (*WHOLE, *SPLIT)
)

# The layout may differ from layer to layer: dispatch is chosen per layer. kinds: of layers 0, 1, 2.
CHANGING_LAYOUT = tuple(
    Case(
        f"capture-layout-changes-{name}",
        stage="capture_session",
        clause="capture.own-rows",
        recipe={"kinds": kinds, "counts": (3, 6, 2), "tp": 2},
    )
    for name, kinds in {
        "whole": ("local", "concatenated", "local"),
        "split": ("sequence_gathered", "sequence_shard", "local"),
    }.items()
)

# Every rank has more tokens in the second step, so that only where they start can go wrong. Or the middle rank has as
# many as before, and what it kept by its own count starts elsewhere.
CHANGING_COUNTS = tuple(
    Case(
        f"capture-{kind.replace('_', '-')}-{name}",
        stage="capture_session",
        clause="capture.own-rows",
        recipe={"kind": kind, "steps": steps, "tp": 2},
    )
    for name, steps in {
        "counts-change": ((2, 1, 3), (5, 4, 7)),
        "other-counts-change": ((2, 4, 3), (5, 4, 7)),
    }.items()
    for kind in (*WHOLE, *SPLIT)
)

# Rows behind the valid ones, as a batch has that is padded to the size of a CUDA graph. padding_id: their ids; None:
# legal ones that look like any other. No layout has room for them, but for an engine with "counted_padding": there
# each rank has so many behind its own.
_TAKES_PADDING = {"needs": ("padding_rows",)}
PADDING_ROWS = tuple(
    Case(
        f"capture-{kind.replace('_', '-')}-padding-rows-{name}",
        stage="capture_session",
        clause="capture.own-rows",
        recipe={
            "kind": kind,
            "counts": counts,
            "tp": 2,
            "padding_rows": rows,
            "padding_id": padding_id,
            **_TAKES_PADDING,
        },
        tier="smoke" if (kind, name) == ("local", "legal") else "core",
    )
    for kind in (*WHOLE, *SPLIT)
    for name, counts, rows, padding_id in (
        ("legal", (5, 3), 3, None),
        ("marked", (3, 5), 11, -1),
        ("garbage", (5, 3), 3, -(2**31)),
        ("out-of-range", (4, 4), 1, 2**31 - 1),
        ("none-first", (0, 5), 2, None),
        ("none-valid", (0, 0), 8, None),
        ("none-behind", (5, 3), 0, -1),
    )
)

# For a session that knows what a step captured: the padding of this step is not in it.
PADDING_UNREADABLE = tuple(
    Case(
        f"capture-{kind}-padding-rows-unreadable",
        stage="capture_session",
        clause="capture.own-rows",
        recipe={"kind": kind, "counts": (5,), "tp": 1, "padding_rows": 3, "padding_id": None, "needs": ("unwritten",)},
    )
    for kind in WHOLE
)

# Wrong row counts -------------------------------------------------------------------------------------------------

# Sizes that fit some layout on some rank, at two tensor-parallel ranks: 404 concatenated, 171 and 233 local, 86 and 117
# a slice, 406 gathered. With one data-parallel rank any excess may be a graph's padding, so none is called wrong here.
_COUNTS, _TP = (171, 233), 2
_FITTING = {
    "concatenated": (404, 404),
    "local": (171, 233),
    "sequence_shard": (86, 117),
    "sequence_gathered": (406, 406),
}
# On rank 0, on rank 1: the other rank's tokens, the other rank's slice, one off each layout, none, and one.
_WRONG = (
    (233, 117, 403, 405, 407, 170, 172, 85, 87, 0, 1),
    (171, 86, 403, 405, 407, 232, 234, 116, 118, 0, 1),
)

WRONG_COUNT = tuple(
    Case(
        f"capture-{kind.replace('_', '-')}-wrong-count-rank{rank}",
        stage="capture_session",
        clause="capture.refuse-count",
        recipe={
            "kind": kind,
            "counts": _COUNTS,
            "tp": _TP,
            "rank": rank,
            "fits": fitting[rank],
            "wrong": _WRONG[rank],
        },
    )
    for kind, fitting in _FITTING.items()
    for rank in (0, 1)
)

# A rank without tokens must refuse rows too. At two tensor-parallel ranks 134 rows are gathered.
NO_TOKENS_WRONG_COUNT = tuple(
    Case(
        f"capture-{kind.replace('_', '-')}-wrong-count-no-tokens",
        stage="capture_session",
        clause="capture.refuse-count",
        recipe={"kind": kind, "counts": (24, 0, 71, 38), "tp": tp, "rank": 1, "fits": fits, "wrong": wrong},
    )
    for kind, tp, fits, wrong in (
        ("concatenated", 1, 133, (24, 71, 132, 134)),
        ("local", 1, 0, (24, 71, 132, 134)),
        ("sequence_shard", 2, 0, (12, 36, 132, 135)),
        ("sequence_gathered", 2, 134, (12, 36, 132, 135)),
    )
)

# Padding does not make up for rows that are missing, nor do surplus rows count as padding that was not said.
WRONG_VALID_COUNT = tuple(
    Case(
        f"capture-{kind.replace('_', '-')}-wrong-valid-count",
        stage="capture_session",
        clause="capture.refuse-count",
        recipe={
            "kind": kind,
            "counts": _COUNTS,
            "tp": _TP,
            "rank": 1,
            "fits": fitting[1],
            "wrong": _WRONG[1],
            "padding_rows": 500,
        },
    )
    for kind, fitting in _FITTING.items()
)

# Whether the error says what came and what fits: two numbers each, of which no message has both by chance.
NAMED_COUNT = tuple(
    Case(
        f"capture-{kind.replace('_', '-')}-wrong-count-named",
        stage="capture_session",
        clause="capture.name-counts",
        recipe={"kind": kind, "counts": _COUNTS, "tp": _TP, "rank": 0, "fits": rows, "wrong": (233, 407)},
    )
    for kind, (rows, _) in _FITTING.items()
)

# What is readable -------------------------------------------------------------------------------------------------

# One rank, where all layouts are one, so that a wrong layout is not accused here a second time.
SMALLER_STEP = tuple(
    Case(
        f"capture-steps-{name}",
        stage="capture_session",
        clause="capture.only-real-rows",
        recipe={"steps": steps},
    )
    for name, steps in {"shrink": (9, 4, 1), "grow-again": (9, 4, 6), "through-none": (5, 0, 3), "same": (6, 6)}.items()
)

# "unwritten": the session knows what this step captured; -1 or an error stands for the rest.
# captured: the layers of the first step, then of the second, of three. read: rows asked for.
UNWRITTEN = tuple(
    Case(
        f"capture-unwritten-{name}",
        stage="capture_session",
        clause="capture.only-real-rows",
        recipe={"steps": steps, "read": read, "needs": ("unwritten",)},
    )
    for name, steps, read in (
        ("nothing-yet", (), 1),
        ("rows-beyond", ((9, (0, 1, 2)), (4, (0, 1, 2))), 9),
        ("rows-never-used", ((4, (0, 1, 2)),), 6),
        ("layer-never-captured", ((5, (0, 2)),), 5),
        ("layer-of-earlier-step", ((5, (0, 1, 2)), (3, (0, 2))), 3),
        ("layer-of-earlier-step-same-count", ((5, (0, 1, 2)), (5, (0, 2))), 5),
        ("step-without-tokens", ((5, (0, 1, 2)), (0, (0, 1, 2))), 5),
        # A model whose first layer is dense never captures layer 0.
        ("first-layer-dense-shrinks", ((5, (1, 2)), (3, (1,))), 3),
        ("first-layer-dense-grows", ((3, (1, 2)), (5, (1, 2))), 6),
    )
)

# The layers of each step that have routed experts; the others are dense, or a draft model's that did not run.
DENSE_BETWEEN = tuple(
    Case(
        f"capture-{name}",
        stage="capture_session",
        clause="capture.layers",
        recipe={"layers": layers, "steps": steps},
        tier="smoke" if name == "dense-between" else "core",
    )
    for name, layers, steps in (
        ("dense-between", 5, ((6, (0, 2, 4)), (4, (0, 2, 4)))),
        ("dense-every-second", 6, ((5, (1, 3, 5)), (5, (1, 3, 5)), (8, (1, 3, 5)))),
        ("dense-first", 4, ((3, (1, 2, 3)), (6, (1, 2, 3)), (2, (1, 2, 3)))),
        ("dense-first-and-last", 5, ((5, (2, 3)), (0, (2, 3)), (5, (2, 3)))),
        ("dense-last", 4, ((6, (0, 1)), (6, (0, 1)))),
        ("one-routed-layer", 7, ((4, (3,)), (4, (3,)), (1, (3,)))),
        ("draft-layers", 5, ((5, (1, 2)), (2, (1, 2, 4)), (7, (1, 2)), (7, (1, 2, 4)))),
    )
)

LAYER_BOUNDS = tuple(
    Case(
        f"capture-layer-{name}",
        stage="capture_session",
        clause="capture.bounds",
        recipe={"layers": 3, "layer_id": layer_id},
        tier="smoke" if name in ("minus-one", "one-past") else "core",
    )
    for name, layer_id in {"minus-one": -1, "minus-all": -3, "one-past": 3, "far-past": 300, "two-to-32": 2**32}.items()
)

# Ids that would pass for a legal one after narrowing to 8, 16 or 32 bits, and the first that is none. An engine whose
# storage is wide enough to keep an id as it came misleads nobody; only one that declares bounds must refuse it. In a
# byte, -1 is 255, which is the last of 256 experts.
EXPERT_BOUNDS = tuple(
    Case(
        f"capture-expert-{name}",
        stage="capture_session",
        clause="capture.bounds",
        recipe={"experts": experts, "expert_id": expert_id, "dtype": "int64", "needs": needs},
    )
    for name, experts, expert_id, needs in (
        ("minus-one", 250, -1, ("expert_bounds",)),
        ("minus-one-of-256", 256, -1, ()),
        ("minus-two-to-8", 250, 7 - 2**8, ("expert_bounds",)),
        ("one-past", 250, 250, ("expert_bounds",)),
        ("two-to-8", 250, 2**8 + 7, ()),
        ("two-to-16", 250, 2**16 + 7, ()),
        ("two-to-31", 250, 2**31, ("expert_bounds",)),
        ("two-to-32", 250, 2**32 + 7, ("expert_bounds",)),
    )
)

# Counts on both sides of what 7, 8, 15 and 16 bits hold.
NARROW = tuple(
    Case(
        f"capture-narrow-e{experts}",
        stage="capture_session",
        clause="capture.narrow",
        recipe={"experts": experts},
    )
    for experts in (128, 129, 255, 256, 257, 300, 512, 513, 896, 32768, 32769, 40000, 65536)
)

# Every id of the largest models, at their number of experts a token.
MANY_EXPERTS = tuple(
    Case(
        f"capture-narrow-e896-k{top_k}",
        stage="capture_session",
        clause="capture.narrow",
        recipe={"experts": 896, "top_k": top_k},
        tier="smoke" if top_k == 16 else "core",
    )
    for top_k in (16, 22)
)

IDS_AS_THEY_COME = tuple(
    Case(
        f"capture-ids-{dtype}-{layout}",
        stage="capture_session",
        clause="capture.only-real-rows",
        recipe={"dtype": dtype, "layout": layout},
    )
    for dtype in ("int32", "int64")
    for layout in ("contiguous", "transposed", "every-second-row", "every-second-column")
)

TWO_SESSIONS = (
    Case(
        "capture-two-sessions",
        stage="capture_session",
        clause="capture.only-real-rows",
        recipe={"layers": 3},
    ),
    # A draft model of one layer beside the model, as speculative decoding has it.
    Case(
        "capture-two-sessions-draft",
        stage="capture_session",
        clause="capture.only-real-rows",
        recipe={"layers": 1},
    ),
)

# A draft model beside the target, with a capturer of its own: one layer of number 0, and its own K. It captures behind
# the target's layers, once or in several passes of fewer rows; or its capturer is made after the target's first layer,
# or closed before the target is read.
DRAFT = tuple(
    Case(
        f"capture-draft-{name}",
        stage="capture_session",
        clause="capture.draft",
        recipe={"draft": name, "steps": steps},
    )
    for name, steps in (
        ("behind", (4, 9)),
        ("several-passes", (7, 3)),
        ("made-later", (5, 5)),
        ("closed-first", (9, 2)),
    )
)

# The logical expert of each of 15 physical ones, and of 288 of which 38 are copies: beyond what a byte holds.
_COPIES = ((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 3, 7, 3, 3), (3, 9, 0, 3, 7, 1, 10, 3, 3, 5, 7, 2, 8, 6, 4))
_MOVED = (4, 10, 1, 5, 5, 0, 9, 5, 2, 3, 8, 5, 7, 6, 9)
_MANY = tuple(slot * 7 % 250 for slot in range(288))
LOGICAL = tuple(
    Case(
        f"capture-logical-{name}",
        stage="capture_session",
        clause="capture.logical",
        recipe={"tables": tables, "experts": experts, "counts": counts},
        tier="smoke" if name == "layers-differ" else "core",
    )
    for name, experts, counts, tables in (
        ("one-table", 11, (6,), ((_COPIES[0],) * 3,)),
        ("layers-differ", 11, (6,), ((*_COPIES, _MOVED),)),
        ("moved-between-steps", 11, (6,), ((_COPIES[0],) * 3, (_COPIES[1], _MOVED, _COPIES[0]))),
        ("beyond-a-byte", 250, (9,), ((_MANY,) * 3,)),
        ("second-of-two-ranks", 11, (3, 5), ((*_COPIES, _MOVED),)),
    )
)

CASES = (
    *OWN_ROWS,
    *SPELLED_OUT,
    *MARKED_PADDING,
    *ONE_EXPERT,
    *CHANGING_LAYOUT,
    *CHANGING_COUNTS,
    *PADDING_ROWS,
    *PADDING_UNREADABLE,
    *WRONG_COUNT,
    *NO_TOKENS_WRONG_COUNT,
    *NAMED_COUNT,
    *WRONG_VALID_COUNT,
    *SMALLER_STEP,
    *UNWRITTEN,
    *DENSE_BETWEEN,
    *LAYER_BOUNDS,
    *EXPERT_BOUNDS,
    *NARROW,
    *MANY_EXPERTS,
    *IDS_AS_THEY_COME,
    *TWO_SESSIONS,
    *DRAFT,
    *LOGICAL,
)
