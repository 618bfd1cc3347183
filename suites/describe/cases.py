"""Cases of `describe`: every config class, every spelling, and what must be refused.

A recipe holds `class` and `keys` (the config class of transformers is built from them), or `keys` alone (they are a
plain config.json), and `names` that the message of a refusal must have.
"""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case
from moe_conformance.suites.describe.families import (
    CLASSES,
    EXPERTS,
    LAYERS,
    LEADING_DENSE,
    PARENTS,
    SIZES,
    TOP_K,
    WIDTH,
    Keys,
    flat_keys,
    nested_keys,
)
from moe_conformance.suites.describe.methods import METHODS, is_published, layer_keys

SMOKE = {
    "config-gemma4-hub",  # plain: its config class imports a second of transformers
    "config-qwen3-moe",
    "config-nemotron-h",
    "config-hunyuan-v1-moe-top-k-list",
    "config-layers-deepseek-v3",
    "config-layers-deepseek-v3-published",
    "config-layers-step3p7",
    "config-layers-step3p7-published",
}


def described(name: str, keys: Keys, config_class: str = "") -> Case:
    recipe: dict[str, Any] = {"keys": keys} | ({"class": config_class} if config_class else {})
    case_id = f"config-{name}"
    return Case(case_id, "describe", "describe.resolve", recipe, tier="smoke" if case_id in SMOKE else "core")


def flat(slug: str, model_type: str, *dropped: str, **changed: Any) -> Keys:
    """The slug's config as a plain dict, with keys dropped and changed."""
    kept = {key: value for key, value in flat_keys(slug).items() if key not in dropped}
    return {"model_type": model_type, **kept, **changed}


# One top-k for each layer, 3 the largest and not the first.
UNEVEN = [2, 3, 2, 2, 3, 3, 2, 2, 3]
TYPES = "mlp_layer_types"

