"""Block cases: what each router chooses and weighs, what experts compute, and how all of it is combined."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from moe_conformance.catalogue.case import Case
from moe_conformance.model.families.configs import UNPUBLISHED
from moe_conformance.model.specs import LayerSpec
from moe_conformance.suites.block.configs import FAMILIES, VARIANTS, spec_of
from moe_conformance.suites.route.cases import PLAIN_SUM

# One of each way to lay gate and up, and in and out, in one tensor.
PACKED = tuple(slug for slug in FAMILIES if f"{slug}-square" in VARIANTS)
# One of each way to route, to compute an expert and to combine, for what is tried on some families only; and the few
# that were merged first, or whose routing or experts are like no others'.
SOME = tuple(slug for slug, family in FAMILIES.items() if family.record.sample)
SMOKE = tuple(slug for slug, family in FAMILIES.items() if family.record.sample == "smoke")


def _case(slug: str, kind: str, clause: str, tier: str, **recipe: Any) -> Case:
    """shape: sequences and tokens of each. x: which values; times: that much larger. sum: about what the scores of the
    experts are, 0 for any. routing: "" for the router's own, or how the given one is made. native_ids: it goes to the
    engine as it is."""
    found: dict[str, Any] = {"family": slug, "model_type": VARIANTS[slug].record.model_type}
    found |= {"shape": (2, 11), "x": "x", "sum": 0.0, "dtype": "float32"}
    found |= {"routing": "", "native_ids": False, "implementation": None}
    lenient = VARIANTS[slug].lenient
    if recipe.get("sum"):
        lenient = lenient or (PLAIN_SUM if spec_of(slug).routing.epsilon <= 1e-20 else "")
    return Case(
        f"family-{slug}-{kind}",
        stage="block",
        clause=clause,
        recipe=found | recipe,
        tier=tier,
        lenient=lenient,
    )


# One family for each setting of a switch that published configs have: of several one that stands for others.
SWITCHED = {
    name: f"{slug}-{name}"
    for slug in sorted(FAMILIES, key=lambda slug: slug in SOME)
    for name, variant in FAMILIES[slug].record.variants.items()
    if name not in ("square", "narrow") and not variant.lenient and variant.keys.keys() - UNPUBLISHED
}


def _switches_routing(slug: str) -> bool:
    """Whether a setting is one of the router, or of what changes nothing; else it is one of the rest of the layer."""
    name = next(name for name, switched in SWITCHED.items() if switched == slug)
    spec, plain = spec_of(slug), spec_of(slug.removesuffix(f"-{name}"))
    return spec == plain or (spec.routing, spec.logits) != (plain.routing, plain.logits)


SWITCHED_ROUTERS = tuple(slug for slug in SWITCHED.values() if _switches_routing(slug))
SWITCHED_LAYERS = tuple(slug for slug in SWITCHED.values() if slug not in SWITCHED_ROUTERS)


def _tier(slug: str, core: Iterable[str] = FAMILIES) -> str:
    """Every family once in core, and every switch at both positions; what else there is in the full sweep."""
    return "smoke" if slug in SMOKE else "core" if slug in core else "full"


def _core_or_full(slug: str) -> str:
    return "core" if slug in SOME else "full"


# A router that mixes the tokens of a batch, which no other has to, is judged on one token. Its experts are one with it.
ROUTED = tuple(slug for slug in VARIANTS if VARIANTS[slug].block.given)
GIVEN = tuple(slug for slug in FAMILIES if FAMILIES[slug].block.given)
NARROW = tuple(f"{slug}-narrow" for slug in PACKED)
CORE = (*FAMILIES, *NARROW, *SWITCHED_LAYERS)
GROUPED = tuple(slug for slug in FAMILIES if FAMILIES[slug].block.grouped)


def _tiny_sum(spec: LayerSpec) -> float:
    """A sum of scores at which it shows what a router adds to it; 0 where there is none.

    There is none where the router adds nothing, of a softmax, whose scores cannot all be small, and where experts
    outside the best groups count as 0, with which the others would tie.
    """
    routing = spec.routing
    if not routing.epsilon or routing.score == "softmax" or routing.group_mask == 0:
        return 0.0
    # The square of these scores must not underflow.
    return routing.epsilon * (100 if routing.score == "sqrt_softplus" else 1)


TINY_SUMS = {slug: tiny for slug in FAMILIES if (tiny := _tiny_sum(spec_of(slug)))}
# The only tokens of what is judged on one: each is alone in its batch.
ALONE = tuple(
    (slug, f"token-{number}") for slug, family in VARIANTS.items() if not family.block.given for number in range(3)
)

ROUTE_CASES = (
    *(_case(slug, "route", "block.routing", _tier(slug, (*FAMILIES, *SWITCHED_ROUTERS))) for slug in ROUTED),
    *(_case(slug, f"route-{token}", "block.routing", "core", shape=(1, 1), x=token) for slug, token in ALONE),
    *(_case(slug, "route-tiny-sum", "block.routing", _tier(slug, SOME), sum=s) for slug, s in TINY_SUMS.items()),
)

# With the engine's own logits, which are rounded to bfloat16. Which router computes them in float32 is said by each
# model's own code.
WIDE_LOGITS = tuple(slug for slug in GIVEN if spec_of(slug).logits.dtype == "float32")
NARROW_ROUTE_CASES = tuple(
    _case(slug, "bf16-route", "block.routing", "core" if slug in (*SOME, *WIDE_LOGITS) else "full", dtype="bfloat16")
    for slug in GIVEN
)

BLOCK_CASES = (
    *(_case(slug, "block", "block.combine", _tier(slug, CORE)) for slug in ROUTED),
    *(_case(slug, f"block-{token}", "block.combine", "core", shape=(1, 1), x=token) for slug, token in ALONE),
    *(_case(slug, "one-token", "block.combine", "core", shape=(1, 1)) for slug in SOME),
    *(_case(slug, "no-tokens", "block.combine", "core" if slug in SOME else "full", shape=(1, 0)) for slug in FAMILIES),
    *(_case(slug, "bf16", "block.combine", "full", dtype="bfloat16", routing="spread") for slug in GIVEN),
    *(_case(slug, "bf16-routed", "block.combine", _core_or_full(slug), dtype="bfloat16") for slug in GIVEN),
    *(_case(slug, "fp16", "block.combine", "full", dtype="float16", routing="spread") for slug in SOME),
)


def _computed(slug: str, kind: str, clause: str, name: str, **recipe: Any) -> Case:
    """With the experts computed in a way of the engine's own choice of several."""
    kind = "-".join(filter(None, (kind, name.replace("_", "-"))))
    return _case(slug, kind, clause, "full", implementation=name, **recipe)


