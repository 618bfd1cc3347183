"""Router module cases: what a router with parameters chooses, and which values it must use once it is built."""

from __future__ import annotations

from moe_conformance.catalogue.case import Case
from moe_conformance.model.specs import LogitsSpec, RoutingSpec
from moe_conformance.suites.route.methods import REAL_SIZES, method

# How new values reach a module that is already built.
CHANGES = (
    "functional-call",
    "replaced-parameter",
    "in-place-update",
    "data-swap",
    "data-copy",
    "load-state-dict",
    "load-state-dict-assign",
    "to-dtype",
    "to-dtype-overwrite",
    "deepcopy",
    "another-router",
    "from-meta",
    "compiled",
    "compiled-functional-call",
)
# The first shows the seed's fault on every engine of the class, in a second.
SMOKE = ("functional-call", "deepcopy")

GEMMA4 = LogitsSpec("gemma4", norm_eps=1e-6)
PLAIN = LogitsSpec()
IN_FLOAT32 = LogitsSpec(dtype="float32")

# Name -> (logits, method, experts, tensors that change).
ROUTERS: dict[str, tuple[LogitsSpec, RoutingSpec, int, tuple[str, ...]]] = {
    "gemma4": (GEMMA4, method("gemma4", 3), 7, ("per_expert_scale", "proj", "scale")),
    "softmax-topk-renorm": (PLAIN, method("renorm", 3), 7, ("proj",)),
    "softmax-topk": (PLAIN, method("plain", 3), 7, ("proj",)),
    "deepseek-v3": (IN_FLOAT32, method("deepseek-v3", 5), 16, ("selection_bias", "proj")),
    "gpt-oss": (LogitsSpec(bias=True), method("chosen-fp32", 3), 7, ("bias",)),
    "inkling": (PLAIN, method("inkling", 3), 7, ("global_scale",)),
}


def _tier_of_size(name: str, experts: int, dtype: str) -> str:
    """By default: none wide in bfloat16, DeepSeek-V4's at one size, no plain softmax, which is a part of others."""
    if name in ("plain", "deepseek-v4"):
        return "core" if (name, experts, dtype) == ("deepseek-v4", 256, "bfloat16") else "full"
    return "full" if experts > 384 and dtype == "bfloat16" else "core"


# Changes that a copy of the weights in another dtype, made once, does not see; for routers stored in two bytes.
KEPT_COPIES = ("in-place-update", "data-swap", "data-copy", "load-state-dict", "replaced-parameter")


def _tier(name: str, tensor: str, change: str) -> str:
    """Compiling costs a quarter of a second: by default only for the tensor that the class began with."""
    seed = name == "gemma4" and tensor == "per_expert_scale"
    if change.startswith("compiled") and not seed:
        return "full"
    return "smoke" if change in SMOKE and seed else "core"


CLOSURE_CASES = tuple(
    Case(
        f"closure-{name}-{tensor.replace('_', '-')}-{change}",
        stage="router_module",
        clause="router-module.current-values",
        recipe={
            "logits": logits,
            "routing": routing,
            "experts": experts,
            "hidden": 24,
            "tensor": f"router.{tensor}",
            "change": change,
        },
        tier=_tier(name, tensor, change),
    )
    for name, (logits, routing, experts, tensors) in ROUTERS.items()
    for tensor in tensors
    for change in CHANGES
) + tuple(
    Case(
        f"closure-deepseek-v3-bf16-proj-{change}",
        stage="router_module",
        clause="router-module.current-values",
        recipe={
            "logits": IN_FLOAT32,
            "routing": method("deepseek-v3", 5),
            "experts": 16,
            "hidden": 24,
            "tensor": "router.proj",
            "change": change,
            "dtype": "bfloat16",
        },
    )
    for change in KEPT_COPIES
)

