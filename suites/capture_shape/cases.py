"""Cases of `capture_shape`: the sizes that both sides of a capturer take from a config, and what they must refuse.

A recipe holds `class` and `keys`, or `keys` alone, as those of `describe`; `want` of a capture shape.
"""

from __future__ import annotations

from typing import Any, Literal

from moe_conformance.catalogue.case import Case
from moe_conformance.suites.describe.cases import GEMMA4, GEMMA4_HUB, LLAMA, ROOT_DIFFERS, TYPES, UNEVEN, flat
from moe_conformance.suites.describe.families import (
    CLASSES,
    EXPERTS,
    LAYERS,
    LEADING_DENSE,
    PARENTS,
    TOP_K,
    Keys,
    flat_keys,
    nested_keys,
)

SIDES: tuple[Literal["worker", "reader"], ...] = ("worker", "reader")


def captured(slug: str, moe_layers: int, keys: Keys, config_class: str = "") -> Case:
    """moe_layers: how many of the layers have experts."""
    want = {"layers": LAYERS, "moe_layers": moe_layers, "top_k": TOP_K, "experts": EXPERTS}
    recipe: dict[str, Any] = {"keys": keys, "want": want}
    recipe |= {"class": config_class} if config_class else {}
    tier = "smoke" if slug == "gemma4-hub" else "core"
    return Case(f"capture-shape-{slug}", "capture_shape", "capture-shape.both-sides", recipe, tier)


CAPTURED = (
    *(
        captured(slug, moe_layers, flat_keys(slug), CLASSES[slug])
        for slug, moe_layers in (
            ("dbrx", 9),
            ("deepseek-v3", 5),
            ("ernie4-5-moe", 2),
            ("gemma4", 9),
            ("gpt-oss", 9),
            ("hunyuan-v1-moe", 9),
            ("mixtral", 9),
            ("nemotron-h", 4),
            ("qwen3-moe", 3),
        )
    ),
    *(
        captured(f"{slug}-nested", moe_layers, nested_keys(slug), PARENTS[slug][0])
        for slug, moe_layers in (
            ("aria", 9),
            ("gemma4", 9),
            ("llama4", 2),
            ("qwen3-omni-thinker", 3),
            ("qwen3-vl-moe", 3),
        )
    ),
    captured("hunyuan-v1-moe-top-k-list", 9, flat_keys("hunyuan-v1-moe") | {"moe_topk": UNEVEN}, "HunYuanMoEV1Config"),
    captured("qwen3-vl-moe-root-differs", 3, ROOT_DIFFERS),
    captured("gemma4-hub", 9, GEMMA4_HUB),
    captured("qwen3-moe-hub", 3, flat("qwen3-moe", "qwen3_moe")),
    captured("kimi-linear-hub", 5, flat("kimi-linear", "kimi_linear", TYPES, first_k_dense_replace=LEADING_DENSE)),
)


def refused(name: str, clause: str, keys: Keys, config_class: str) -> Case:
    # The names of what is missing are asked of the resolver; a capturer need only refuse on purpose.
    recipe = {"keys": keys, "names": (), "class": config_class}
    return Case(f"capture-shape-{name}", "capture_shape", clause, recipe)


REFUSED = (
    refused(
        "gemma4-without-top-k",
        "config.say-what-is-missing",
        GEMMA4 | {"top_k_experts": None},
        "Gemma4TextConfig",
    ),
    refused("llama-dense", "config.refuse-dense", LLAMA, "LlamaConfig"),
)

CASES = CAPTURED + REFUSED