IMPLEMENTATIONS = ("batched_mm", "grouped_mm")
SOME_GROUPED = tuple(slug for slug in SOME if slug in GROUPED)

# Limits that every published config has, and that pre-activations of a spread of about 1.5 do not reach.
FAR_LIMITS = tuple(slug for slug in GIVEN if 4.0 <= spec_of(slug).experts.limit < math.inf)

EXPERTS_CASES = (
    *(_case(slug, "beyond-limit", "block.activation", "core", routing="spread", times=8.0) for slug in FAR_LIMITS),
    *(_case(slug, "experts", "block.activation", _tier(slug, SOME), routing="spread") for slug in GIVEN),
    *(_case(slug, "one-expert", "block.activation", "full", routing="same") for slug in GIVEN),
    *(_computed(slug, "", "block.activation", n, routing="spread") for slug in GROUPED for n in IMPLEMENTATIONS),
    *(
        _computed(slug, "bf16", "block.activation", n, dtype="bfloat16", routing="spread")
        for slug in SOME_GROUPED
        for n in IMPLEMENTATIONS
    ),
)

DROPPED_CASES = (
    *(_case(slug, "dropped", "block.dropped", "full", routing="dropped") for slug in GROUPED),
    *(
        _computed(slug, "dropped", "block.dropped", n, routing="dropped")
        for slug in SOME_GROUPED
        for n in IMPLEMENTATIONS
    ),
)

# One of each layout, in each of the ways that an engine may have.
NO_EXPERT_CASES = tuple(
    case
    for slug in ("deepseek-v3", "gpt-oss", "mixtral")
    if slug in FAMILIES
    for kind, routing in (("no-expert", "minus-one"), ("id-beyond", "beyond"))
    for recipe in ({"routing": routing, "native_ids": True},)
    for case in (
        _case(slug, kind, "block.no-expert", "full", **recipe),
        *(_computed(slug, kind, "block.no-expert", n, **recipe) for n in IMPLEMENTATIONS),
    )
)

# Families with something that is always on.
ALWAYS_ON = tuple(slug for slug in GIVEN if (spec := spec_of(slug)).shared or spec.dense or spec.output_bias)
SHARED_CASES = tuple(_case(slug, "shared", "block.shared", _tier(slug, SOME), routing="zero") for slug in ALWAYS_ON)


def _each(kind: str, clause: str, recipes: Mapping[str, Mapping[str, Any]]) -> Iterable[Case]:
    """Every recipe on the families of smoke; by default one on each, whichever other families there are."""
    for slug in SMOKE:
        for number, (name, recipe) in enumerate(recipes.items()):
            tier = "core" if number == len(slug) % len(recipes) else "full"
            yield _case(slug, f"{kind}-{name}", clause, tier, **recipe)


# Sequences behind tokens, columns of wider rows: x as other parts of a model hand it on.
ARGUMENT_CASES = tuple(
    _each("x", "inputs.strides", {layout: {"arguments": {"x": layout}} for layout in ("swapped", "columns")})
)

WRITTEN_CASES = tuple(
    _each(
        "written",
        "outputs.written",
        {name: {"shape": (1, tokens)} for name, tokens in (("one-token", 1), ("no-tokens", 0), ("17-tokens", 17))},
    )
)

CASES = (
    *ROUTE_CASES,
    *NARROW_ROUTE_CASES,
    *BLOCK_CASES,
    *EXPERTS_CASES,
    *DROPPED_CASES,
    *NO_EXPERT_CASES,
    *SHARED_CASES,
    *ARGUMENT_CASES,
    *WRITTEN_CASES,
)
