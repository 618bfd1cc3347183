from __future__ import annotations

from moe_conformance.model.families.configs import EXPERTS, HEADS, HIDDEN, LAYERS, TOP_K, WIDTH
from moe_conformance.model.families.keys import Key
from moe_conformance.model.families.layers import WHAT
from moe_conformance.model.families.naming import Names, Piece, Stack
from moe_conformance.model.families.record import Block, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import ACTIVATIONS, INPUT

_FFN = {"moe_num_experts": 12, "moe_top_k": 5, "ffn_hidden_size": 64}
_PUBLISHED = "every published config of DBRX normalises by the sum"

RECORD = Record(
    model_type="dbrx",
    config_class="DbrxConfig",
    sizes=Sizes(
        experts_under="ffn_config",
        width=("ffn_hidden_size",),
        nulls={"ffn_config": ("", {"moe_num_experts": 4, "moe_top_k": 1, "ffn_hidden_size": 3584})},
    ),
    method=Method(
        {
            **INPUT,
            "renormalize": Key("moe_normalize_expert_weights", 1.0, lambda p: "no" if p is None else "norm"),
            "norm_order": Key("moe_normalize_expert_weights", 1.0, lambda p: 1.0 if p is None else p),
        },
        experts={
            "activation": lambda scope, layer: Key("name", "silu", ACTIVATIONS).read(
                scope.below(WHAT, "ffn_act_fn"), layer
            )
        },
    ),
    dead=("moe_jitter_eps",),
    names=Names(
        (
            Piece("ffn.experts.mlp.w1", "experts.w13", half=0, ops=("stacked",)),
            Piece("ffn.experts.mlp.v1", "experts.w13", half=1, ops=("stacked",)),
            Piece("ffn.experts.mlp.w2", "experts.w2", ops=("transposed", "stacked")),
            Piece("ffn.router.layer.weight", "router.proj"),
        ),
        prefix="transformer.",
        stacks=(Stack("blocks"),),
    ),
    config={
        "n_layers": LAYERS,
        "d_model": HIDDEN,
        "n_heads": HEADS,
        "attn_config": {"rope_theta": 10000.0},
        "ffn_config": {"moe_num_experts": EXPERTS, "moe_top_k": TOP_K, "ffn_hidden_size": WIDTH},
    },
    ways=(
        {"moe_normalize_expert_weights": 2.0, "ffn_act_fn": {"name": "gelu"}},
        {"moe_normalize_expert_weights": None},
    ),
    block=Block({"ffn_config": {**_FFN, "moe_normalize_expert_weights": 1.0}}, grouped=False),
    variants={
        "order-2": Variant({"ffn_config": {**_FFN, "moe_normalize_expert_weights": 2.0}}, lenient=_PUBLISHED),
        "no-norm": Variant({"ffn_config": {**_FFN, "moe_normalize_expert_weights": None}}, lenient=_PUBLISHED),
    },
    captured=("",),
    tiny=Tiny(
        "DbrxForCausalLM",
        keys={
            "attn_config.rope_theta": 10000.0,
            "attn_config.clip_qkv": 8.0,
            "attn_config.kv_n_heads": 2,
            "ffn_config.ffn_hidden_size": WIDTH,
        },
    ),
)
