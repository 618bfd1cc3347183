from __future__ import annotations

from moe_conformance.model.families.configs import MODEL, MOE_WIDTH, NO_NORM, NORM, NUM_EXPERTS, ONE_SHARED
from moe_conformance.model.families.naming import EACH, PACKED, ROUTER, SHARED_GATED, Names
from moe_conformance.model.families.record import (
    ONE_OF_ITS_OWN_WIDTH,
    Block,
    Method,
    Record,
    Sizes,
    Tiny,
    Variant,
    Wrapper,
)
from moe_conformance.model.families.words import norm

RECORD = Record(
    model_type="qwen4_exp_text",
    config_class="Qwen4ExpTextConfig",
    wrapper=Wrapper("Qwen4ExpConfig"),
    sizes=Sizes(shared=ONE_OF_ITS_OWN_WIDTH),
    method=Method(norm(True), shared={"gate": True}),
    names=Names(EACH + ROUTER + SHARED_GATED, PACKED, prefixes={"qwen4_exp": "model.language_model."}),
    config=MODEL
    | NUM_EXPERTS
    | MOE_WIDTH
    | ONE_SHARED
    | {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "head_dim": 8,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    ways=(NORM, NO_NORM),
    block=Block(NORM),
    variants={"no-norm": Variant(NO_NORM)},
    tiny=Tiny("Qwen4ExpForConditionalGeneration", text_class="Qwen4ExpForCausalLM"),
)
