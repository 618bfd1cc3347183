"""Route cases: what a router must choose and weigh, at the sizes of real models and with logits that hide nothing."""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case
from moe_conformance.protocol.routing import FusedShared
from moe_conformance.suites.route.methods import AT_OWN_SIZES, AT_REAL_SIZES, METHODS, REAL_SIZES, at_real_sizes, method

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


# DeepSeek's own inference code divides by the plain sum; transformers' adds 1e-20, which shows for such logits alone.
PLAIN_SUM = "DeepSeek's own code adds nothing to the sum, and no trained router's scores sum to about 1e-20"


def _case(clause: str, row: str, lenient: str = "", **more: Any) -> Case:
    """A row is: method, E, K, T, dtype, logits, layout, tier."""
    name, experts, top_k, tokens, dtype, logits, layout, tier = row.split()
    suffix = "" if layout == "contiguous" else f"-{layout}"
    suffix += f"-{more['sequences']}-sequences" if "sequences" in more else ""
    return Case(
        f"route-{name}-e{experts}-k{top_k}-t{tokens}-{dtype}-{logits}{suffix}",
        stage="route",
        clause=clause,
        recipe={
            "routing": method(name, int(top_k)),
            "experts": int(experts),
            "tokens": int(tokens),
            "dtype": _DTYPES[dtype],
            "logits": logits,
            "layout": layout,
            **more,
        },
        tier=tier,
        lenient=lenient,
    )


MANY = "of published models only Switch-C has more than 896 experts"

# Mixtral (8, 2), Qwen1.5-MoE (60, 4); 7, 5 and 1, 1 and K = E are the awkward ones.
SOFTMAX_CASES = tuple(
    _case("routing.method", row)
    for row in (
        "gemma4  128  8  7 bf16 distinct contiguous smoke",
        "gemma4  128  8 63 fp32 normal   contiguous core",
        "gemma4  128  8 63 bf16 normal   transposed core",
        "gemma4  128  8  1 fp16 distinct sliced     core",
        "gemma4  128  8  0 bf16 distinct contiguous core",
        "gemma4   60  4 63 fp32 distinct transposed core",
        "gemma4    7  5  7 fp32 wide     contiguous core",
        "gemma4    7  7  7 fp16 distinct contiguous core",
        "gemma4    1  1  7 fp32 distinct contiguous core",
        "gemma4  256  8 63 fp32 negative contiguous core",
        "gemma4    8  2  7 bf16 equal    contiguous core",
        "gemma4  512 22 63 bf16 normal   sliced     full",
        "plain   128  8 63 fp32 distinct contiguous smoke",
        "plain    60  4  7 bf16 distinct sliced     core",
        "plain     7  5 63 fp16 normal   contiguous core",
        "plain     8  2  1 fp32 distinct contiguous core",
        "plain   256  8  7 fp32 wide     transposed core",
        "plain     7  7  7 bf16 distinct contiguous core",
        "plain    60  4  0 fp32 distinct contiguous core",
        "plain    60  4  7 fp32 equal    contiguous core",
        "renorm  128  8  7 fp32 distinct contiguous smoke",
        "renorm   60  4 63 bf16 distinct contiguous core",
        "renorm    7  5  7 fp32 negative sliced     core",
        "renorm    8  2 63 fp16 normal   transposed core",
        "renorm  256  8 63 bf16 distinct contiguous core",
        "renorm  512 22 63 fp32 wide     contiguous full",
        # Rows that hold NaN or infinity stand between these rows, which must not notice.
        "gemma4   60  4 23 fp32 beside   contiguous core",
        "plain    60  4 23 bf16 beside   contiguous core",
        "renorm    7  5 23 fp32 beside   transposed core",
    )
)


def _smoke(name: str, experts: int) -> str:
    return "smoke" if name in ("deepseek-v3", "chosen") and experts == 256 else "core"


