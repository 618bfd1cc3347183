"""What each model family calls things, where its config differs from the common names.

Source: the configuration and modeling files of transformers 5.23 (75 config classes with routed experts). A family
with only common names needs no more than its layer rule here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_conformance.model.families.bounds import MOST_SHARED
from moe_conformance.model.families.layers import (
    Rule,
    blocks,
    enumerated,
    every_layer,
    flagged,
    leading_dense,
    leading_dense_then_frequency,
    listed,
    period,
    sparse_step,
    step_from_one,
    step_to_last,
    typed,
    window,
)
from moe_conformance.model.families.scope import Scope

# Common names: any family may use any of them, and those it uses must agree.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
LAYERS = ("num_hidden_layers", "n_layers")
HIDDEN = ("hidden_size", "d_model")
WIDTH = ("moe_intermediate_size",)
DENSE_WIDTH = ("intermediate_size",)
SHARED_COUNT = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
# Where a config may hold the model's config: the first of these that has experts, else the level itself.
NESTED = ("text_config", "language_config", "llm_config", "thinker_config", "talker_config")
NESTED_LAST = ("vision_config",)


@dataclass(frozen=True)
class Shared:
    """count: keys of how many there are, or the number. width: keys of the width of one, () for a routed one's."""

    count: tuple[str, ...] | int = SHARED_COUNT
    width: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """How one family spells its MoE.

    layers: rule for the MoE layers. num_layers: keys of the number of layers, () where the list of blocks gives it.
    experts_under: key of the level that holds experts, top-k and width. top_k: keys, or the number the model fixes.
    width: keys of an expert's width, or that width. width_of_hidden: key of the ratio of width to hidden_size.
    width_entry: which entry to take of a width that is a list of something else than layers. extra_experts: key and
    default of further experts without weights that the router also chooses among. latent: key of the width that the
    experts work in, latent_required: whether it must be set. switch: key that must be true. least_experts: fewer is a
    dense model. encoder: rule, layer keys and width keys of an encoder. pyramid: legacy key with the experts of each
    layer.
    """

    layers: Rule = every_layer
    num_layers: tuple[str, ...] = LAYERS
    experts_under: str = ""
    top_k: tuple[str, ...] | int = TOP_K
    width: tuple[str, ...] | int = WIDTH
    width_of_hidden: str = ""
    width_entry: int | None = None
    shared: Shared | None = None
    extra_experts: tuple[str, int] | None = None
    latent: str = ""
    latent_required: bool = False
    switch: str = ""
    least_experts: int = 0
    encoder: tuple[Rule, tuple[str, ...], tuple[str, ...]] | None = None
    pyramid: str = ""


COUNTED = Shared()
ONE_AS_WIDE = Shared(1)
ONE = Shared(1, ("shared_expert_intermediate_size",))

DEEPSEEK = Family(shared=COUNTED)
QWEN = Family(sparse_step(), least_experts=1)
QWEN_SHARED = replace(QWEN, shared=ONE)
PLAIN_WIDTH = Family(width=DENSE_WIDTH)
GRANITE_SHARED = replace(PLAIN_WIDTH, shared=Shared(1, ("shared_intermediate_size",)))
FIRST_K = "first_k_dense_replace"


def first_k(dense: int) -> Family:
    return replace(DEEPSEEK, layers=leading_dense(dense, FIRST_K))


def typed_or(otherwise: Rule | None) -> Family:
    return replace(DEEPSEEK, layers=typed(otherwise))


