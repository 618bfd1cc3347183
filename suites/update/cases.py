"""Update cases: what a trainer pushes into a block that runs, in which parts and forms."""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case
from moe_conformance.suites.block.configs import VARIANTS

# A softmax router, one with groups, a bias and a shared expert, and experts with biases whose gate and up interleave.
SLUGS = tuple(slug for slug in ("qwen3-moe", "deepseek-v3", "gpt-oss") if slug in VARIANTS)


def _tier(slug: str, name: str) -> str:
    """By default every kind of push of one family, and of the others those that their layouts show in."""
    if slug == "qwen3-moe":
        return "smoke" if name in ("once", "experts-then-router") else "core"
    return "core" if name in ("again-and-again", "wide-push-bf16", "in-three-pieces", "down-alone") else "full"


def _case(slug: str, name: str, clause: str, **recipe: Any) -> Case:
    """pushes: "all" and parts of the tensors with values of their own each time; "first", all as they were at first."""
    recipe = {"pieces": 1, "replaces": False, "dtype": "float32", "pushed": None, "tokens": 3, **recipe}
    model_type = VARIANTS[slug].config["model_type"]
    recipe = {"family": slug, "model_type": model_type, **recipe}
    return Case(f"update-{slug}-{name}", "update", clause, recipe, _tier(slug, name))


CURRENT_CASES = tuple(
    _case(slug, name, "update.current-values", **recipe)
    for slug in SLUGS
    for name, recipe in (
        ("once", {"pushes": ("all",)}),
        ("again-and-again", {"pushes": ("all", "all", "all")}),
        ("and-back", {"pushes": ("all", "first")}),
        ("the-same", {"pushes": ("first", "first")}),
        ("replaced", {"pushes": ("all", "all"), "replaces": True}),
        ("narrow-push", {"pushes": ("all", "all"), "pushed": "bfloat16"}),
        ("wide-push-bf16", {"pushes": ("all", "all"), "dtype": "bfloat16", "pushed": "float32"}),
        ("131-tokens", {"pushes": ("all",), "tokens": 131}),
    )
)

PARTS_CASES = tuple(
    _case(slug, name, "update.parts", **recipe)
    for slug in SLUGS
    for name, recipe in (
        ("experts-then-router", {"pushes": ("experts", "router")}),
        ("router-then-experts", {"pushes": ("router", "experts")}),
        ("down-alone", {"pushes": ("down",)}),
        ("all-then-down", {"pushes": ("all", "down")}),
        ("in-three-pieces", {"pushes": ("all", "all"), "pieces": 3}),
        ("parts-replaced", {"pushes": ("experts", "router"), "replaces": True}),
    )
)

CASES = (*CURRENT_CASES, *PARTS_CASES)
