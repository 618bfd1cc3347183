from __future__ import annotations

from moe_conformance.model.families.configs import GELU, MLP_BIAS, MODEL, NO_NORM, NORM, NUM_EXPERTS, PLAIN_WIDTH
from moe_conformance.model.families.naming import Names, mlp, one
from moe_conformance.model.families.record import (
    DENSE_WIDTH,
    Block,
    Config,
    Method,
    Record,
    Shared,
    Sizes,
    Tiny,
    Variant,
)
from moe_conformance.model.families.words import CHOSEN, INPUT, activation, bias, dense_width, norm

RECORD = Record(
    model_type="doge",
    config_class="DogeConfig",
    # An expert is one neuron: a row of the down table for its input, one of the up table for its output. The dense MLP
    # beside them is always on.
    sizes=Sizes(width=1, shared=Shared(1, DENSE_WIDTH), switch="is_moe"),
    method=Method(
        {**CHOSEN, **INPUT, "selector": "product_keys", **norm(False)},
        experts={**activation(), "gated": False, "weight_on": "w2_input"},
        dense={},
        dense_mlp={**activation(), **bias(), "width": dense_width},
    ),
    names=Names(
        one("mlp.router_gate.weight", "router.proj")
        + one("mlp.down_embed.weight", "experts.w1", "stacked")
        + one("mlp.up_embed.weight", "experts.w2", "transposed", "stacked")
        + mlp("mlp", "dense")
    ),
    config=MODEL | NUM_EXPERTS | PLAIN_WIDTH | {"is_moe": True},
    ways=(NORM | MLP_BIAS | GELU, NO_NORM),
    # 12 experts would leave the 3 x 3 pairs of keys that its floor of a root gives.
    block=Block(NORM | {"num_experts": 49}, grouped=False, given=False),
    variants={"no-norm": Variant(NO_NORM)},
    configs=(Config("dense", kind="dense", keys={"is_moe": False}),),
    tiny=Tiny("DogeForCausalLM", keys={"is_moe": True, "num_experts": 16}),
)
