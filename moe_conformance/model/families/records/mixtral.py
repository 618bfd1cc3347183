from __future__ import annotations

from moe_conformance.model.families.configs import MODEL, NARROW, NO_SUCH, NUM_LOCAL, ONLY_ACT, PLAIN_WIDTH, SQUARE
from moe_conformance.model.families.naming import BLOCK_SPARSE, PACKED, ROUTER, Names
from moe_conformance.model.families.record import DENSE_WIDTH, Config, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import ALWAYS

RECORD = Record(
    model_type="mixtral",
    config_class="MixtralConfig",
    sizes=Sizes(width=DENSE_WIDTH),
    method=Method(ALWAYS),
    dead=("router_jitter_noise",),
    names=Names(BLOCK_SPARSE, PACKED + ROUTER),
    config=MODEL | NUM_LOCAL | PLAIN_WIDTH,
    ways=ONLY_ACT,
    variants={"square": Variant(SQUARE), "narrow": Variant(NARROW), "gelu": Variant({"hidden_act": "gelu"})},
    configs=(
        Config(
            "top-k-above-experts",
            kind="refused",
            keys={"num_experts_per_tok": 12},
            form="plain",
            names=("num_experts_per_tok",),
        ),
        Config(
            "no-experts-at-all",
            kind="refused",
            keys={"num_local_experts": 0},
            form="plain",
            names=("num_local_experts",),
        ),
        Config(
            "negative-top-k",
            kind="refused",
            keys={"num_experts_per_tok": -1},
            form="plain",
            names=("num_experts_per_tok",),
            lenient=NO_SUCH,
        ),
        Config(
            "zero-top-k",
            kind="refused",
            keys={"num_experts_per_tok": 0},
            form="plain",
            names=("num_experts_per_tok",),
            lenient=NO_SUCH,
        ),
        Config(
            "boolean-top-k",
            kind="refused",
            keys={"num_experts_per_tok": True},
            form="plain",
            names=("num_experts_per_tok",),
            lenient=NO_SUCH,
        ),
        Config(
            "textual-experts",
            kind="refused",
            keys={"num_local_experts": "11"},
            form="plain",
            names=("num_local_experts",),
            lenient=NO_SUCH,
        ),
        Config(
            "fractional-width",
            kind="refused",
            keys={"intermediate_size": 24.5},
            form="plain",
            names=("intermediate_size",),
            lenient=NO_SUCH,
        ),
    ),
    captured=("",),
    tiny=Tiny("MixtralForCausalLM"),
    sample="smoke",
)
