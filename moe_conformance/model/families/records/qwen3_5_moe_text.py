from __future__ import annotations

from moe_conformance.model.families.configs import MODEL, MOE_WIDTH, NUM_EXPERTS, ONE_SHARED, ONLY_ACT
from moe_conformance.model.families.naming import EACH, PACKED, ROUTER, SHARED_GATED, Names
from moe_conformance.model.families.record import ONE_OF_ITS_OWN_WIDTH, Method, Record, Sizes, Tiny, Wrapper
from moe_conformance.model.families.words import ALWAYS

RECORD = Record(
    model_type="qwen3_5_moe_text",
    config_class="Qwen3_5MoeTextConfig",
    wrapper=Wrapper("Qwen3_5MoeConfig"),
    sizes=Sizes(shared=ONE_OF_ITS_OWN_WIDTH),
    method=Method(ALWAYS, shared={"gate": True}),
    names=Names(EACH + ROUTER + SHARED_GATED, PACKED, prefixes={"qwen3_5_moe": "model.language_model."}),
    config=MODEL | NUM_EXPERTS | MOE_WIDTH | ONE_SHARED,
    ways=ONLY_ACT,
    tiny=Tiny("Qwen3_5MoeForConditionalGeneration", text_class="Qwen3_5MoeForCausalLM"),
)