# The router as a model has it, from hidden states, at the sizes of real models, stored in float32 and in bfloat16.
# DeepSeek-V3 and those after it compute logits in float32 whatever the weights are stored in.
ROUTER_CASES = tuple(
    Case(
        f"router-{name}-e{experts}-k{top_k}-{'bf16' if dtype == 'bfloat16' else 'fp32'}",
        stage="router_module",
        clause="routing.precision" if dtype == "bfloat16" else "routing.method",
        recipe={
            "logits": logits,
            "routing": method(name, top_k),
            "experts": experts,
            "hidden": 72,
            "tokens": 9,
            "dtype": dtype,
        },
        tier=_tier_of_size(name, experts, dtype),
    )
    for name, logits in (
        ("plain", PLAIN),
        ("gemma4", GEMMA4),
        ("renorm", PLAIN),
        ("biased", IN_FLOAT32),
        ("deepseek-v3", IN_FLOAT32),
        ("deepseek-v2", IN_FLOAT32),
        ("deepseek-v4", PLAIN),
        ("chosen", LogitsSpec(bias=True)),
    )
    for experts, top_k in REAL_SIZES
    for dtype in ("float32", "bfloat16")
)

# One token, as in decoding; an epsilon that shows.
ONE_TOKEN_CASES = tuple(
    Case(
        f"router-{name}-e128-k8-{kind}",
        stage="router_module",
        clause="routing.method" if dtype == "float32" else "routing.precision",
        recipe={
            "logits": logits,
            "routing": method(name, 8),
            "experts": 128,
            "hidden": 72,
            "tokens": tokens,
            "dtype": dtype,
        },
    )
    for name, logits, kind, tokens, dtype in (
        ("chosen", LogitsSpec(bias=True), "one-token-bf16", 1, "bfloat16"),
        ("deepseek-v3", IN_FLOAT32, "one-token-bf16", 1, "bfloat16"),
        ("gemma4", GEMMA4, "one-token-bf16", 1, "bfloat16"),
        ("deepseek-v3", IN_FLOAT32, "131-tokens-bf16", 131, "bfloat16"),
        ("renorm", PLAIN, "one-token-bf16", 1, "bfloat16"),
        ("biased", IN_FLOAT32, "one-token-fp16", 1, "float16"),
        ("gemma4", LogitsSpec("gemma4", norm_eps=0.0625), "epsilon", 9, "float32"),
    )
)

ARGUMENT_CASES = tuple(
    Case(
        f"router-{name}-x-{layout}-{short}",
        stage="router_module",
        clause="inputs.strides",
        recipe={
            "logits": logits,
            "routing": method(name, 8),
            "experts": 128,
            "hidden": 72,
            "tokens": 9,
            "dtype": dtype,
            "arguments": {"x": layout},
        },
    )
    for name, logits, layout, short, dtype in (
        ("renorm", PLAIN, "columns", "fp32", "float32"),
        ("gemma4", GEMMA4, "transposed", "fp32", "float32"),
        ("deepseek-v3", IN_FLOAT32, "sliced", "bf16", "bfloat16"),
        ("chosen", LogitsSpec(bias=True), "expanded", "bf16", "bfloat16"),
        ("plain", PLAIN, "offset", "fp32", "float32"),
    )
)

# As many experts as columns: the projection and its transpose have one shape.
ORIENTED_CASES = tuple(
    Case(
        f"router-{name}-square-{short}",
        stage="router_module",
        clause="matrices.orientation",
        recipe={
            "logits": logits,
            "routing": method(name, 6),
            "experts": 96,
            "hidden": 96,
            "tokens": 9,
            "dtype": dtype,
        },
    )
    for name, logits, short, dtype in (
        ("renorm", PLAIN, "fp32", "float32"),
        ("gemma4", GEMMA4, "fp32", "float32"),
        ("chosen", LogitsSpec(bias=True), "bf16", "bfloat16"),
    )
)

CASES = (*CLOSURE_CASES, *ROUTER_CASES, *ONE_TOKEN_CASES, *ARGUMENT_CASES, *ORIENTED_CASES)