FLAT = tuple(described(slug, flat_keys(slug), CLASSES[slug]) for slug in CLASSES)
NESTED = tuple(described(f"{slug}-nested", nested_keys(slug), PARENTS[slug][0]) for slug in PARENTS)
# Other rules, lists and switches of the same classes.
VARIANTS = (
    described("hunyuan-v1-moe-top-k-list", flat_keys("hunyuan-v1-moe") | {"moe_topk": UNEVEN}, "HunYuanMoEV1Config"),
    described(
        "hunyuan-v1-moe-even-list", flat_keys("hunyuan-v1-moe") | {"moe_topk": [3] * LAYERS}, "HunYuanMoEV1Config"
    ),
    described("llama4-moe-layers", flat_keys("llama4") | {"moe_layers": [2, 3, 8]}, "Llama4TextConfig"),
    described("qwen2-moe-every-layer", flat_keys("qwen2-moe") | {"decoder_sparse_step": 1}, "Qwen2MoeConfig"),
    described("ernie4-5-moe-to-last", flat_keys("ernie4-5-moe") | {"moe_layer_end_index": -1}, "Ernie4_5_MoeConfig"),
    # The first and the last layer of the window have experts: both ends are inside.
    described(
        "ernie4-5-moe-window-ends",
        flat_keys("ernie4-5-moe") | {"moe_layer_start_index": 3, "moe_layer_end_index": 5},
        "Ernie4_5_MoeConfig",
    ),
    described(
        "switch-transformers-every-layer",
        flat_keys("switch-transformers") | {"num_sparse_decoder_layers": LAYERS},
        "SwitchTransformersConfig",
    ),
    described("nllb-moe-dense-encoder", flat_keys("nllb-moe") | {"encoder_sparse_step": 0}, "NllbMoeConfig"),
    described("nemotron-h-no-latent", flat_keys("nemotron-h") | {"moe_latent_size": None}, "NemotronHConfig"),
    described(
        "ernie4-5-moe-no-shared", flat_keys("ernie4-5-moe") | {"moe_num_shared_experts": 0}, "Ernie4_5_MoeConfig"
    ),
    described(
        "granitemoeshared-no-shared",
        flat_keys("granitemoeshared") | {"shared_intermediate_size": 0},
        "GraniteMoeSharedConfig",
    ),
    described(
        "longcat-flash-no-zero-experts", flat_keys("longcat-flash") | {"zero_expert_num": 0}, "LongcatFlashConfig"
    ),
)
# Sizes at the top that the model does not read, beside those of its text_config.
ROOT_DIFFERS: Keys = {
    "model_type": "qwen3_vl_moe",
    "text_config": flat_keys("qwen3-vl-moe"),
    "num_experts": EXPERTS + 2,
    "num_experts_per_tok": TOP_K + 2,
    "num_hidden_layers": LAYERS + 2,
}
GEMMA4_HUB: Keys = {"model_type": "gemma4", "text_config": flat("gemma4", "gemma4_text")}
# What lies on the hub: legacy keys that a config class turns into its own, aliases, a text config without its type.
HUB = (
    described("axk1-hub", flat("axk1", "axk1", TYPES, first_k_dense_replace=2, moe_layer_freq=3)),
    described(
        "bailing-hybrid-hub", flat("bailing-hybrid", "bailing_hybrid", TYPES, first_k_dense_replace=LEADING_DENSE)
    ),
    described("cohere2-moe-hub", flat("cohere2-moe", "cohere2_moe", TYPES, first_k_dense_replace=LEADING_DENSE)),
    described("deepseek-v32-hub", flat("deepseek-v32", "deepseek_v32", TYPES, first_k_dense_replace=LEADING_DENSE)),
    described("deepseek-v4-hub", flat("deepseek-v4", "deepseek_v4", TYPES, num_hash_layers=2)),
    described(
        "dots3-note-hub",
        flat(
            "dots3-note", "dots3_note_text", TYPES, first_k_dense_replace=2, moe_layer_freq=[1, 1, 0, 1, 0, 1, 1, 0, 1]
        ),
    ),
    described("gemma4-hub", GEMMA4_HUB),
    described("glm-moe-dsa-hub", flat("glm-moe-dsa", "glm_moe_dsa", TYPES, first_k_dense_replace=LEADING_DENSE)),
    described("glm4-moe-lite-hub", flat("glm4-moe-lite", "glm4_moe_lite", TYPES)),
    described("inkling-hub", flat("inkling", "inkling_text", TYPES, dense_mlp_idx=LEADING_DENSE)),
    described("kimi-linear-hub", flat("kimi-linear", "kimi_linear", TYPES, first_k_dense_replace=LEADING_DENSE)),
    described(
        "minimax-m3-vl-hub",
        {
            "model_type": "minimax_m3_vl",
            "text_config": flat(
                "minimax-m3-vl", "minimax_m3_vl_text", TYPES, moe_layer_freq=[0, 1, 0, 0, 1, 1, 1, 0, 1]
            ),
        },
    ),
    described(
        "mistral-large4-hub", flat("mistral-large4", "mistral_large4_text", TYPES, first_k_dense_replace=LEADING_DENSE)
    ),
    described("qwen3-moe-hub", flat("qwen3-moe", "qwen3_moe")),
    described("qwen3-vl-moe-root-differs", ROOT_DIFFERS),
    described("qwen3-vl-moe-hub", {"model_type": "qwen3_vl_moe", "text_config": flat_keys("qwen3-vl-moe")}),
    described(
        "step3p7-hub",
        {"model_type": "step3p7", "text_config": flat("step3p7", "step3p5", TYPES, moe_layers_enum="2,4,7")},
    ),
    described(
        "step3p7-hub-list",
        {"model_type": "step3p7", "text_config": flat("step3p7", "step3p5", TYPES, moe_layers_enum=[2, 4, 7])},
    ),
    described(
        "unlimited-ocr-language-config",
        {"model_type": "unlimited_ocr", "language_config": flat("unlimited-ocr", "unlimited_ocr_text")},
    ),
    described(
        "unlimited-ocr-hub", flat("unlimited-ocr", "unlimited_ocr_text", TYPES, first_k_dense_replace=LEADING_DENSE)
    ),
)
DESCRIBED = FLAT + NESTED + VARIANTS + HUB


def layered(name: str, keys: Keys, config_class: str = "", lenient: str = "") -> Case:
    recipe: dict[str, Any] = {"keys": keys} | ({"class": config_class} if config_class else {})
    case_id = f"config-layers-{name}"
    tier = "smoke" if case_id in SMOKE else "core"
    return Case(case_id, "describe", "describe.layers", recipe, tier, lenient)


def way(number: int) -> str:
    return ("", "-otherwise", "-third")[number]


