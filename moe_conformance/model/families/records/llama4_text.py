from __future__ import annotations

from moe_conformance.model.families.configs import DENSE, GELU, MODEL, NARROW, NUM_LOCAL, PLAIN_WIDTH, SQUARE
from moe_conformance.model.families.layers import listed
from moe_conformance.model.families.naming import Names, one, packed, shared
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
    Wrapper,
)
from moe_conformance.model.families.words import CHOSEN, activation

RECORD = Record(
    model_type="llama4_text",
    config_class="Llama4TextConfig",
    wrapper=Wrapper("Llama4Config"),
    sizes=Sizes(layers=listed, width=DENSE_WIDTH, shared=ONE_AS_WIDE),
    method=Method({**CHOSEN, "score": "sigmoid"}, experts={**activation(), "weight_on": "input"}),
    dead=("router_jitter_noise",),
    names=Names(
        packed("feed_forward.experts", "transposed")
        + one("feed_forward.router.weight", "router.proj")
        + shared("feed_forward.shared_expert"),
        prefixes={"llama4": "language_model.model."},
    ),
    config=MODEL | NUM_LOCAL | PLAIN_WIDTH | {"intermediate_size_mlp": DENSE, "interleave_moe_layer_step": 4},
    ways=({"router_jitter_noise": 0.5} | GELU,),
    # As every published config: an engine may multiply an expert's input by its weight where there is one alone.
    block=Block({"interleave_moe_layer_step": 2, "num_experts_per_tok": 1}, grouped=False),
    variants={"square": Variant(SQUARE), "narrow": Variant(NARROW)},
    configs=(Config("moe-layers", keys={"moe_layers": [2, 3, 8]}),),
    captured=("nested",),
    tiny=Tiny("Llama4ForConditionalGeneration", text_class="Llama4ForCausalLM"),
    sample="smoke",
)
