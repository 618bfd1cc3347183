from __future__ import annotations

import math

from moe_conformance.model.families.configs import KNOBS, LIMIT, MODEL, N_ROUTED, N_SHARED, NOAUX, OWN_WIDTH, TYPES
from moe_conformance.model.families.layers import leading_dense, typed
from moe_conformance.model.families.naming import BIAS, PACKED, ROUTER, SHARED_EXPERTS, Names, mlp
from moe_conformance.model.families.record import COUNTED, Block, Method, Record, Sizes, Tiny, Wrapper
from moe_conformance.model.families.words import FLOAT32, activation, clamped, noaux

RECORD = Record(
    model_type="hy_v4_vl_text",
    config_class="HYV4VLTextConfig",
    wrapper=Wrapper("HYV4VLConfig"),
    sizes=Sizes(shared=COUNTED, layers=typed(leading_dense(1))),
    method=Method(noaux(2.827), FLOAT32, clamped(10.0), shared_mlp={**activation(), "clamp": "no", "limit": math.inf}),
    # Published is linear_gate in attention alone. transformers maps that name wherever it stands, and writes it here.
    names=Names(
        PACKED + ROUTER + BIAS + mlp("mlp.shared_experts", "shared", gate="linear_gate"),
        read=SHARED_EXPERTS[:1],
        published={"mlp.shared_experts.linear_gate.weight": "mlp.shared_experts.gate_proj.weight"},
    ),
    config=MODEL | N_ROUTED | OWN_WIDTH | TYPES | N_SHARED,
    ways=(NOAUX[0] | {"swiglu_limit": 6.5}, NOAUX[1] | {"swiglu_limit": 2.5}),
    block=Block(KNOBS | {"swiglu_limit": LIMIT}),
    tiny=Tiny(
        "HYV4VLForConditionalGeneration",
        keys={
            "text_config.qk_rope_head_dim": 8,
            "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
    ),
    authority=(
        "the modeling file, which clamps at any swiglu_limit; its documentation says that one of 0 or less is none"
    ),
)