# What the config class takes for keys that a config leaves out: 8 groups, 3 layers that hash, 7 as the limit.
LEFT_OUT = (
    layered("deepseek-v3-hub", flat("deepseek-v3", "deepseek_v3", "n_group", "topk_group", n_routed_experts=16)),
    layered("deepseek-v4-hub", flat("deepseek-v4", "deepseek_v4", TYPES)),
    layered("gpt-oss-hub", flat("gpt-oss", "gpt_oss")),
    layered("longcat-flash-hub", flat("longcat-flash", "longcat_flash", "zero_expert_num")),
    layered("qwen3-next-hub", flat("qwen3-next", "qwen3_next")),
    # A draft layer's limit follows those of the model's own layers.
    layered(
        "step3p7-draft",
        flat("step3p7", "step3p5", swiglu_limits=[0.0] * (LAYERS - 1) + [4.5, 5.5], num_nextn_predict_layers=1),
    ),
)
WAYS = tuple((slug, number) for slug, ways in METHODS.items() for number in range(len(ways)))
# A way with keys that no published config sets is a SHOULD, and without them a case of its own.
EVERY_KEY = tuple(
    layered(
        f"{slug}{way(number)}",
        layer_keys(slug, number),
        CLASSES[slug],
        "" if is_published(slug, number) else "no published config has this activation, bias or jitter",
    )
    for slug, number in WAYS
)
PUBLISHED_KEYS = tuple(
    layered(f"{slug}{way(number)}-published", layer_keys(slug, number, published=True), CLASSES[slug])
    for slug, number in WAYS
    if not is_published(slug, number)
)
LAYERED = LEFT_OUT + EVERY_KEY + PUBLISHED_KEYS
# The talker's own parent has no model type: saved, it does not say what it is.
SAVED = tuple(
    case for case in DESCRIBED + LAYERED if case.recipe.get("class") not in (None, "Qwen3OmniMoeTalkerConfig")
)


NO_SUCH = "no published config has such a value, or a second spelling that differs"


def refused(name: str, keys: Keys, *names: str, config_class: str = "", tier: str = "core", lenient: str = "") -> Case:
    recipe: dict[str, Any] = {"keys": keys, "names": names} | ({"class": config_class} if config_class else {})
    # A model library builds what a config says and leaves its values to the config class: it offers no refusals.
    return Case(f"config-{name}", "describe", "config.say-what-is-missing", recipe, tier, lenient)


GEMMA4 = flat_keys("gemma4")
ABSENT = tuple(
    refused(f"gemma4-without-{key.replace('_', '-')}", GEMMA4 | {key: None}, key, config_class="Gemma4TextConfig")
    for key in ("num_experts", "top_k_experts", "moe_intermediate_size")
)
REFUSED = (
    *ABSENT,
    refused(
        "gemma4-hub-without-top-k",
        GEMMA4_HUB | {"text_config": GEMMA4_HUB["text_config"] | {"top_k_experts": None}},
        "top_k_experts",
        tier="smoke",
    ),
    refused(
        "gemma4-nested-without-top-k",
        {"text_config": GEMMA4 | {"top_k_experts": None}},
        "top_k_experts",
        "text_config",
        config_class="Gemma4Config",
    ),
    refused(
        "dots1-without-experts",
        flat_keys("dots1") | {"n_routed_experts": None},
        "n_routed_experts",
        config_class="Dots1Config",
    ),
    refused(
        "dots1-without-shared",
        flat_keys("dots1") | {"n_shared_experts": None},
        "n_shared_experts",
        config_class="Dots1Config",
    ),
    refused(
        "deepseek-v2-without-top-k",
        flat_keys("deepseek-v2") | {"num_experts_per_tok": None},
        "num_experts_per_tok",
        config_class="DeepseekV2Config",
    ),
    refused(
        "qwen3-moe-two-counts",
        flat("qwen3-moe", "qwen3_moe", num_local_experts=EXPERTS + 2),
        "num_experts",
        "num_local_experts",
        lenient=NO_SUCH,
    ),
    refused(
        "ernie4-5-moe-two-top-ks",
        flat("ernie4-5-moe", "ernie4_5_moe", num_experts_per_tok=TOP_K + 2),
        "moe_k",
        "num_experts_per_tok",
        lenient=NO_SUCH,
    ),
    refused(
        "mixtral-top-k-above-experts",
        flat("mixtral", "mixtral", num_experts_per_tok=EXPERTS + 1),
        "num_experts_per_tok",
    ),
    refused(
        "hunyuan-v1-moe-one-top-k-above-experts",
        flat("hunyuan-v1-moe", "hunyuan_v1_moe", moe_topk=[2] * (LAYERS - 1) + [EXPERTS + 1]),
        "moe_topk",
    ),
    refused("hunyuan-v1-moe-short-list", flat("hunyuan-v1-moe", "hunyuan_v1_moe", moe_topk=UNEVEN[:-1]), "moe_topk"),
    refused("mixtral-no-experts-at-all", flat("mixtral", "mixtral", num_local_experts=0), "num_local_experts"),
    refused(
        "mixtral-negative-top-k",
        flat("mixtral", "mixtral", num_experts_per_tok=-1),
        "num_experts_per_tok",
        lenient=NO_SUCH,
    ),
    refused(
        "mixtral-zero-top-k", flat("mixtral", "mixtral", num_experts_per_tok=0), "num_experts_per_tok", lenient=NO_SUCH
    ),
    refused(
        "mixtral-boolean-top-k",
        flat("mixtral", "mixtral", num_experts_per_tok=True),
        "num_experts_per_tok",
        lenient=NO_SUCH,
    ),
    refused(
        "mixtral-textual-experts",
        flat("mixtral", "mixtral", num_local_experts="11"),
        "num_local_experts",
        lenient=NO_SUCH,
    ),
    refused(
        "mixtral-fractional-width",
        flat("mixtral", "mixtral", intermediate_size=24.5),
        "intermediate_size",
        lenient=NO_SUCH,
    ),
    refused("axk1-types-too-few", flat("axk1", "axk1", mlp_layer_types=["dense", "sparse"]), TYPES),
    refused("axk1-types-unknown", flat("axk1", "axk1", mlp_layer_types=["dense"] * 8 + ["wide"]), TYPES),
)


