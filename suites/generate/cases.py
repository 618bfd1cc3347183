"""Cases of `generate`: whole small models, requests served together, and what a scheduler may do to them."""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case
from moe_conformance.model.families.families import RECORDS

# name of the whole model -> model type.
MODELS = {
    "qwen3-moe": "qwen3_moe",
    "mixtral": "mixtral",
    "qwen2-moe": "qwen2_moe",
    "gemma4": "gemma4_text",
    "granitemoe": "granitemoe",
    "olmoe": "olmoe",
    "qwen3-moe-e300": "qwen3_moe",
}
# What may be done to requests. step_tokens: less than the longest prompt, and no divisor of it.
SCHEDULES: dict[str, dict[str, Any]] = {
    "chunked": {"step_tokens": 7},
    "shared-prefix": {"shares_prefixes": True},
}


def _case(model: str, clause: str, tail: str = "", tier: str = "full", **recipe: Any) -> Case:
    """model: in golden/whole-models."""
    recipe = {"model": model, "model_type": MODELS[model], **recipe}
    return Case(f"generate-{model}{tail}", "generate", clause, recipe, tier)


KNOWN = tuple(model for model, model_type in MODELS.items() if model_type in RECORDS)
SCHEDULED = tuple(model for model in KNOWN if model == "qwen3-moe")

TOKENS = (
    *(_case(model, "generate.tokens", tier="core" if model in SCHEDULED else "full") for model in KNOWN),
    *(
        _case(model, "generate.tokens", f"-{name}", **schedule)
        for model in SCHEDULED
        for name, schedule in SCHEDULES.items()
    ),
)
ROUTED = (
    *(
        _case(model, "generate.routed", "-routed", "core" if model in SCHEDULED else "full", routed=True)
        for model in KNOWN
    ),
    *(
        _case(model, "generate.routed", f"-{name}-routed", routed=True, **schedule)
        for model in SCHEDULED
        for name, schedule in SCHEDULES.items()
    ),
)

CASES = (*TOKENS, *ROUTED)
