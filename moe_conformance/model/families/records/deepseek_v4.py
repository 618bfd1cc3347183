from __future__ import annotations

from moe_conformance.model.families.bounds import MOST_ROWS
from moe_conformance.model.families.configs import (
    GELU,
    LIMIT,
    MLP_BIAS,
    MODEL,
    MOE_WIDTH,
    N_ROUTED,
    NO_NORM,
    RESCALED,
    SCALED,
)
from moe_conformance.model.families.layers import every_layer, typed
from moe_conformance.model.families.naming import (
    BIAS,
    EACH,
    PACKED,
    ROUTER,
    SHARED_EXPERTS,
    W1_W3_W2,
    Names,
    each,
    mlp,
    one,
)
from moe_conformance.model.families.record import ONE_AS_WIDE, Block, Config, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import (
    ALWAYS,
    INPUT,
    activation,
    bias,
    clamped,
    count,
    is_hashed,
    scale,
    score,
)

RECORD = Record(
    model_type="deepseek_v4",
    config_class="DeepseekV4Config",
    # Always one shared expert: the modeling never reads n_shared_experts.
    sizes=Sizes(layers=typed(every_layer), shared=ONE_AS_WIDE),
    method=Method(
        {
            **ALWAYS,
            **score("sqrtsoftplus"),
            **INPUT,
            "selector": lambda scope, layer: "table" if is_hashed(scope, layer) else "topk",
            "selection_bias": lambda scope, layer: not is_hashed(scope, layer),
            "epsilon": 1e-20,
            **scale(1.5),
        },
        experts={**activation(), **clamped(10.0)},
        shared_mlp=bias(),
        layer={
            "vocab_size": lambda scope, layer: (
                count("vocab_size", 129280, 1, MOST_ROWS) if is_hashed(scope, layer) else 0
            )
        },
    ),
    dead=("norm_topk_prob", "n_shared_experts", "router_jitter_noise"),
    names=Names(
        each("ffn.experts", *W1_W3_W2)
        + one("ffn.gate.weight", "router.proj")
        + one("ffn.gate.bias", "router.selection_bias")
        + one("ffn.gate.tid2eid", "router.table")
        + mlp("ffn.shared_experts", "shared", *W1_W3_W2),
        EACH + ROUTER + BIAS + SHARED_EXPERTS + PACKED + one("mlp.gate.tid2eid", "router.table"),
    ),
    config=MODEL | N_ROUTED | MOE_WIDTH | {"mlp_layer_types": ["hash_moe"] * 2 + ["moe"] * 7},
    beside={"topk_method": "noaux_tc"},
    ways=(
        {"scoring_func": "sigmoid", "swiglu_limit": 6.5, "vocab_size": 48} | RESCALED | NO_NORM | MLP_BIAS | GELU,
        {"scoring_func": "sqrtsoftplus", "swiglu_limit": 2.5, "n_shared_experts": 3} | RESCALED,
    ),
    # Numbers of experts that compiled routers know: 64 and 6 are the least that vLLM's for CPUs takes.
    block=Block(
        SCALED
        | {"n_routed_experts": 64, "num_experts_per_tok": 6}
        | {"swiglu_limit": LIMIT, "vocab_size": 50, "mlp_layer_types": ["hash_moe", "moe"]}
    ),
    variants={"hash": Variant(layer=0, token_ids=True)},
    configs=(
        Config("hub", keys={"num_hash_layers": 2}, dropped=("mlp_layer_types",), form="plain"),
        Config("hub", kind="layers", dropped=("mlp_layer_types",), form="plain"),
    ),
    tiny=Tiny("DeepseekV4ForCausalLM", keys={"mlp_layer_types": ["hash_moe", "moe", "moe"]}),
    sample="core",
    authority=(
        "transformers: scores in the dtype of the model, where engines take float32; either is within the bounds"
    ),
)