FAMILIES: dict[str, Family] = {
    "afmoe": replace(DEEPSEEK, layers=leading_dense(1, "num_dense_layers")),
    "aria_text": replace(PLAIN_WIDTH, shared=COUNTED),
    "axk1": typed_or(leading_dense_then_frequency(1)),
    "axk2": typed_or(leading_dense_then_frequency(1)),
    "bailing_hybrid": typed_or(leading_dense(2, FIRST_K)),
    "beam": Family(typed(leading_dense(3))),
    "cohere2_moe": Family(typed(leading_dense(0, FIRST_K)), width=DENSE_WIDTH, shared=COUNTED),
    "dbrx": Family(experts_under="ffn_config", width=("ffn_hidden_size",)),
    "deepseek_ocr2_text": typed_or(None),
    "deepseek_v2": first_k(0),
    "deepseek_v3": first_k(3),
    "deepseek_v32": typed_or(leading_dense(3, FIRST_K)),
    # Always one shared expert: the modeling never reads n_shared_experts.
    "deepseek_v4": Family(typed(every_layer), shared=ONE_AS_WIDE),
    "diffusion_gemma_text": Family(),
    # An expert is one neuron, a pair of embedding rows; the dense MLP beside them is always on.
    "doge": Family(width=1, shared=Shared(1, DENSE_WIDTH), switch="is_moe"),
    "dots1": first_k(0),
    "dots3_note_text": replace(
        DEEPSEEK,
        layers=typed(leading_dense_then_frequency(1)),
        shared=Shared(SHARED_COUNT, ("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size")),
    ),
    "dots3_note_vision_encoder": Family(typed(None), pyramid="pyramid_num_routed"),
    "ernie4_5_moe": replace(DEEPSEEK, layers=window),
    # Text and vision experts in one layer: the text ones are described.
    "ernie4_5_vl_moe_text": replace(typed_or(leading_dense(1)), width_entry=0),
    "exaone_moe": typed_or(leading_dense(1, FIRST_K)),
    "flex_olmo": PLAIN_WIDTH,
    "flint": replace(QWEN_SHARED, layers=sparse_step(skip=(0, 1))),
    "gemma4_text": Family(switch="enable_moe_block"),
    "glm4_moe": first_k(1),
    "glm4_moe_lite": typed_or(leading_dense(1)),
    "glm4v_moe_text": first_k(1),
    "glm5_next_text": typed_or(leading_dense(3)),
    "glm_moe_dsa": typed_or(leading_dense(3, FIRST_K)),
    "gpt_oss": PLAIN_WIDTH,
    "granitemoe": PLAIN_WIDTH,
    "granitemoe_swa": GRANITE_SHARED,
    "granitemoehybrid": replace(GRANITE_SHARED, least_experts=1),
    "granitemoeshared": GRANITE_SHARED,
    "hunyuan_v1_moe": replace(PLAIN_WIDTH, shared=ONE_AS_WIDE),
    "hy_v3": typed_or(leading_dense(1)),
    "hy_v4": typed_or(leading_dense(1)),
    "inkling2_text": Family(),
    "inkling_text": typed_or(leading_dense(0, "dense_mlp_idx")),
    "jamba": replace(PLAIN_WIDTH, layers=period, least_experts=2),
    "jetmoe": PLAIN_WIDTH,
    "kimi_linear": typed_or(leading_dense(1, FIRST_K)),
    "kolibri1": Family(shared=ONE),
    "laguna": Family(typed(leading_dense(1)), shared=ONE),
    "lfm2_moe": Family(leading_dense(2, "num_dense_layers")),
    "llama4_text": Family(listed, width=DENSE_WIDTH, shared=ONE_AS_WIDE),
    "longcat_flash": Family(
        num_layers=("num_layers",), width=("expert_ffn_hidden_size",), extra_experts=("zero_expert_num", 256)
    ),
    "mellum": Family(typed(every_layer)),
    "mimo_v2_flash": Family(typed(leading_dense(1))),
    "minimax": PLAIN_WIDTH,
    "minimax_m2": PLAIN_WIDTH,
    "minimax_m3_vl_text": replace(GRANITE_SHARED, layers=typed(flagged)),
    "mistral4": first_k(0),
    "mistral_large4_text": typed_or(leading_dense(1, FIRST_K)),
    "mixtral": PLAIN_WIDTH,
    "muse_spark_text": Family(typed(every_layer), latent="moe_hidden_size", latent_required=True),
    "nemotron_h": Family(
        blocks, num_layers=(), latent="moe_latent_size", shared=Shared(1, ("moe_shared_expert_intermediate_size",))
    ),
    "nllb-moe": Family(
        step_to_last("decoder_sparse_step"),
        num_layers=("decoder_layers",),
        top_k=2,  # NllbMoeTop2Router
        width=("decoder_ffn_dim",),
        encoder=(step_to_last("encoder_sparse_step"), ("encoder_layers",), ("encoder_ffn_dim",)),
    ),
    "olmoe": PLAIN_WIDTH,
    "openai_privacy_filter": PLAIN_WIDTH,
    "phimoe": replace(PLAIN_WIDTH, top_k=2),  # SparseMixer
    "qwen2_moe": QWEN_SHARED,
    "qwen3_5_moe_text": Family(shared=ONE),
    "qwen3_moe": QWEN,
    "qwen3_next": QWEN_SHARED,
    # Its config has Qwen2-MoE's layer keys; its modeling does not read them.
    "qwen3_omni_moe_talker_text": Family(shared=ONE),
    "qwen3_omni_moe_text": QWEN,
    "qwen3_vl_moe_text": QWEN,
    "qwen4_exp_text": Family(shared=ONE),
    "solar_open": DEEPSEEK,
    "step3p5": Family(typed(enumerated), shared=Shared(1, ("share_expert_dim", "share_expert_dims"))),
    "switch_transformers": Family(
        step_from_one("decoder_sparse_step", "num_sparse_decoder_layers"),
        num_layers=("num_decoder_layers",),
        top_k=1,  # SwitchTransformersTop1Router
        width=("d_ff",),
        encoder=(step_from_one("encoder_sparse_step", "num_sparse_encoder_layers"), ("num_layers",), ("d_ff",)),
    ),
    "unlimited_ocr_text": typed_or(leading_dense(1, FIRST_K)),
    # The router is the dataset index: one expert a sample, in every layer.
    "vitpose_backbone": Family(top_k=1, width_of_hidden="mlp_ratio", least_experts=2),
    "zaya": Family(),
}

