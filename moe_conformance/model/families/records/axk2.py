from __future__ import annotations

from moe_conformance.model.families.configs import (
    KNOBS,
    MODEL,
    N_ROUTED,
    N_SHARED,
    NO_GROUPS,
    NO_NORM,
    NOAUX,
    OWN_WIDTH,
    RESCALED,
    TYPES,
)
from moe_conformance.model.families.layers import leading_dense_then_frequency, typed
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, SHARED_EXPERTS, Names
from moe_conformance.model.families.record import COUNTED, Block, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import FLOAT32, groups, noaux

RECORD = Record(
    model_type="axk2",
    config_class="AXK2Config",
    sizes=Sizes(shared=COUNTED, layers=typed(leading_dense_then_frequency(1))),
    method=Method({**noaux(2.5), **groups(None, None), "group_mask": 0.0}, FLOAT32),
    names=Names(EACH + ROUTER + BIAS + SHARED_EXPERTS, PACKED),
    config=MODEL | N_ROUTED | OWN_WIDTH | TYPES | N_SHARED,
    ways=(NOAUX[0], RESCALED | NO_NORM),
    # Experts outside the best groups count as 0: with a bias below 0 those would be as good.
    block=Block(KNOBS, bias=(0.125, 0.5, 0.0, 0.25, 0.0, 0.375, 0.5, 0.125, 0.0, 0.25, 0.5, 0.0)),
    variants={
        "no-norm": Variant(NO_NORM),
        # Experts outside the best groups count as 0, not as minus infinity: with four biases below -1 the seven others
        # of the five groups, and then both of the group left out, are the nine best.
        "zero-mask": Variant(
            {"num_experts_per_tok": 9, "n_group": 6, "topk_group": 5},
            lenient="biases below -1, which no published checkpoint is known to have",
            bias=(-2.0, 0.5, 0.5, -2.0, -2.0, 0.5, 0.5, -2.0, 0.5, 0.75, 0.5, 0.25),
        ),
        "no-groups": Variant(NO_GROUPS),
    },
    tiny=Tiny("AXK2ForCausalLM"),
    authority=(
        "transformers: experts outside the best groups count as 0, so that one is chosen where biases push "
        "all others below that; engines mask with minus infinity, and differ there alone"
    ),
)
