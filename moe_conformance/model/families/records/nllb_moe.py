from __future__ import annotations

from moe_conformance.model.families.configs import BIASED_ROUTER, EXPERTS, HEADS, HIDDEN, LAYERS, WIDTH
from moe_conformance.model.families.keys import Key
from moe_conformance.model.families.layers import step_to_last
from moe_conformance.model.families.naming import Names, Piece, Stack, one
from moe_conformance.model.families.record import Block, Config, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import ALWAYS, INPUT, activation, bias, flag

RECORD = Record(
    model_type="nllb-moe",
    config_class="NllbMoeConfig",
    # NllbMoeTop2Router always takes two.
    sizes=Sizes(
        layers=step_to_last("decoder_sparse_step"),
        num_layers=("decoder_layers",),
        top_k=2,
        width=("decoder_ffn_dim",),
        encoder=(step_to_last("encoder_sparse_step"), ("encoder_layers",), ("encoder_ffn_dim",)),
    ),
    # Scores of a float32 softmax, rounded to the model's dtype before they are normalised. The floor is the epsilon of
    # float32. In evaluation, too, outputs shrink by the share that training drops.
    method=Method(
        Key(
            "second_expert_policy",
            "all",
            {
                "all": {
                    **ALWAYS,
                    **INPUT,
                    "floor": 2.0 ** (-23),
                    "capacity": {
                        "per": "batch",
                        "tokens": Key("expert_capacity", 64, lambda tokens: tokens, least=0, whole=True),
                        "fraction": Key("moe_eval_capacity_token_fraction", 1.0),
                        "renormalize_before": flag("normalize_router_prob_before_dropping", False),
                        "by_weight": flag("batch_prioritized_routing", False),
                    },
                }
            },
        ),
        {**bias("router_bias"), "dtype": Key("router_dtype", "float32", {"float32": "float32"})},
        {**activation("activation_function", "relu"), "gated": False, "bias": True},
        layer={"output_scale": Key("moe_token_dropout", 0.2, lambda dropped: 1 - (dropped or 0), least=0, most=1)},
    ),
    names=Names(
        tuple(
            Piece(f"ffn.experts.expert_{{e}}.{name}", f"experts.{target}")
            for name, target in (("fc1.weight", "w1"), ("fc1.bias", "b1"), ("fc2.weight", "w2"), ("fc2.bias", "b2"))
        )
        + one("ffn.router.classifier.weight", "router.proj")
        + one("ffn.router.classifier.bias", "router.bias"),
        stacks=(Stack("decoder.layers"), Stack("encoder.layers", canonical="encoder.layers", width="encoder_ffn_dim")),
    ),
    config={
        "d_model": HIDDEN,
        "decoder_layers": LAYERS,
        "decoder_ffn_dim": WIDTH,
        "decoder_attention_heads": HEADS,
        "decoder_sparse_step": 3,
        "encoder_layers": 14,
        "encoder_ffn_dim": WIDTH,
        "encoder_attention_heads": HEADS,
        "encoder_sparse_step": 6,
        "num_experts": EXPERTS,
    },
    ways=(
        BIASED_ROUTER
        | {"activation_function": "gelu", "moe_eval_capacity_token_fraction": 0.5, "moe_token_dropout": 0.25}
        | {"normalize_router_prob_before_dropping": True, "batch_prioritized_routing": False},
        {"expert_capacity": 5, "moe_eval_capacity_token_fraction": 0.0, "batch_prioritized_routing": True},
    ),
    block=Block(
        {
            "decoder_sparse_step": 2,
            "encoder_layers": 2,
            "encoder_sparse_step": 2,
            "moe_eval_capacity_token_fraction": 0.125,
            "second_expert_policy": "all",
            "router_bias": True,
        },
        grouped=False,
    ),
    variants={
        "own-capacity": Variant({"moe_eval_capacity_token_fraction": -1.0, "expert_capacity": 3}),
        "before": Variant({"normalize_router_prob_before_dropping": True}),
        "by-weight": Variant({"batch_prioritized_routing": True}),
    },
    configs=(
        Config("dense-encoder", keys={"encoder_sparse_step": 0}),
        Config("dense-decoder", keys={"decoder_sparse_step": 0, "encoder_ffn_dim": 26}),
    ),
    tiny=Tiny(
        "NllbMoeForConditionalGeneration",
        keys={
            "decoder_ffn_dim": WIDTH,
            "encoder_ffn_dim": WIDTH,
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 1,
            "expert_capacity": 8,
        },
    ),
)
