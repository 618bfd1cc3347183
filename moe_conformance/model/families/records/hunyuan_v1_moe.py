from __future__ import annotations

from moe_conformance.model.families.configs import EXPERTS, MODEL, ONLY_ACT, PLAIN_WIDTH, TOP_K
from moe_conformance.model.families.naming import EACH, PACKED, Names, one, shared
from moe_conformance.model.families.record import (
    DENSE_WIDTH,
    ONE_AS_WIDE,
    Block,
    Config,
    Method,
    Record,
    Sizes,
    Tiny,
    Variant,
)
from moe_conformance.model.families.words import ALWAYS

RECORD = Record(
    model_type="hunyuan_v1_moe",
    config_class="HunYuanMoEV1Config",
    sizes=Sizes(width=DENSE_WIDTH, shared=ONE_AS_WIDE),
    method=Method(ALWAYS),
    names=Names(EACH + one("mlp.gate.wg.weight", "router.proj") + shared("mlp.shared_mlp"), PACKED),
    config=MODEL | {"num_experts": EXPERTS, "moe_topk": TOP_K} | PLAIN_WIDTH | {"head_dim": 8},
    beside={"use_mixed_mlp_moe": True},
    ways=ONLY_ACT,
    block=Block({"moe_topk": [2, 5]}),
    variants={"first": Variant(layer=0)},
    configs=(
        Config("top-k-list", keys={"moe_topk": [2, 3, 2, 2, 3, 3, 2, 2, 3]}),
        Config("even-list", keys={"moe_topk": [3, 3, 3, 3, 3, 3, 3, 3, 3]}),
        Config(
            "one-top-k-above-experts",
            kind="refused",
            keys={"moe_topk": [2, 2, 2, 2, 2, 2, 2, 2, 12]},
            form="plain",
            names=("moe_topk",),
        ),
        Config(
            "short-list", kind="refused", keys={"moe_topk": [2, 3, 2, 2, 3, 3, 2, 2]}, form="plain", names=("moe_topk",)
        ),
    ),
    captured=("", "top-k-list"),
    tiny=Tiny("HunYuanMoEV1ForCausalLM"),
)
