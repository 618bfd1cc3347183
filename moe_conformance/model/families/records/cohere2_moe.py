from __future__ import annotations

from moe_conformance.model.families.configs import (
    DENSE,
    GELU,
    MODEL,
    NO_NORM,
    NORM,
    NUM_EXPERTS,
    NUM_SHARED,
    PLAIN_WIDTH,
    TYPES,
)
from moe_conformance.model.families.keys import Key
from moe_conformance.model.families.layers import leading_dense, typed
from moe_conformance.model.families.naming import EACH, PACKED, ROUTER, SHARED_EXPERTS, Names
from moe_conformance.model.families.record import (
    COUNTED,
    DENSE_WIDTH,
    Block,
    Config,
    Method,
    Record,
    Sizes,
    Tiny,
    Variant,
)
from moe_conformance.model.families.words import CHOSEN, INPUT, norm

RECORD = Record(
    model_type="cohere2_moe",
    config_class="Cohere2MoeConfig",
    sizes=Sizes(layers=typed(leading_dense(0, "first_k_dense_replace")), width=DENSE_WIDTH, shared=COUNTED),
    method=Method(
        Key(
            "expert_selection_fn",
            "softmax",
            {"softmax": CHOSEN, "sigmoid": {**CHOSEN, "score": "sigmoid", **INPUT, **norm(True)}},
        ),
        shared={"combine": Key("shared_expert_combination_strategy", "average", {"sum": "sum", "average": "average"})},
    ),
    names=Names(EACH + ROUTER + SHARED_EXPERTS, PACKED),
    config=MODEL | NUM_EXPERTS | PLAIN_WIDTH | TYPES | NUM_SHARED | {"prefix_dense_intermediate_size": DENSE},
    ways=(
        {"expert_selection_fn": "sigmoid", "shared_expert_combination_strategy": "sum"} | NO_NORM | GELU,
        {"expert_selection_fn": "sigmoid", "shared_expert_combination_strategy": "average"} | NORM,
        {"expert_selection_fn": "softmax"} | NO_NORM,
    ),
    block=Block(NORM | {"expert_selection_fn": "sigmoid", "shared_expert_combination_strategy": "average"}),
    variants={
        "no-norm": Variant(NO_NORM),
        "softmax": Variant({"expert_selection_fn": "softmax", "shared_expert_combination_strategy": "sum"}),
    },
    configs=(Config("hub", keys={"first_k_dense_replace": 4}, dropped=("mlp_layer_types",), form="plain"),),
    tiny=Tiny("Cohere2MoeForCausalLM"),
    sample="core",
    authority=(
        "transformers: scores in the dtype of the model, where engines take float32; either is within the bounds"
    ),
)
