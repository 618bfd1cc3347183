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
    "qwen3-moe-alike": "qwen3_moe",
}
# What may be done to requests. step_tokens: less than the longest prompt, and no divisor of it.
SCHEDULES: dict[str, dict[str, Any]] = {
    "chunked": {"step_tokens": 7},
    "shared-prefix": {"shares_prefixes": True},
    "twice": {"answers_each": 2},
    "withdrawn": {"withdrawn": (1, 3)},
    "two-ranks": {"ranks": 2},
}
# Four requests of 30 tokens, each a block of 32 when it begins and two at its end, of five that there are.
PREEMPTED = {"qwen3-moe-alike": {"cache_tokens": 160}}


def _case(model: str, clause: str, tail: str = "", tier: str = "full", **recipe: Any) -> Case:
    """model: in golden/whole-models."""
    recipe = {"model": model, "model_type": MODELS[model], **recipe}
    return Case(f"generate-{model}{tail}", "generate", clause, recipe, tier)


KNOWN = tuple(model for model, model_type in MODELS.items() if model_type in RECORDS)
SCHEDULED = tuple(model for model in KNOWN if model == "qwen3-moe")
_SCHEDULED = (
    *((model, name, schedule) for model in SCHEDULED for name, schedule in SCHEDULES.items()),
    *((model, "preempted", schedule) for model, schedule in PREEMPTED.items() if model in KNOWN),
)

TOKENS = (
    *(_case(model, "generate.tokens", tier="core" if model in SCHEDULED else "full") for model in KNOWN),
    *(_case(model, "generate.tokens", f"-{name}", **schedule) for model, name, schedule in _SCHEDULED),
)
ROUTED = (
    *(
        _case(model, "generate.routed", "-routed", "core" if model in SCHEDULED else "full", routed=True)
        for model in KNOWN
    ),
    *(
        _case(model, "generate.routed", f"-{name}-routed", routed=True, **schedule)
        for model, name, schedule in _SCHEDULED
    ),
)
# In bfloat16 an expert here and there is another one, and so is a token; rows in wrong places are told all the same.
PLACES = tuple(
    _case(model, "generate.routed", "-bf16-places", routed=True, dtype="bfloat16", needs=("bfloat16",))
    for model in SCHEDULED
)

CASES = (*TOKENS, *ROUTED, *PLACES)
