from __future__ import annotations

from moe_conformance.model.families.configs import (
    MODEL,
    NO_NORM,
    NO_SUCH,
    NORM,
    NORM_OR_NOT,
    NUM_EXPERTS,
    OWN_WIDTH,
    SECOND_OF_TWO,
)
from moe_conformance.model.families.layers import sparse_step
from moe_conformance.model.families.naming import EACH, PACKED, ROUTER, Names
from moe_conformance.model.families.record import Block, Config, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import norm

RECORD = Record(
    model_type="qwen3_moe",
    config_class="Qwen3MoeConfig",
    sizes=Sizes(layers=sparse_step(), least_experts=1),
    method=Method(norm(False)),
    names=Names(EACH + ROUTER, PACKED),
    config=MODEL | NUM_EXPERTS | OWN_WIDTH | SECOND_OF_TWO,
    ways=NORM_OR_NOT,
    block=Block(NORM),
    variants={"no-norm": Variant(NO_NORM), "gelu-tanh": Variant({"hidden_act": "gelu_pytorch_tanh"})},
    configs=(
        Config("hub", form="plain"),
        Config(
            "two-counts",
            kind="refused",
            keys={"num_local_experts": 13},
            form="plain",
            names=("num_experts", "num_local_experts"),
            lenient=NO_SUCH,
        ),
        Config("no-experts", kind="dense", keys={"num_experts": 0}),
    ),
    captured=("", "hub"),
    tiny=Tiny("Qwen3MoeForCausalLM"),
)