# Real logits, biases and scales have all their bits, so that narrowing one on the way shows ("fine").
REAL_CASES = (
    *(
        _case("routing.method", f"{name} {E} {K} 9 fp32 fine contiguous {_smoke(name, E)}")
        for name in AT_REAL_SIZES
        for E, K in REAL_SIZES
    ),
    *(
        _case("routing.method", f"{name} {E} {K} 9 fp32 fine contiguous core")
        for name, (E, K) in AT_OWN_SIZES.items()
        if name != "doge"
    ),
    # Doge's router mixes the tokens of a batch, which nobody else has to; one token has only itself.
    _case("routing.method", "doge 64 8 1 fp32 fine contiguous core"),
    *(
        _case("routing.method", f"{name} {E} {K} {1 if name == 'doge' else 9} fp32 fine contiguous full")
        for name, own in AT_OWN_SIZES.items()
        for E, K in at_real_sizes(name)
        if own != (E, K)
    ),
    # DeepSeek-V4's own sizes, which engines have kernels for.
    *(_case("routing.method", f"deepseek-v4 {E} 6 {T} fp32 fine contiguous core") for E in (256, 384) for T in (1, 9)),
    # Kernels branch by the number of tokens: one, and more than any tile has.
    *(
        _case("routing.method", f"{name} {E} {K} {T} fp32 fine contiguous core")
        for name, E, K in (*((name, 128, 8) for name in AT_REAL_SIZES), ("deepseek-v2", 160, 6), ("longcat", 512, 12))
        for T in (1, 131)
    ),
    # One expert a token, renormalised all the same.
    _case("routing.method", "renorm 8 1 9 fp32 fine contiguous core"),
    _case("routing.method", "biased 128 1 9 fp32 fine contiguous core"),
    # Scores of DeepSeek-V4 are roots of softplus, which overflows or vanishes where it is computed as log(1 + exp).
    _case("routing.method", "deepseek-v4 256 8 9 fp32 wide contiguous core"),
    _case("routing.method", "switch 8 1 24 fp32 fine contiguous core", sequences=3),
    # Sums of scores so small that what is added to them, or is a floor under them, shows.
    *(
        _case("routing.method", f"{name} {E} {K} 9 fp32 tiny contiguous core", lenient)
        for name, E, K, lenient in (
            ("biased", 384, 8, PLAIN_SUM),
            ("deepseek-v3", 256, 8, PLAIN_SUM),
            ("lfm2", 64, 4, ""),
            ("muse-spark", 128, 8, ""),
        )
    ),
)

# Rows whose logits all have one sign: a search that begins at zero finds nothing in them, or everything.
SIGN_CASES = (
    *(_case("routing.method", f"{name} 128 8 6 fp32 one-sign contiguous core") for name in AT_REAL_SIZES),
    *(
        _case("routing.method", f"{name} {E} {K} {1 if name == 'doge' else 6} fp32 one-sign contiguous core")
        for name, (E, K) in AT_OWN_SIZES.items()
    ),
)

METHOD_CASES = SOFTMAX_CASES + REAL_CASES + SIGN_CASES

# Logits stored in a narrow dtype, scores in float32 or not as the model says, at the sizes of models, in the branch of
# one token and in that of many.
PRECISION_CASES = (
    *(
        _case("routing.precision", f"{name} 128 8 131 bf16 fine contiguous core")
        for name in ("plain", "renorm", "biased", "deepseek-v3", "deepseek-v2", "chosen", "deepseek-v4")
    ),
    *(
        _case("routing.precision", f"{name} {E} {K} 9 bf16 fine contiguous core")
        for name, (E, K) in AT_OWN_SIZES.items()
        if name not in ("doge", "deepseek-v4-hash")
    ),
    *(
        _case("routing.precision", f"{name} {E} {K} 9 bf16 normal sliced {'full' if E > 384 else 'core'}")
        for name in ("biased", "deepseek-v3", "deepseek-v2", "chosen", "deepseek-v4")
        for E, K in REAL_SIZES
    ),
    # Neighbours of the logits' dtype, whose scores are one number in that dtype: selection needs float32.
    *(
        _case("routing.precision", row)
        for row in (
            "plain       128  8   9 bf16 close contiguous smoke",
            "plain       128  8   1 bf16 close contiguous core",
            "renorm      256  8   1 bf16 close contiguous core",
            "renorm      128  8 131 fp16 close contiguous core",
            "gemma4      128  8   1 bf16 close contiguous core",
            "biased      128  8   1 bf16 close contiguous core",
            "deepseek-v3 256  8   1 bf16 close contiguous core",
            "deepseek-v3 256  8   9 fp16 close contiguous core",
            "deepseek-v2 160  6   1 bf16 close contiguous core",
            "deepseek-v2 160  6   9 bf16 close contiguous core",
            "llama4       16  1   1 bf16 close contiguous core",
            "laguna      256  8   1 bf16 close contiguous core",
            # Float32 logits that two bytes cannot hold apart.
            "plain       128  8   1 fp32 close contiguous core",
            "renorm      128  8  65 fp32 close contiguous core",
            "deepseek-v2 160  6   9 fp32 close contiguous core",
            "renorm      512 22   9 bf16 close contiguous full",
        )
    ),
)

# Spaced at least 1/16 apart and exact after the shift, so that the answer is the same and not only near.
SHIFT_CASES = tuple(case for case in SOFTMAX_CASES if case["logits"] == "distinct" and case["tokens"])

