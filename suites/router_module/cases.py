"""Router module cases: which values a router must use once it is built."""

from __future__ import annotations

from moe_conformance.catalogue.case import Case

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


def _tier(method: str, tensor: str, change: str) -> str:
    """Compiling costs a quarter of a second: by default only for the router with the most tensors."""
    if change.startswith("compiled") and method != "gemma4":
        return "full"
    return "smoke" if change in SMOKE and tensor == "per_expert_scale" else "core"


CLOSURE_CASES = tuple(
    Case(
        f"closure-{method.replace('_', '-')}-{tensor.replace('_', '-')}-{change}",
        stage="router_module",
        clause="closure.current-values",
        recipe={"method": method, "tensor": tensor, "change": change},
        needs=frozenset({method}),
        tier=_tier(method, tensor, change),
    )
    for method, tensors in (
        ("gemma4", ("per_expert_scale", "proj", "scale")),
        ("softmax_topk_renorm", ("proj",)),
        ("softmax_topk", ("proj",)),
    )
    for tensor in tensors
    for change in CHANGES
)

CASES = CLOSURE_CASES
