"""Routing methods of models by a short name, and the sizes that they come in. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from moe_conformance.model.specs import Capacity, RoutingSpec

# Name -> the method with one expert a token. Families whose routers are these, as of transformers 5.23.
METHODS: Mapping[str, RoutingSpec] = {
    # Qwen2-MoE and OLMoE without norm_topk_prob, Jamba.
    "plain": RoutingSpec(1),
    # Mixtral, Qwen3-MoE.
    "renorm": RoutingSpec(1, renormalize="sum"),
    "gemma4": RoutingSpec(1, renormalize="sum", per_expert_scale=True),
    # DeepSeek-V3, GLM-4-MoE, Kimi-K2, Nemotron-H.
    "deepseek-v3": RoutingSpec(
        1,
        score="sigmoid",
        selection_bias=True,
        groups=8,
        top_groups=4,
        group_score="top2_sum",
        renormalize="sum",
        epsilon=1e-20,
        scale=2.5,
    ),
    # DeepSeek-V2: experts of other groups count as 0.
    "deepseek-v2": RoutingSpec(1, groups=8, top_groups=3, group_mask=0.0, scale=16.0),
    # Mistral-Large-4.
    "softmax-groups": RoutingSpec(
        1,
        groups=8,
        top_groups=4,
        group_score="top2_sum",
        group_mask=0.0,
        renormalize="sum",
        epsilon=1e-20,
        scale=2.5,
    ),
    # AFMoE, HY-V3.
    "biased": RoutingSpec(1, score="sigmoid", selection_bias=True, renormalize="sum", epsilon=1e-20, scale=2.5),
    # LFM2-MoE: the epsilon is large, scores are in the model's dtype.
    "lfm2": RoutingSpec(
        1, score="sigmoid", score_dtype="input", selection_bias=True, renormalize="sum", epsilon=1e-6, scale=2.5
    ),
    # ERNIE 4.5: a softmax with a bias, and a floor under the sum.
    "ernie": RoutingSpec(1, selection_bias=True, renormalize="sum", floor=1e-12),
    # gpt-oss: a softmax of the chosen logits alone, in the model's dtype.
    "chosen": RoutingSpec(1, score_dtype="input", select_on="logits"),
    # Granite MoE, JetMoE: the same in float32.
    "chosen-fp32": RoutingSpec(1, select_on="logits"),
    "llama4": RoutingSpec(1, score="sigmoid", select_on="logits"),
    "deepseek-v4": RoutingSpec(
        1, score="sqrt_softplus", score_dtype="input", selection_bias=True, renormalize="sum", epsilon=1e-20, scale=1.5
    ),
    "deepseek-v4-hash": RoutingSpec(
        1, score="sqrt_softplus", score_dtype="input", selector="table", renormalize="sum", epsilon=1e-20, scale=1.5
    ),
    "laguna": RoutingSpec(1, logit_softcap=5.0, score="sigmoid", selection_bias=True, renormalize="sum"),
    "muse-spark": RoutingSpec(
        1, logit_scale=1.5, score="sigmoid", selection_bias=True, renormalize="sum", epsilon=1e-15, scale=2.5
    ),
    "longcat": RoutingSpec(1, selection_bias=True, scale=6.0, identity_experts=64),
    "inkling": RoutingSpec(1, score="sigmoid", selection_bias=True, scale=2.5, global_scale=True, shared_classes=2),
    "zaya": RoutingSpec(1, score_dtype="input", selection_bias=True, skip_expert=True),
    "phimoe": RoutingSpec(1, score_dtype="input", selector="sparsemixer", select_on="logits", jitter=0.01),
    "dbrx": RoutingSpec(1, score_dtype="input", renormalize="norm", norm_order=2.0),
    "doge": RoutingSpec(1, score_dtype="input", selector="product_keys", select_on="logits", renormalize="sum"),
    "switch": RoutingSpec(1, capacity=Capacity(tokens=4)),
    # Without a number: twice an expert's even share of the tokens.
    "switch-share": RoutingSpec(1, capacity=Capacity()),
    "nllb": RoutingSpec(
        1,
        renormalize="sum",
        floor=1.1920928955078125e-07,
        capacity=Capacity(fraction=0.25, per="batch", by_weight=True, renormalize_before=True),
    ),
}


def method(name: str, top_k: int) -> RoutingSpec:
    """The method of that name, choosing top_k experts."""
    return replace(METHODS[name], top_k=top_k)


# E and K of models: Qwen3, GLM-4.5 and Gemma 4; DeepSeek-V3; Kimi-K2; Nemotron-3-Super and Qwen3-Next; and one wider
# than every model so far, beyond 512 experts and not a power of two.
REAL_SIZES = ((128, 8), (256, 8), (384, 8), (512, 22), (896, 16))
# The methods that engines have kernels for, at each of the sizes.
AT_REAL_SIZES = ("plain", "renorm", "gemma4", "biased", "deepseek-v3", "deepseek-v2", "chosen", "deepseek-v4")
# Every other method at E and K of its model, and in `at_real_sizes`.
AT_OWN_SIZES: Mapping[str, tuple[int, int]] = {
    "softmax-groups": (256, 8),
    "lfm2": (64, 4),
    "ernie": (64, 6),
    "chosen-fp32": (40, 8),
    "llama4": (16, 1),
    "deepseek-v4-hash": (256, 6),
    "laguna": (256, 8),
    "muse-spark": (128, 8),
    "longcat": (512, 12),
    "inkling": (256, 6),
    "zaya": (16, 1),
    "phimoe": (16, 2),
    "dbrx": (16, 4),
    "doge": (64, 8),
    "switch": (8, 1),
    "switch-share": (8, 1),
    "nllb": (8, 2),
}

# Methods that choose a number of experts of their own, whatever else the model chooses.
_OWN_TOP_K: Mapping[str, int] = {"llama4": 1, "zaya": 1, "switch": 1, "switch-share": 1, "phimoe": 2, "nllb": 2}


def at_real_sizes(name: str) -> tuple[tuple[int, int], ...]:
    """E and K of REAL_SIZES as this method has them; product keys are of E that are squares."""
    sizes = ((experts, _OWN_TOP_K.get(name, top_k)) for experts, top_k in REAL_SIZES)
    keys = METHODS[name].selector == "product_keys"
    return tuple(size for size in sizes if not keys or math.isqrt(size[0]) ** 2 == size[0])
