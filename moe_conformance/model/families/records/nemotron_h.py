from __future__ import annotations

from moe_conformance.model.families.configs import (
    GROUPED,
    KNOBS,
    LATENT,
    MLP_BIAS,
    MODEL_LAYERS_DERIVED,
    N_ROUTED,
    NO_NORM,
    NORM,
    OTHERWISE_GROUPED,
    OWN_WIDTH,
    RESCALED,
    SHARED,
)
from moe_conformance.model.families.layers import blocks
from moe_conformance.model.families.naming import Names, not_gated, one
from moe_conformance.model.families.record import Block, Config, Method, Record, Shared, Sizes, Tiny, Variant
from moe_conformance.model.families.words import FLOAT32, activation, bias, noaux

RECORD = Record(
    model_type="nemotron_h",
    config_class="NemotronHConfig",
    sizes=Sizes(
        layers=blocks,
        num_layers=(),
        latent="moe_latent_size",
        shared=Shared(1, ("moe_shared_expert_intermediate_size",)),
    ),
    method=Method(
        noaux(1.0), FLOAT32, {**activation("mlp_hidden_act", "relu2"), "gated": False}, shared_mlp=bias(), latent=bias()
    ),
    dead=("n_shared_experts", "moe_shared_expert_overlap", "use_bias"),
    names=Names(
        not_gated("mixer.experts.{e}", "experts")
        + one("mixer.gate.weight", "router.proj")
        + one("mixer.gate.e_score_correction_bias", "router.selection_bias")
        + not_gated("mixer.shared_experts", "shared", bias=True)
        + (
            one("mixer.fc1_latent_proj.weight", "latent.in")
            + one("mixer.fc2_latent_proj.weight", "latent.out")
            + one("mixer.fc1_latent_proj.bias", "latent.in_bias")
            + one("mixer.fc2_latent_proj.bias", "latent.out_bias")
        ),
        one("mixer.experts.up_proj", "experts.w1") + one("mixer.experts.down_proj", "experts.w2"),
        prefix="backbone.",
    ),
    config=MODEL_LAYERS_DERIVED
    | N_ROUTED
    | OWN_WIDTH
    | {
        "hybrid_override_pattern": "ME*EM-EME",
        "moe_latent_size": LATENT,
        "moe_shared_expert_intermediate_size": SHARED,
    },
    ways=(
        GROUPED | RESCALED | NORM | MLP_BIAS | {"mlp_hidden_act": "gelu", "n_shared_experts": 3},
        OTHERWISE_GROUPED | RESCALED | NO_NORM | {"moe_latent_size": None},
    ),
    block=Block(KNOBS | {"hybrid_override_pattern": "ME"}),
    variants={
        "no-norm": Variant(NO_NORM),
        "no-latent": Variant({"moe_latent_size": None}),
        "bias": Variant({"mlp_bias": True}),
    },
    configs=(Config("no-latent", keys={"moe_latent_size": None}),),
    captured=("",),
    tiny=Tiny(
        "NemotronHForCausalLM", keys={"layers_block_type": ["mamba", "moe", "attention", "moe"], "moe_latent_size": 16}
    ),
    sample="core",
)