# Parents whose model type is not that of their text model without "_text", and the one name that transformers 4 has.
PARENTS = {
    "Glm4vMoe_text": "glm4v_moe_text",
    "inkling_mm_model": "inkling_text",
    "qwen3_omni_moe": "qwen3_omni_moe_text",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe_text",
    "step3p7": "step3p5",
}


def name_of(model_type: str) -> str:
    """Under which name FAMILIES knows a model type; "" if it does not."""
    names = (model_type, f"{model_type}_text", PARENTS.get(model_type, ""))
    return next((name for name in names if name in FAMILIES), "")


def family_of(model_type: str) -> Family | None:
    return FAMILIES.get(name_of(model_type))


def by_its_keys(scope: Scope) -> Family:
    """The family of a model type that is not listed, where its keys leave no doubt."""
    said = [rule for keys, rule in RULES.items() if any(scope.get(key) is not None for key in keys)]
    if len(said) > 1:
        names = ", ".join(key for keys in RULES for key in keys if scope.get(key) is not None)
        raise scope.error("MoE layers", f"unknown model type with more than one rule ({names}); keep one of them")
    counted = any(scope.get(key) is not None for key in SHARED_COUNT)
    widths = tuple(key for key in SHARED_WIDTH if scope.get(key) is not None)
    if counted and widths and scope.integer("shared experts", SHARED_COUNT, 0, MOST_SHARED) > 1:
        raise scope.error("shared experts", f"{widths[0]} may be the width of one or of all; drop it or the count")
    plain_width = not said and not counted and scope.get(WIDTH[0]) is None
    return Family(
        layers=said[0] if said else every_layer,
        width=DENSE_WIDTH if plain_width else WIDTH,
        shared=Shared(SHARED_COUNT if counted else 1, widths) if counted or widths else None,
        latent="moe_latent_size",
        switch=next((key for key in ("enable_moe_block", "is_moe") if key in scope.values), ""),
    )


SHARED_WIDTH = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_experts_intermediate_size",
    "shared_intermediate_size",
)
RULES: dict[tuple[str, ...], Rule] = {
    ("mlp_layer_types",): typed(None),
    ("first_k_dense_replace", "moe_layer_freq"): leading_dense_then_frequency(0),
    ("num_dense_layers",): leading_dense(0, "num_dense_layers"),
    ("decoder_sparse_step", "mlp_only_layers"): sparse_step(),
    ("moe_layers", "interleave_moe_layer_step"): listed,
    ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"): window,
    ("expert_layer_period", "expert_layer_offset"): period,
}
