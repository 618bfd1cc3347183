from __future__ import annotations

from moe_conformance.model.families.configs import LIMIT, MODEL, NARROW, NUM_LOCAL, PLAIN_WIDTH, SQUARE, SWIGLU
from moe_conformance.model.families.naming import gpt_oss
from moe_conformance.model.families.record import DENSE_WIDTH, Config, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import CHOSEN, INPUT, SWIGLU_OAI

RECORD = Record(
    model_type="gpt_oss",
    config_class="GptOssConfig",
    sizes=Sizes(width=DENSE_WIDTH),
    method=Method({**CHOSEN, **INPUT}, {"bias": True}, {**SWIGLU_OAI, "bias": True}),
    dead=("hidden_act",),
    names=gpt_oss("interleaved"),
    config=MODEL | NUM_LOCAL | PLAIN_WIDTH,
    ways=(SWIGLU | {"hidden_act": "relu"},),
    variants={
        "square": Variant(SQUARE),
        "narrow": Variant(NARROW),
        "limit": Variant(
            {"swiglu_alpha": 1.5, "swiglu_limit": LIMIT}, lenient="every published config has a limit of 7 and no alpha"
        ),
    },
    configs=(Config("hub", kind="layers", form="plain"),),
    captured=("",),
    tiny=Tiny("GptOssForCausalLM"),
    sample="smoke",
)
