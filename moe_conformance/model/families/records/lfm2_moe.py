from __future__ import annotations

from moe_conformance.model.families.configs import MODEL, NO_NORM, NORM, NUM_EXPERTS, OWN_WIDTH, RESCALED, SCALED, Size
from moe_conformance.model.families.layers import leading_dense
from moe_conformance.model.families.naming import W1_W3_W2, Names, each, one, packed
from moe_conformance.model.families.record import Block, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import INPUT, flag, norm, scale

RECORD = Record(
    model_type="lfm2_moe",
    config_class="Lfm2MoeConfig",
    sizes=Sizes(layers=leading_dense(2, "num_dense_layers")),
    method=Method(
        {
            "score": "sigmoid",
            **INPUT,
            "selection_bias": flag("use_expert_bias", True),
            **norm(True),
            "epsilon": 1e-06,
            **scale(1.0),
        },
        experts={},
    ),
    names=Names(
        each("feed_forward.experts", *W1_W3_W2)
        + one("feed_forward.gate.weight", "router.proj")
        + one("feed_forward.expert_bias", "router.selection_bias"),
        packed("feed_forward.experts"),
    ),
    config=MODEL | NUM_EXPERTS | OWN_WIDTH | {"num_dense_layers": Size.LEADING, "layer_types": Size.ATTENTION},
    ways=(RESCALED | NORM | {"use_expert_bias": False}, RESCALED | NO_NORM | {"use_expert_bias": True}),
    block=Block(SCALED | NORM | {"use_expert_bias": True}),
    variants={"no-norm": Variant(NO_NORM), "no-bias": Variant({"use_expert_bias": False})},
    tiny=Tiny("Lfm2MoeForCausalLM", keys={"layer_types": ["conv", "full_attention", "conv"]}),
)