def dense(name: str, keys: Keys, *names: str, config_class: str = "", tier: str = "core") -> Case:
    recipe: dict[str, Any] = {"keys": keys, "names": names} | ({"class": config_class} if config_class else {})
    return Case(f"config-{name}", "describe", "config.refuse-dense", recipe, tier)


LLAMA: Keys = SIZES | {"intermediate_size": WIDTH}
DENSE_GEMMA4: Keys = GEMMA4 | {"enable_moe_block": False}
DENSE = (
    dense("llama-dense", LLAMA, "llama", config_class="LlamaConfig"),
    dense("llama-dense-hub", {"model_type": "llama"} | LLAMA, "llama", tier="smoke"),
    dense("gemma4-dense", SIZES, "gemma4", config_class="Gemma4TextConfig"),
    dense("gemma4-switched-off", DENSE_GEMMA4, "gemma4", config_class="Gemma4TextConfig"),
    dense("gemma4-nested-dense", {"text_config": DENSE_GEMMA4}, "gemma4", config_class="Gemma4Config"),
    dense("doge-dense", flat_keys("doge") | {"is_moe": False}, "doge", config_class="DogeConfig"),
    dense(
        "granitemoehybrid-dense",
        flat_keys("granitemoehybrid") | {"num_local_experts": 0, "num_experts_per_tok": 0},
        "granitemoehybrid",
        config_class="GraniteMoeHybridConfig",
    ),
    dense(
        "jamba-one-expert",
        flat_keys("jamba") | {"num_experts": 1, "num_experts_per_tok": 1},
        "jamba",
        config_class="JambaConfig",
    ),
    dense(
        "qwen3-moe-no-experts", flat_keys("qwen3-moe") | {"num_experts": 0}, "qwen3_moe", config_class="Qwen3MoeConfig"
    ),
    dense(
        "qwen2-moe-every-layer-dense",
        flat_keys("qwen2-moe") | {"mlp_only_layers": [1, 3, 5, 7]},
        "qwen2_moe",
        config_class="Qwen2MoeConfig",
    ),
    dense(
        "deepseek-v3-every-layer-dense",
        flat_keys("deepseek-v3") | {"first_k_dense_replace": LAYERS},
        "deepseek_v3",
        config_class="DeepseekV3Config",
    ),
    dense(
        "vitpose-one-expert",
        flat_keys("vitpose-backbone") | {"num_experts": 1},
        "vitpose_backbone",
        config_class="VitPoseBackboneConfig",
    ),
)


CASES = DESCRIBED + LAYERED + REFUSED + DENSE
