from __future__ import annotations

from moe_conformance.model.families.configs import (
    EXPERTS,
    GELU,
    MLP_BIAS,
    MODEL,
    MOE_SHARED,
    NARROW,
    PLAIN_WIDTH,
    SQUARE,
    TOP_K,
)
from moe_conformance.model.families.naming import SHARED_EXPERTS, Names, one, packed
from moe_conformance.model.families.record import COUNTED, DENSE_WIDTH, Method, Record, Sizes, Tiny, Variant, Wrapper
from moe_conformance.model.families.words import CHOSEN, INPUT, activation, bias

RECORD = Record(
    model_type="aria_text",
    config_class="AriaTextConfig",
    wrapper=Wrapper("AriaConfig", typed=True),
    sizes=Sizes(width=DENSE_WIDTH, shared=COUNTED),
    method=Method({**CHOSEN, **INPUT}, experts={}, shared_mlp={**activation(), **bias()}),
    names=Names(
        packed("mlp.experts", "transposed", first="fc1.weight", second="fc2.weight")
        + one("mlp.router.weight", "router.proj")
        + SHARED_EXPERTS,
        packed("mlp.experts", "transposed"),
        prefixes={"aria": "language_model.model."},
    ),
    config=MODEL | {"moe_num_experts": EXPERTS, "moe_topk": TOP_K} | PLAIN_WIDTH | MOE_SHARED,
    ways=(GELU | MLP_BIAS,),
    variants={
        "square": Variant(SQUARE),
        "narrow": Variant(NARROW),
        "gelu": Variant({"hidden_act": "gelu_pytorch_tanh"}),
    },
    captured=("nested",),
    tiny=Tiny("AriaForConditionalGeneration", text_class="AriaTextForCausalLM"),
)
