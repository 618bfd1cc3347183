"""Block cases: what each router chooses and weighs, what experts compute, and how all of it is combined."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from moe_conformance.catalogue.case import Case
from moe_conformance.suites.block.configs import FAMILIES, LATENT, LIMIT, WIDTH, Family

NO_NORM = {"norm_topk_prob": False}
# One of each way to lay gate and up, and in and out, in one tensor.
PACKED = ("aria", "gpt-oss", "llama4", "mixtral", "openai-privacy-filter", "qwen3-vl-moe")

# Slug -> the other settings of a family's switches.
OTHERS: dict[str, Family] = {
    # hidden 48 and expert width 24: [2F, H] and its transpose have one shape.
    **{
        f"{slug}-square": FAMILIES[slug].but(hidden_size=2 * WIDTH, num_attention_heads=6, num_key_value_heads=6)
        for slug in PACKED
    },
    # hidden 56: experts narrower than half of it, as most models have them, so that H is the larger of [2F, H].
    **{
        f"{slug}-narrow": FAMILIES[slug].but(hidden_size=56, num_attention_heads=7, num_key_value_heads=7)
        for slug in PACKED
    },
    **{
        f"{slug}-no-norm": FAMILIES[slug].but(**NO_NORM)
        for slug in (
            *("axk1", "axk2", "beam", "cohere2-moe", "deepseek-v3", "dots1", "flint", "kolibri1", "lfm2-moe"),
            *("mellum", "mimo-v2-flash", "mistral4", "nemotron-h", "olmoe", "qwen2-moe", "qwen3-moe", "qwen3-next"),
            *("qwen3-omni-talker", "qwen3-omni-thinker", "qwen4-exp", "flex-olmo", "doge"),
        )
    },
    **{f"{slug}-no-norm": FAMILIES[slug].but(moe_renormalize=False) for slug in ("bailing-hybrid", "kimi-linear")},
    **{
        f"{slug}-greedy": FAMILIES[slug].but(topk_method="greedy", n_group=None, topk_group=None)
        for slug in ("deepseek-ocr2", "deepseek-v2", "unlimited-ocr")
    },
    # Read by its key no matter which: the keys that no layer reads must change nothing.
    "deepseek-v2-dead-norm": FAMILIES["deepseek-v2"].but(norm_topk_prob=True),
    "aria-gelu": FAMILIES["aria"].but(hidden_act="gelu_pytorch_tanh"),
    # Experts outside the best groups count as 0, not as minus infinity: with four biases below -1 the seven others of
    # the five groups, and then both of the group left out, are the nine best.
    "axk2-zero-mask": replace(
        FAMILIES["axk2"].but(n_group=6, topk_group=5, num_experts_per_tok=9),
        bias=(-2.0, 0.5, 0.5, -2.0, -2.0, 0.5, 0.5, -2.0, 0.5, 0.75, 0.5, 0.25),
    ),
    "axk2-no-groups": FAMILIES["axk2"].but(n_group=None, topk_group=None),
    "cohere2-moe-softmax": FAMILIES["cohere2-moe"].but(
        expert_selection_fn="softmax", shared_expert_combination_strategy="sum"
    ),
    "dbrx-no-norm": FAMILIES["dbrx"].but(
        ffn_config=FAMILIES["dbrx"].config["ffn_config"] | {"moe_normalize_expert_weights": None}
    ),
    "deepseek-v4-hash": Family(FAMILIES["deepseek-v4"].config, layer=0, token_ids=True),
    "dots3-note-vision-small": Family(FAMILIES["dots3-note-vision"].config, layer=1),
    "ernie4-5-moe-no-shared": FAMILIES["ernie4-5-moe"].but(moe_num_shared_experts=0),
    "glm5-next-gelu": FAMILIES["glm5-next"].but(hidden_act="gelu"),
    "hunyuan-v1-moe-first": Family(FAMILIES["hunyuan-v1-moe"].config, layer=0),
    "hy-v3-input-combine": FAMILIES["hy-v3"].but(enable_moe_fp32_combine=False),
    "inkling2-one-cap": FAMILIES["inkling2"].but(mlp_up_softcap=3 * LIMIT),
    "laguna-no-softcap": FAMILIES["laguna"].but(moe_router_logit_softcapping=0.0),
    "lfm2-moe-no-bias": FAMILIES["lfm2-moe"].but(use_expert_bias=False),
    "longcat-flash-no-identity": FAMILIES["longcat-flash"].but(zero_expert_num=0),
    "mixtral-gelu": FAMILIES["mixtral"].but(hidden_act="gelu"),
    "nemotron-h-no-latent": FAMILIES["nemotron-h"].but(moe_latent_size=None),
    "nemotron-h-bias": FAMILIES["nemotron-h"].but(mlp_bias=True, moe_latent_size=LATENT),
    "nllb-moe-own-capacity": FAMILIES["nllb-moe"].but(moe_eval_capacity_token_fraction=-1.0, expert_capacity=3),
    "nllb-moe-before": FAMILIES["nllb-moe"].but(normalize_router_prob_before_dropping=True),
    "nllb-moe-by-weight": FAMILIES["nllb-moe"].but(batch_prioritized_routing=True),
    "qwen3-moe-gelu-tanh": FAMILIES["qwen3-moe"].but(hidden_act="gelu_pytorch_tanh"),
    "step3p7-no-limit": FAMILIES["step3p7"].but(swiglu_limits=None, swiglu_limits_shared=None),
    "zaya-first": Family(FAMILIES["zaya"].config, layer=0),
}
VARIANTS: dict[str, Family] = FAMILIES | OTHERS

# One of each way to route, to compute an expert and to combine, for what is tried on some families only.
SOME = (
    *(
        "axk1",
        "cohere2-moe",
        "deepseek-v3",
        "deepseek-v4",
        "gemma4",
        "gpt-oss",
        "granitemoeshared",
        "inkling",
        "jetmoe",
    ),
    *("llama4", "longcat-flash", "mixtral", "muse-spark", "nemotron-h", "qwen2-moe", "switch-transformers", "zaya"),
)
# The families that were merged first, and those whose routing or experts are like no others'.
SMOKE = ("deepseek-v3", "gemma4", "gpt-oss", "llama4", "mixtral", "qwen2-moe")


def _case(slug: str, kind: str, clause: str, tier: str, **recipe: Any) -> Case:
    """shape: sequences and tokens of each. x: which values. sum: about what the scores of the experts are, 0 for any.
    routing: "" for the router's own, or how the given one is made. native_ids: it goes to the engine as it is."""
    found: dict[str, Any] = {"family": slug, "model_type": VARIANTS[slug].config["model_type"]}
    found |= {"shape": (2, 11), "x": "x", "sum": 0.0, "dtype": "float32"}
    found |= {"routing": "", "native_ids": False, "implementation": None}
    return Case(f"family-{slug}-{kind}", stage="block", clause=clause, recipe=found | recipe, tier=tier)


