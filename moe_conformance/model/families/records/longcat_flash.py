from __future__ import annotations

from dataclasses import replace

from moe_conformance.model.families.configs import (
    DENSE,
    EXPERTS,
    GELU,
    LAYERS,
    MODEL_LAYERS_DERIVED,
    RESCALED,
    SCALED,
    TOP_K,
    WIDTH,
)
from moe_conformance.model.families.naming import EACH, PACKED, Names, one
from moe_conformance.model.families.record import Block, Config, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import BIASED, FLOAT32, scale

RECORD = Record(
    model_type="longcat_flash",
    config_class="LongcatFlashConfig",
    sizes=Sizes(num_layers=("num_layers",), width=("expert_ffn_hidden_size",), extra_experts=("zero_expert_num", 256)),
    method=Method({**BIASED, **scale(6.0)}, FLOAT32),
    # transformers writes gate and up rows for the identity experts too, which nothing reads.
    names=Names(
        EACH
        + tuple(replace(piece, experts="identity") for piece in EACH[:2])
        + one("mlp.router.classifier.weight", "router.proj")
        + one("mlp.router.e_score_correction_bias", "router.selection_bias"),
        (replace(PACKED[0], ops=("padded",)), PACKED[1]),
        identity_written=True,
    ),
    config=MODEL_LAYERS_DERIVED
    | {"n_routed_experts": EXPERTS, "moe_topk": TOP_K}
    | {"expert_ffn_hidden_size": WIDTH, "ffn_hidden_size": DENSE, "num_layers": LAYERS, "zero_expert_num": 6},
    beside={"zero_expert_type": "identity"},
    ways=(RESCALED | GELU,),
    # Kernels that add identity experts take 256 columns at a time (vLLM's).
    block=Block(SCALED | {"hidden_size": 256}, grouped=False),
    variants={"no-identity": Variant({"zero_expert_num": 0})},
    configs=(
        Config("no-zero-experts", keys={"zero_expert_num": 0}),
        Config("hub", kind="layers", dropped=("zero_expert_num",), form="plain"),
    ),
    captured=("",),
    tiny=Tiny(
        "LongcatFlashForCausalLM",
        keys={"head_dim": 4, "ffn_hidden_size": 36, "expert_ffn_hidden_size": WIDTH, "zero_expert_num": 4},
    ),
    sample="core",
    authority=("the modeling file, which makes a bias of the classifier and never adds it"),
)