# E and K for what is tried of every method: E a multiple of the groups, of which the kept ones hold at least K.
_AWKWARD = {name: (40, 5) for name in METHODS} | {
    "doge": (36, 5), "llama4": (40, 1), "zaya": (40, 1), "switch": (40, 1), "phimoe": (40, 2),
    "switch-share": (8, 1), "nllb": (8, 2)
}  # fmt: skip


def _awkward(name: str, logits: str) -> str:
    """The row of a case. By default without another capacity, and without a table, which looks at no logit."""
    tier = "full" if name in ("switch-share", "deepseek-v4-hash") else "core"
    return "{} {} {} 23 fp32 {} contiguous {}".format(name, *_AWKWARD[name], logits, tier)


UNIQUE_CASES = (
    *(
        _case("route.unique-ids", row)
        for row in (
            "gemma4  128  8 23 fp32 not-numbers contiguous smoke",
            "gemma4   60  4 23 bf16 not-numbers transposed core",
            "gemma4    7  5 23 fp16 not-numbers contiguous core",
            "plain   128  8 23 bf16 not-numbers contiguous core",
            "plain    60  4 23 fp32 not-numbers sliced     core",
            "renorm  256  8 23 fp32 not-numbers contiguous core",
            "renorm    7  7 23 fp32 not-numbers contiguous core",
            "gemma4  128  8 63 bf16 tied        contiguous core",
            "plain    60  4 63 fp32 tied        transposed core",
            "renorm    7  5 63 fp16 tied        contiguous core",
        )
    ),
    *(_case("route.unique-ids", _awkward(name, "not-numbers")) for name in METHODS if name != "plain"),
    _case("route.unique-ids", "deepseek-v3 64 6 23 bf16 not-numbers contiguous core"),
    _case("route.unique-ids", "deepseek-v3 64 6 23 fp32 tied-groups contiguous core"),
)

# Ties at the last place, inside groups and between them: any of those tied, and none that is smaller. Where an expert
# takes so many tokens, ties also leave open which experts compete for a token and which tokens come first.
TIE_CASES = (
    *(_case("routing.method", _awkward(name, logits)) for name in METHODS for logits in ("tied", "last-place")),
    *(
        _case("routing.method", f"{name} 72 6 23 {dtype} {logits} contiguous core")
        for name in ("deepseek-v3", "deepseek-v2", "softmax-groups")
        for dtype, logits in (("fp32", "tied-groups"), ("bf16", "tied"))
    ),
    # More experts than the kept groups have: theirs, and any others.
    *(
        _case("routing.method", f"{name} 16 10 23 {dtype} distinct contiguous {tier}")
        for name in ("deepseek-v3", "deepseek-v2", "softmax-groups")
        for dtype, tier in (("fp32", "core"), ("bf16", "full"))
    ),
)

NONE_CASES = tuple(
    _case("routing.method", "{} {} {} 0 fp32 distinct contiguous core".format(name, *_AWKWARD[name]))
    for name in METHODS
    if name not in ("plain", "gemma4")
)

# Behind the tokens stand rows of other sizes, NaN and infinities, as a batch padded for a CUDA graph has.
PADDING_CASES = tuple(
    Case(
        f"route-{name}-padding-rows",
        stage="route",
        clause="route.padding-rows",
        recipe={
            "routing": method(name, _AWKWARD[name][1]),
            "experts": _AWKWARD[name][0],
            "tokens": 11,
            "dtype": "float32",
            "logits": "fine",
            "layout": "contiguous",
            "padding_rows": 21,
        },
        tier="smoke" if name == "renorm" else "core",
    )
    for name in METHODS
)

# Shared experts as further slots: with a weight of their own, as a share of the row's, as the router says.
FUSED_CASES = tuple(
    Case(
        f"route-{name}-fused-shared-{kind}",
        stage="route",
        clause="route.fused-shared",
        recipe={
            "routing": method(name, top_k),
            "experts": experts,
            "tokens": 9,
            "dtype": "float32",
            "logits": "fine",
            "layout": "contiguous",
            "fused_shared": fused,
        },
        tier="smoke" if kind == "one" and name == "deepseek-v3" else "core",
    )
    for name, experts, top_k, kind, fused in (
        ("deepseek-v3", 256, 8, "one", FusedShared(1)),
        ("deepseek-v3", 256, 8, "over-scale", FusedShared(1, "constant", 1 / 2.5)),
        ("deepseek-v3", 256, 8, "share", FusedShared(2, "share", 1 / 2.5)),
        ("deepseek-v2", 160, 6, "share", FusedShared(2, "share", 0.0625)),
        ("renorm", 128, 8, "one", FusedShared(1)),
        ("inkling", 256, 6, "router", FusedShared(2, "router")),
        ("longcat", 512, 12, "one", FusedShared(1)),
    )
)

