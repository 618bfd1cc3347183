from __future__ import annotations

from moe_conformance.model.families.configs import GELU, MODEL, NUM_EXPERTS, NUM_SHARED, OWN_WIDTH, SCALE, Size
from moe_conformance.model.families.layers import leading_dense
from moe_conformance.model.families.naming import EACH, PACKED, SHARED_EXPERTS, Names, one
from moe_conformance.model.families.record import COUNTED, Block, Method, Record, Sizes, Tiny
from moe_conformance.model.families.words import SIGMOID_EPS, scale

RECORD = Record(
    model_type="afmoe",
    config_class="AfmoeConfig",
    sizes=Sizes(shared=COUNTED, layers=leading_dense(1, "num_dense_layers")),
    method=Method({**SIGMOID_EPS, **scale(1.0, "route_scale")}),
    names=Names(
        EACH
        + one("mlp.router.gate.weight", "router.proj")
        + one("mlp.expert_bias", "router.selection_bias")
        + SHARED_EXPERTS,
        PACKED,
    ),
    config=MODEL | NUM_EXPERTS | OWN_WIDTH | NUM_SHARED | {"num_dense_layers": Size.LEADING},
    beside={"score_func": "sigmoid", "route_norm": True},
    ways=({"route_scale": 3.5} | GELU,),
    block=Block({"route_scale": SCALE}),
    tiny=Tiny("AfmoeForCausalLM"),
    authority=(
        "transformers, which reads neither route_norm, score_func nor groups: what published configs say "
        "there it takes for granted"
    ),
)
