"""Building blocks for the configs of records: sizes that are filled in later, and groups of keys that families share.

One config of a family is used in several sizes: nine layers to read, two to compute, a tiny model to load. So a record
names its sizes, and `filled` replaces the names by numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

Keys = dict[str, Any]


class Size(Enum):
    """LEADING: how many dense layers come first. TYPES: "dense" or "sparse" for each layer. ATTENTION: full in each."""

    LAYERS = "layers"
    HIDDEN = "hidden size"
    HEADS = "attention heads"
    EXPERTS = "experts"
    TOP_K = "top-k"
    WIDTH = "width of an expert"
    DENSE = "width of a dense layer"
    SHARED = "width of a shared expert"
    LATENT = "latent width"
    LEADING = "leading dense layers"
    TYPES = "kind of each layer"
    ATTENTION = "attention of each layer"


# Nine layers to read. All sizes differ, and none is a class default, so that a value read from the wrong key shows.
# MoE layers 1, 4, 5, 6, 8: no leading block, no period.
TO_READ: Mapping[Size, Any] = {
    Size.LAYERS: 9,
    Size.HIDDEN: 40,
    Size.HEADS: 5,
    Size.EXPERTS: 11,
    Size.TOP_K: 3,
    Size.WIDTH: 24,
    Size.DENSE: 56,
    Size.SHARED: 22,
    Size.LATENT: 16,
    Size.LEADING: 4,
    Size.TYPES: ["dense", "sparse", "dense", "dense", "sparse", "sparse", "sparse", "dense", "sparse"],
    Size.ATTENTION: ["full_attention"] * 9,
}
# Two layers to compute. Where a family has groups: 12 experts in 4 groups of 3, of which 2 compete, 5 experts chosen.
# Widths that experts read and compute are multiples of 32, because vLLM's CPU kernels take no others. Other widths are
# multiples of 8, because grouped_mm wants rows of a multiple of 16 bytes.
TO_COMPUTE: Mapping[Size, Any] = {
    Size.LAYERS: 2,
    Size.HIDDEN: 96,
    Size.HEADS: 3,
    Size.EXPERTS: 12,
    Size.TOP_K: 5,
    Size.WIDTH: 64,
    Size.DENSE: 56,
    Size.SHARED: 40,
    Size.LATENT: 32,
    Size.LEADING: 1,
    Size.TYPES: ["dense", "sparse"],
    Size.ATTENTION: ["full_attention"] * 2,
}


def filled(value: Any, sizes: Mapping[Size, Any]) -> Any:
    """The value with numbers in place of all sizes in it."""
    if isinstance(value, Size):
        found = sizes[value]
        return list(found) if isinstance(found, list) else found
    if isinstance(value, Mapping):
        return {key: filled(entry, sizes) for key, entry in value.items()}
    return [filled(entry, sizes) for entry in value] if isinstance(value, list) else value


LAYERS, HIDDEN, HEADS, EXPERTS, TOP_K = Size.LAYERS, Size.HIDDEN, Size.HEADS, Size.EXPERTS, Size.TOP_K
WIDTH, DENSE, SHARED, LATENT = Size.WIDTH, Size.DENSE, Size.SHARED, Size.LATENT

MODEL: Keys = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
}
# The number of layers is derived from another key.
MODEL_LAYERS_DERIVED: Keys = {key: size for key, size in MODEL.items() if key != "num_hidden_layers"}
NUM_EXPERTS: Keys = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
NUM_LOCAL: Keys = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
N_ROUTED: Keys = {"n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K}
PER_TOKEN: Keys = {"num_experts": EXPERTS, "num_experts_per_token": TOP_K}
TOP_K_EXPERTS: Keys = {"num_experts": EXPERTS, "top_k_experts": TOP_K}
MOE_K: Keys = {"moe_num_experts": EXPERTS, "moe_k": TOP_K}

MOE_WIDTH: Keys = {"moe_intermediate_size": WIDTH}
OWN_WIDTH: Keys = {"moe_intermediate_size": WIDTH, "intermediate_size": DENSE}
PLAIN_WIDTH: Keys = {"intermediate_size": WIDTH}

TYPES: Keys = {"mlp_layer_types": Size.TYPES}
FIRST_K: Keys = {"first_k_dense_replace": Size.LEADING}
SECOND_OF_TWO: Keys = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}

N_SHARED: Keys = {"n_shared_experts": 2}
NUM_SHARED: Keys = {"num_shared_experts": 2}
MOE_SHARED: Keys = {"moe_num_shared_experts": 2}
ONE_SHARED: Keys = {"shared_expert_intermediate_size": SHARED}
WIDE_SHARED: Keys = {"shared_intermediate_size": SHARED}

# One group: 11 experts cannot be divided.
ONE_GROUP: Keys = {"n_group": 1, "topk_group": 1}

# Values to compute with. Gate and up projections of the inputs spread by about 1.5, so the limit clamps half of them;
# the epsilon of norms is large enough to show.
LIMIT, EPS, SCALE = 0.75, 0.0625, 2.5
GROUPS: Keys = {"n_group": 4, "topk_group": 2}
SCALED: Keys = {"routed_scaling_factor": SCALE}
NORM: Keys = {"norm_topk_prob": True}
NO_NORM: Keys = {"norm_topk_prob": False}
KNOBS: Keys = GROUPS | SCALED | NORM
NO_GROUPS: Keys = {"n_group": None, "topk_group": None}

# Ways.
GROUPED: Keys = {"n_routed_experts": 12} | GROUPS
OTHERWISE_GROUPED: Keys = {"n_routed_experts": 12, "n_group": 3, "topk_group": 1}
RESCALED: Keys = {"routed_scaling_factor": 3.5}
GELU: Keys = {"hidden_act": "gelu"}
TANH: Keys = {"hidden_act": "gelu_pytorch_tanh"}
MLP_BIAS: Keys = {"mlp_bias": True}
SWIGLU: Keys = {"swiglu_alpha": 1.25, "swiglu_limit": 6.5}
BIASED_ROUTER: Keys = {"router_bias": True, "expert_capacity": 5}
NORM_EPS: Keys = {"rms_norm_eps": 3e-5}
NOAUX = (GROUPED | RESCALED | NORM | GELU, OTHERWISE_GROUPED | RESCALED | NO_NORM)
NORM_OR_NOT = (NORM | GELU, NO_NORM | TANH)
ONLY_ACT = (GELU, TANH)
LIMITED: Keys = {"topk_method": "group_limited_greedy"} | GROUPED | RESCALED | MLP_BIAS | GELU
GREEDY: Keys = {"topk_method": "greedy"} | GROUPED | RESCALED
KIMI: Keys = {"num_experts": 12, "num_expert_group": 4, "topk_group": 2} | RESCALED
# Keys that every published config of these models leaves at the class default: the activation, biases of the experts'
# projections, noise that routers add in training. An engine may hard-code the default.
UNPUBLISHED = frozenset(
    {
        *("hidden_act", "hidden_activation", "mlp_hidden_act", "activation_function", "dense_act_fn", "ffn_act_fn"),
        *("mlp_bias", "router_jitter_noise"),
    }
)

NO_SUCH = "no published config has such a value, or a second spelling that differs"

# Keys that published configs carry as well.
NOAUX_TC: Keys = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
GREEDY_SOFTMAX: Keys = {"topk_method": "greedy", "scoring_func": "softmax"}

# Hidden sizes at which guessing a layout from a shape goes wrong: [2F, H] square, and 2F < H, as most models have.
SQUARE: Keys = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
NARROW: Keys = {"hidden_size": 160, "num_attention_heads": 5, "num_key_value_heads": 5}
