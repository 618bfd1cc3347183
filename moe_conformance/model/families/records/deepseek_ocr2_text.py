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
from moe_conformance.model.families.layers import typed
from moe_conformance.model.families.naming import EACH, PACKED, ROUTER, SHARED_EXPERTS, Names
from moe_conformance.model.families.record import COUNTED, Block, Method, Record, Sizes, Tiny, Variant, Wrapper
from moe_conformance.model.families.words import FLOAT32, bias, groups, scale

RECORD = Record(
    model_type="deepseek_ocr2_text",
    config_class="DeepseekOcr2TextConfig",
    wrapper=Wrapper("DeepseekOcr2Config"),
    sizes=Sizes(shared=COUNTED, layers=typed(None)),
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
    tiny=Tiny(
        "DeepseekOcr2ForConditionalGeneration", keys={"text_config.mlp_layer_types": ["dense", "sparse", "sparse"]}
    ),
)
