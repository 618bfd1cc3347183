from __future__ import annotations

from moe_conformance.model.families.configs import (
    FIRST_K,
    GREEDY,
    GREEDY_SOFTMAX,
    GROUPS,
    LIMITED,
    MODEL,
    N_ROUTED,
    N_SHARED,
    NO_GROUPS,
    NO_NORM,
    NORM,
    OWN_WIDTH,
    SCALED,
)
from moe_conformance.model.families.keys import Key
from moe_conformance.model.families.layers import leading_dense
from moe_conformance.model.families.naming import EACH, PACKED, ROUTER, SHARED_EXPERTS, Names
from moe_conformance.model.families.record import COUNTED, Block, Config, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import FLOAT32, bias, groups, scale

_NO_PUBLISHED = "DeepSeek's own code renormalises here, and no published config says so"

RECORD = Record(
    model_type="deepseek_v2",
    config_class="DeepseekV2Config",
    sizes=Sizes(shared=COUNTED, layers=leading_dense(0, "first_k_dense_replace")),
    method=Method(
        Key(
            "topk_method",
            "greedy",
            {"greedy": scale(1.0), "group_limited_greedy": {**groups(None, None), "group_mask": 0.0, **scale(1.0)}},
        ),
        FLOAT32,
        shared_mlp=bias(),
    ),
    dead=("norm_topk_prob",),
    names=Names(EACH + ROUTER + SHARED_EXPERTS, PACKED),
    config=MODEL | N_ROUTED | OWN_WIDTH | FIRST_K | N_SHARED,
    beside=GREEDY_SOFTMAX,
    disputed={"norm_topk_prob": _NO_PUBLISHED},
    ways=(LIMITED | NORM, GREEDY | NO_NORM),
    block=Block(GROUPS | SCALED | {"topk_method": "group_limited_greedy"}),
    variants={
        "greedy": Variant(NO_GROUPS | {"topk_method": "greedy"}),
        "dead-norm": Variant(NORM, lenient=_NO_PUBLISHED),
    },
    configs=(
        Config("without-top-k", kind="refused", keys={"num_experts_per_tok": None}, names=("num_experts_per_tok",)),
    ),
    tiny=Tiny("DeepseekV2ForCausalLM"),
    authority=(
        "transformers, which leaves norm_topk_prob unread; DeepSeek's own code renormalises where it is true, "
        "which no published config says"
    ),
)
