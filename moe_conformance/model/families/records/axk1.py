from __future__ import annotations

from moe_conformance.model.families.configs import (
    EPS,
    KNOBS,
    MODEL,
    N_ROUTED,
    N_SHARED,
    NO_NORM,
    NOAUX,
    NOAUX_TC,
    NORM_EPS,
    ONE_GROUP,
    OWN_WIDTH,
    TYPES,
)
from moe_conformance.model.families.layers import leading_dense_then_frequency, typed
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, SHARED_EXPERTS, Names, one
from moe_conformance.model.families.record import COUNTED, Block, Config, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import FLOAT32, epsilon, noaux

RECORD = Record(
    model_type="axk1",
    config_class="AXK1Config",
    sizes=Sizes(shared=COUNTED, layers=typed(leading_dense_then_frequency(1))),
    method=Method(noaux(2.5, 8, 4), FLOAT32, layer={"output_norm": epsilon("rms_norm_eps", 1e-06)}),
    names=Names(
        EACH + ROUTER + BIAS + SHARED_EXPERTS + one("post_mlp_layernorm.weight", "output.norm"),
        PACKED + one("mlp.post_mlp_layernorm.weight", "output.norm"),
    ),
    config=MODEL | N_ROUTED | OWN_WIDTH | ONE_GROUP | TYPES | N_SHARED,
    beside=NOAUX_TC,
    ways=(NOAUX[0] | NORM_EPS, NOAUX[1]),
    block=Block(KNOBS | {"rms_norm_eps": EPS}),
    variants={"no-norm": Variant(NO_NORM)},
    configs=(
        Config(
            "hub", keys={"first_k_dense_replace": 2, "moe_layer_freq": 3}, dropped=("mlp_layer_types",), form="plain"
        ),
        Config(
            "types-too-few",
            kind="refused",
            keys={"mlp_layer_types": ["dense", "sparse"]},
            form="plain",
            names=("mlp_layer_types",),
        ),
        Config(
            "types-unknown",
            kind="refused",
            keys={"mlp_layer_types": ["dense", "dense", "dense", "dense", "dense", "dense", "dense", "dense", "wide"]},
            form="plain",
            names=("mlp_layer_types",),
        ),
    ),
    tiny=Tiny("AXK1ForCausalLM", keys={"head_dim": 4}),
    sample="core",
)
