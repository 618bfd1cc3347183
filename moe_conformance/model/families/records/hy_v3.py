from __future__ import annotations

from moe_conformance.model.families.configs import (
    GELU,
    MLP_BIAS,
    MODEL,
    NUM_EXPERTS,
    NUM_SHARED,
    OWN_WIDTH,
    SCALE,
    TYPES,
)
from moe_conformance.model.families.layers import leading_dense, typed
from moe_conformance.model.families.naming import EACH, PACKED, ROUTER, SHARED_EXPERTS, Names, one, shared
from moe_conformance.model.families.record import COUNTED, Block, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import FLOAT32, SIGMOID_EPS, bias, flag, scale

RECORD = Record(
    model_type="hy_v3",
    config_class="HYV3Config",
    sizes=Sizes(shared=COUNTED, layers=typed(leading_dense(1))),
    method=Method(
        {**SIGMOID_EPS, **scale(2.826, "router_scaling_factor")},
        FLOAT32,
        shared_mlp=bias(),
        layer={"combine_dtype": flag("enable_moe_fp32_combine", True, "float32", "input")},
    ),
    names=Names(
        EACH
        + one("mlp.router.gate.weight", "router.proj")
        + one("mlp.expert_bias", "router.selection_bias")
        + shared("mlp.shared_mlp"),
        PACKED + ROUTER + one("mlp.e_score_correction_bias", "router.selection_bias") + SHARED_EXPERTS,
    ),
    config=MODEL | NUM_EXPERTS | OWN_WIDTH | TYPES | NUM_SHARED,
    ways=(
        {"router_scaling_factor": 3.5, "enable_moe_fp32_combine": True} | MLP_BIAS | GELU,
        {"enable_moe_fp32_combine": False},
    ),
    block=Block({"router_scaling_factor": SCALE}),
    variants={"input-combine": Variant({"enable_moe_fp32_combine": False})},
    tiny=Tiny("HYV3ForCausalLM"),
)
