from __future__ import annotations

from moe_conformance.model.families.configs import (
    GREEDY,
    GREEDY_SOFTMAX,
    GROUPS,
    LIMITED,
    MODEL,
    N_ROUTED,
    N_SHARED,
    NO_GROUPS,
    OWN_WIDTH,
    SCALED,
    TYPES,
)
from moe_conformance.model.families.keys import Key
from moe_conformance.model.families.layers import leading_dense, typed
from moe_conformance.model.families.naming import EACH, PACKED, ROUTER, SHARED_EXPERTS, Names
from moe_conformance.model.families.record import COUNTED, Block, Config, Method, Record, Sizes, Tiny, Variant, Wrapper
from moe_conformance.model.families.words import FLOAT32, bias, groups, scale

RECORD = Record(
    model_type="unlimited_ocr_text",
    config_class="UnlimitedOcrTextConfig",
    wrapper=Wrapper("UnlimitedOcrConfig"),
    sizes=Sizes(shared=COUNTED, layers=typed(leading_dense(1, "first_k_dense_replace"))),
    method=Method(
        Key(
            "topk_method",
            "greedy",
            {"greedy": scale(1.0), "group_limited_greedy": {**groups(None, None), "group_mask": 0.0, **scale(1.0)}},
        ),
        FLOAT32,
        shared_mlp=bias(),
    ),
    names=Names(EACH + ROUTER + SHARED_EXPERTS, PACKED),
    config=MODEL | N_ROUTED | OWN_WIDTH | TYPES | N_SHARED,
    beside=GREEDY_SOFTMAX,
    ways=(LIMITED, GREEDY),
    block=Block(GROUPS | SCALED | {"topk_method": "group_limited_greedy"}),
    variants={"greedy": Variant(NO_GROUPS | {"topk_method": "greedy"})},
    configs=(
        Config("language-config", form="plain", model_type="unlimited_ocr", below="language_config"),
        Config("hub", keys={"first_k_dense_replace": 4}, dropped=("mlp_layer_types",), form="plain"),
    ),
    tiny=Tiny(
        "UnlimitedOcrForConditionalGeneration", keys={"text_config.mlp_layer_types": ["dense", "sparse", "sparse"]}
    ),
)
