from __future__ import annotations

from moe_conformance.model.families.configs import (
    MODEL,
    NO_NORM,
    NORM,
    NORM_OR_NOT,
    NUM_EXPERTS,
    OWN_WIDTH,
    SECOND_OF_TWO,
)
from moe_conformance.model.families.layers import sparse_step
from moe_conformance.model.families.naming import EACH, PACKED, ROUTER, Names
from moe_conformance.model.families.record import Block, Config, Method, Record, Sizes, Tiny, Variant, Wrapper
from moe_conformance.model.families.words import norm

RECORD = Record(
    model_type="qwen3_omni_moe_text",
    also=("qwen3_omni_moe_thinker",),
    slug="qwen3-omni-thinker",
    config_class="Qwen3OmniMoeTextConfig",
    wrapper=Wrapper("Qwen3OmniMoeConfig", path=("thinker_config", "text_config")),
    sizes=Sizes(layers=sparse_step(), least_experts=1),
    method=Method(norm(True)),
    names=Names(EACH + ROUTER, PACKED, prefixes={"qwen3_omni_moe": "thinker.model."}),
    config=MODEL | NUM_EXPERTS | OWN_WIDTH | SECOND_OF_TWO,
    ways=NORM_OR_NOT,
    block=Block(NORM),
    variants={"no-norm": Variant(NO_NORM)},
    captured=("nested",),
    configs=(Config("no-experts", kind="dense", keys={"num_experts": 0}),),
    tiny=Tiny("Qwen3OmniMoeThinkerForConditionalGeneration", config_class="Qwen3OmniMoeThinkerConfig"),
)