# Layouts that the cases of the methods have not: those have columns of wider rows with steps, and a transpose.
ARGUMENT_CASES = tuple(
    _case("inputs.strides", row)
    for row in (
        "renorm      128  8  9 fp32 fine columns  smoke",
        "renorm      128  8  1 bf16 fine sliced   core",
        "deepseek-v3 256  8  9 fp32 fine columns  core",
        "deepseek-v3 256  8  9 bf16 fine transposed core",
        "deepseek-v2 160  6  9 fp32 fine offset   core",
        "chosen      128  8  9 bf16 fine columns  core",
        "biased      384  8  9 fp32 fine expanded core",
        "gemma4      128  8 131 bf16 fine columns core",
    )
)

UNCHANGED_CASES = tuple(
    _case("calls.inputs-unchanged", row)
    for row in (
        "renorm       40  5  7 fp32 fine contiguous core",
        "deepseek-v3  40  5  7 fp32 fine contiguous core",
        "gemma4       40  5  7 bf16 fine contiguous core",
        "biased       40  5  1 fp32 fine contiguous core",
    )
)
OWN_MEMORY_CASES = tuple(
    _case("outputs.own-memory", row)
    for row in (
        "renorm       44  4  7 fp32 fine contiguous core",
        "plain         7  7  7 fp32 fine contiguous core",
        "deepseek-v3  48  4  1 bf16 fine contiguous core",
    )
)

FAR_CASES = tuple(
    _case("inputs.beyond-int32", row)
    for row in (
        "renorm      128  8  3 bf16 fine far core",
        "deepseek-v3 256  8  3 fp32 fine far core",
        "gemma4       60  4  5 fp32 fine far full",
    )
)

CHUNK_CASES = tuple(
    _case("batches.any-size", f"{name} {E} {K} {T} {dtype} fine contiguous {'full' if T > 257 else 'core'}")
    for name, E, K, dtype, tokens in (
        ("renorm", 60, 4, "fp32", (63, 64, 65, 127, 128, 129, 257, 4097)),
        ("deepseek-v3", 96, 6, "bf16", (65, 129, 257, 1025)),
        ("gemma4", 60, 10, "fp32", (130, 257)),
    )
    for T in tokens
)

WRITTEN_CASES = (
    *(
        _case("outputs.written", row)
        for row in (
            "renorm        7  7   1 fp32 fine   contiguous smoke",
            "plain         1  1   3 bf16 fine   contiguous core",
            "renorm      100  3   5 fp16 fine   contiguous core",
            "deepseek-v3  72 22   5 bf16 fine   contiguous core",
            "gemma4      128 22   1 bf16 fine   contiguous core",
            "biased      896 22   3 fp32 fine   contiguous core",
            "llama4       17  1   5 fp32 fine   contiguous core",
            # Switch-C: more experts than a block has threads, and scores than it has memory for.
            "switch     2048  1   5 fp32 fine   contiguous full",
            "renorm      128  8   0 bf16 normal contiguous core",
            # More rows than one block has.
            "renorm      128  8  17 fp32 fine   contiguous core",
            "deepseek-v3  72  6  65 fp32 fine   contiguous core",
            "gemma4       60  4 131 bf16 fine   contiguous core",
        )
    ),
    *(
        _case("outputs.written", f"{name} 1280 {K} 5 fp32 fine contiguous core", MANY)
        for name, K in (("renorm", 8), ("deepseek-v3", 6))
    ),
)

# Between two calls: another router of the same shape, and others.
STATE_CASES = tuple(
    _case("calls.same-result", row, between=({}, {"tokens": 131}, {"dtype": "bfloat16"}, {"tokens": 0}))
    for row in (
        "renorm       96  6  9 fp32 fine contiguous core",
        "deepseek-v3  96  6  9 fp32 fine contiguous core",
        "gemma4       96  6  9 bf16 fine contiguous core",
        "chosen       96  6  1 fp32 fine contiguous core",
    )
)

INVARIANT_CASES = tuple(
    _case("rows.batch-invariant", row)
    for row in (
        "renorm      100  6 35 fp32 fine contiguous smoke",
        "deepseek-v3 160  6 18 bf16 fine contiguous core",
        "gemma4      100 22 18 fp32 fine contiguous core",
    )
)

CASES = (
    *METHOD_CASES,
    *PRECISION_CASES,
    *TIE_CASES,
    *NONE_CASES,
    *UNIQUE_CASES,
    *PADDING_CASES,
    *FUSED_CASES,
    *ARGUMENT_CASES,
    *UNCHANGED_CASES,
    *OWN_MEMORY_CASES,
    *FAR_CASES,
    *CHUNK_CASES,
    *WRITTEN_CASES,
    *STATE_CASES,
    *INVARIANT_CASES,
)
