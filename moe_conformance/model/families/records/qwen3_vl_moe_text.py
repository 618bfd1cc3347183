from __future__ import annotations

from moe_conformance.model.families.configs import (
    MODEL,
    NARROW,
    NUM_EXPERTS,
    ONLY_ACT,
    OWN_WIDTH,
    SECOND_OF_TWO,
    SQUARE,
)
from moe_conformance.model.families.layers import sparse_step
from moe_conformance.model.families.naming import PACKED, ROUTER, Names
from moe_conformance.model.families.record import Config, Method, Record, Sizes, Tiny, Variant, Wrapper
from moe_conformance.model.families.words import ALWAYS

RECORD = Record(
    model_type="qwen3_vl_moe_text",
    config_class="Qwen3VLMoeTextConfig",
    wrapper=Wrapper("Qwen3VLMoeConfig"),
    sizes=Sizes(layers=sparse_step(), least_experts=1),
    method=Method(ALWAYS),
    names=Names(PACKED + ROUTER, once_transposed=True, prefixes={"qwen3_vl_moe": "model.language_model."}),
    config=MODEL | NUM_EXPERTS | OWN_WIDTH | SECOND_OF_TWO,
    ways=ONLY_ACT,
    variants={"square": Variant(SQUARE), "narrow": Variant(NARROW)},
    configs=(
        Config("no-experts", kind="dense", keys={"num_experts": 0}),
        Config(
            # Sizes at the top that the model does not read, beside those of its text_config.
            "root-differs",
            untyped=True,
            form="plain",
            model_type="qwen3_vl_moe",
            top={"num_experts": 13, "num_experts_per_tok": 5, "num_hidden_layers": 11},
        ),
        Config(
            "root-width",
            form="plain",
            model_type="qwen3_vl_moe",
            top={"hidden_size": 48, "intermediate_size": 72, "moe_intermediate_size": 30},
        ),
        Config("hub", untyped=True, form="plain", model_type="qwen3_vl_moe"),
    ),
    captured=("nested", "root-differs"),
    tiny=Tiny("Qwen3VLMoeForConditionalGeneration"),
)