def _tier(slug: str, core: Iterable[str] = FAMILIES) -> str:
    """Every family once in core; its other settings, and parts of the block by themselves, in the full sweep."""
    return "smoke" if slug in SMOKE else "core" if slug in core else "full"


def _core_or_full(slug: str) -> str:
    return "core" if slug in SOME else "full"


# doge's router mixes the tokens of a batch, which nobody else has to: one token is judged. Its experts are one with it.
ROUTED = tuple(slug for slug in VARIANTS if VARIANTS[slug].given)
GIVEN = tuple(slug for slug in FAMILIES if FAMILIES[slug].given)
NARROW = tuple(f"{slug}-narrow" for slug in PACKED)
CORE = (*FAMILIES, *NARROW)
GROUPED = tuple(slug for slug in FAMILIES if FAMILIES[slug].grouped)

# Families whose routers add to the sum of their scores, and a sum at which it shows: about what they add. axk2 would
# tie there with the experts outside the best groups; the square of deepseek_v4's scores must not underflow.
TINY_SUMS = {"lfm2-moe": 1e-6, "muse-spark": 1e-15, "deepseek-v4": 1e-18} | dict.fromkeys(
    (
        *("afmoe", "axk1", "bailing-hybrid", "beam", "deepseek-v3", "deepseek-v32", "dots1", "dots3-note"),
        *("dots3-note-vision", "exaone-moe", "glm4-moe", "glm4-moe-lite", "glm4v-moe", "glm5-next", "glm-moe-dsa"),
        *("hy-v3", "hy-v4", "inkling2", "kimi-linear", "mimo-v2-flash", "nemotron-h", "solar-open"),
    ),
    1e-20,
)
# doge's only tokens: each is alone in its batch.
ALONE = tuple((slug, f"token-{number}") for slug in ("doge", "doge-no-norm") for number in range(3))

ROUTE_CASES = (
    *(_case(slug, "route", "block.routing", _tier(slug)) for slug in ROUTED),
    *(_case(slug, f"route-{token}", "block.routing", "core", shape=(1, 1), x=token) for slug, token in ALONE),
    *(_case(slug, "route-tiny-sum", "block.routing", _tier(slug, SOME), sum=s) for slug, s in TINY_SUMS.items()),
)

# With the engine's own logits, which are rounded to bfloat16.
NARROW_ROUTE_CASES = tuple(
    _case(slug, "bf16-route", "block.routing", _core_or_full(slug), dtype="bfloat16") for slug in GIVEN
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

EXPERTS_CASES = (
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
    for kind, routing in (("no-expert", "minus-one"), ("id-beyond", "beyond"))
    for recipe in ({"routing": routing, "native_ids": True},)
    for case in (
        _case(slug, kind, "block.no-expert", "full", **recipe),
        *(_computed(slug, kind, "block.no-expert", n, **recipe) for n in IMPLEMENTATIONS),
    )
)

# Families with something that is always on.
ALWAYS_ON = (
    *("afmoe", "aria", "axk1", "axk2", "bailing-hybrid", "cohere2-moe", "deepseek-ocr2", "deepseek-v2", "deepseek-v3"),
    *("deepseek-v32", "deepseek-v4", "diffusion-gemma", "dots1", "dots3-note", "ernie4-5-moe", "ernie4-5-vl"),
    *("exaone-moe", "flint", "gemma4", "glm4-moe", "glm4-moe-lite", "glm4v-moe", "glm5-next", "glm-moe-dsa"),
    *("granitemoe-swa", "granitemoehybrid", "granitemoeshared", "hunyuan-v1-moe", "hy-v3", "hy-v4", "inkling"),
    *("jetmoe", "kimi-linear", "kolibri1", "laguna", "llama4", "minimax-m3-vl", "mistral4", "mistral-large4"),
    *("nemotron-h", "qwen2-moe", "qwen3-5-moe", "qwen3-next", "qwen3-omni-talker", "qwen4-exp", "solar-open"),
    *("step3p7", "unlimited-ocr"),
)
SHARED_CASES = tuple(_case(slug, "shared", "block.shared", _tier(slug, SOME), routing="zero") for slug in ALWAYS_ON)

CASES = (
    *ROUTE_CASES,
    *NARROW_ROUTE_CASES,
    *BLOCK_CASES,
    *EXPERTS_CASES,
    *DROPPED_CASES,
    *NO_EXPERT_CASES,
    *SHARED_CASES,
)
