from __future__ import annotations

from moe_conformance.model.families.bounds import MOST_ROWS
from moe_conformance.model.families.configs import BIASED_ROUTER, EXPERTS, HEADS, HIDDEN, LAYERS, WIDTH
from moe_conformance.model.families.keys import Key
from moe_conformance.model.families.layers import step_from_one
from moe_conformance.model.families.naming import Names, Stack, not_gated, one
from moe_conformance.model.families.record import Block, Config, Method, Record, Sizes, Tiny
from moe_conformance.model.families.words import INPUT, activation, bias, count

RECORD = Record(
    model_type="switch_transformers",
    config_class="SwitchTransformersConfig",
    # SwitchTransformersTop1Router always takes one.
    sizes=Sizes(
        layers=step_from_one("decoder_sparse_step", "num_sparse_decoder_layers"),
        num_layers=("num_decoder_layers",),
        top_k=1,
        width=("d_ff",),
        encoder=(step_from_one("encoder_sparse_step", "num_sparse_encoder_layers"), ("num_layers",), ("d_ff",)),
        nulls={"num_decoder_layers": ("num_layers", None)},
    ),
    # Scores of a float32 softmax, rounded to the model's dtype before it chooses.
    method=Method(
        {**INPUT, "capacity": {"tokens": count("expert_capacity", 64, 0, MOST_ROWS)}},
        {**bias("router_bias"), "dtype": Key("router_dtype", "float32", {"float32": "float32"})},
        {**activation("dense_act_fn", "relu"), "gated": False},
    ),
    dead=("add_router_probs", "router_jitter_noise"),
    names=Names(
        not_gated("mlp.experts.expert_{e}", "experts", "wi", "wo")
        + one("mlp.router.classifier.weight", "router.proj")
        + one("mlp.router.classifier.bias", "router.bias"),
        prefix="",
        stacks=(Stack("decoder.block", "layer.2."), Stack("encoder.block", "layer.1.", canonical="encoder.layers")),
    ),
    config={
        "d_model": HIDDEN,
        "d_ff": WIDTH,
        "num_heads": HEADS,
        "num_layers": 14,
        "num_sparse_encoder_layers": 2,
        "num_decoder_layers": LAYERS,
        "num_sparse_decoder_layers": 3,
        "num_experts": EXPERTS,
    },
    ways=(BIASED_ROUTER | {"dense_act_fn": "gelu"}, {"router_bias": False}),
    block=Block(
        {
            "d_kv": 8,
            "num_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "expert_capacity": 2,
            "router_bias": True,
        },
        grouped=False,
    ),
    configs=(
        Config("every-layer", keys={"num_sparse_decoder_layers": 9}),
        Config("dense-decoder", keys={"num_sparse_decoder_layers": 10}),
    ),
    tiny=Tiny(
        "SwitchTransformersForConditionalGeneration",
        keys={"d_ff": WIDTH, "num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 3},
    ),
    sample="core",
)
