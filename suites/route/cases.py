"""What a router must choose and weigh, at the sizes of real models and with logits that default values hide."""

from __future__ import annotations

from moe_conformance.catalogue.case import Case

_METHODS = {"gemma4": "gemma4", "renorm": "softmax_topk_renorm", "plain": "softmax_topk"}
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def _case(clause: str, row: str) -> Case:
    """A row is: method, E, K, T, dtype, logits, layout, tier."""
    method, experts, top_k, tokens, dtype, logits, layout, tier = row.split()
    suffix = "" if layout == "contiguous" else f"-{layout}"
    return Case(
        f"route-{method}-e{experts}-k{top_k}-t{tokens}-{dtype}-{logits}{suffix}",
        stage="route",
        clause=clause,
        recipe={
            "method": _METHODS[method],
            "experts": int(experts),
            "top_k": int(top_k),
            "tokens": int(tokens),
            "dtype": _DTYPES[dtype],
            "logits": logits,
            "layout": layout,
        },
        needs=frozenset({_METHODS[method]}),
        tier=tier,
    )


# E and K: Gemma 4 and Qwen3 (128, 8), Qwen1.5-MoE (60, 4), DeepSeek-like (256, 8), Mixtral (8, 2),
# Nemotron-3-Super (512, 22); 7, 5 and 1, 1 and K = E are the awkward ones.
METHOD_CASES = tuple(
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

# Spaced at least 1/16 apart and exact after the shift, so that the answer is the same and not only near.
SHIFT_CASES = tuple(case for case in METHOD_CASES if case["logits"] == "distinct" and case["tokens"])

UNIQUE_CASES = tuple(
    _case("routing.unique-ids", row)
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
)

CASES = METHOD_CASES + UNIQUE_CASES
