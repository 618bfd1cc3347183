from __future__ import annotations

from moe_conformance.model.families.configs import LIMIT, MODEL, NARROW, NUM_LOCAL, PLAIN_WIDTH, SQUARE, SWIGLU
from moe_conformance.model.families.naming import gpt_oss
from moe_conformance.model.families.record import DENSE_WIDTH, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import CHOSEN, FLOAT32, SWIGLU_OAI, top_k

RECORD = Record(
    model_type="openai_privacy_filter",
    config_class="OpenAIPrivacyFilterConfig",
    sizes=Sizes(width=DENSE_WIDTH),
    # Weights are divided by K, and the output is multiplied by it.
    method=Method(
        {**CHOSEN, "scale": lambda scope, layer: 1 / top_k(scope, layer)},
        {**FLOAT32, "bias": True},
        {**SWIGLU_OAI, **FLOAT32, "bias": True},
        layer={"output_scale": top_k},
    ),
    names=gpt_oss(),
    config=MODEL | NUM_LOCAL | PLAIN_WIDTH,
    ways=(SWIGLU,),
    variants={
        "square": Variant(SQUARE),
        "narrow": Variant(NARROW),
        "limit": Variant(
            {"swiglu_alpha": 1.5, "swiglu_limit": LIMIT}, lenient="every published config has a limit of 7 and no alpha"
        ),
    },
    tiny=Tiny("OpenAIPrivacyFilterForTokenClassification"),
)
