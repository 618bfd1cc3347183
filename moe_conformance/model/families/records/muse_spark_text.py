from __future__ import annotations

from moe_conformance.model.families.configs import (
    EPS,
    GELU,
    HIDDEN,
    LATENT,
    MODEL,
    NORM_EPS,
    NUM_LOCAL,
    OWN_WIDTH,
    RESCALED,
    SCALED,
    TYPES,
)
from moe_conformance.model.families.keys import Key
from moe_conformance.model.families.layers import every_layer, typed
from moe_conformance.model.families.naming import BIAS, PACKED, ROUTER, Names, one
from moe_conformance.model.families.record import Block, Config, Method, Record, Sizes, Tiny, Wrapper
from moe_conformance.model.families.words import FLOAT32, SIGMOID, activation, epsilon, norm_eps, scale

RECORD = Record(
    model_type="muse_spark_text",
    config_class="MuseSparkTextConfig",
    wrapper=Wrapper("MuseSparkConfig", {"audio_config": {"out_hidden_size": HIDDEN}}),
    sizes=Sizes(layers=typed(every_layer), latent="moe_hidden_size", latent_required=True),
    method=Method(
        {**SIGMOID, "epsilon": 1e-15, "logit_scale": Key("output_multiplier", 0.1767766952966369), **scale(1.0)},
        FLOAT32,
        {**activation(), "output_norm": epsilon("post_norm_eps", 1e-08)},
        latent=norm_eps(1e-05),
    ),
    names=Names(
        PACKED
        + ROUTER
        + BIAS
        + one("mlp.pre_expert_proj.weight", "latent.in")
        + one("mlp.pre_expert_norm.weight", "latent.norm")
        + one("mlp.post_expert_proj.weight", "latent.out")
        + one("mlp.experts.post_expert_norm.weight", "experts.output_norm"),
        prefixes={"muse_spark": "model.language_model."},
    ),
    config=MODEL | NUM_LOCAL | OWN_WIDTH | TYPES | {"moe_hidden_size": LATENT},
    ways=({"output_multiplier": 0.75, "post_norm_eps": 3e-07} | RESCALED | NORM_EPS | GELU,),
    block=Block(SCALED | {"output_multiplier": 1.5, "rms_norm_eps": EPS, "post_norm_eps": 0.125}),
    configs=(
        Config(
            "hub-without-latent",
            kind="refused",
            keys={"moe_hidden_size": None},
            form="plain",
            names=("moe_hidden_size",),
        ),
    ),
    tiny=Tiny(
        "MuseSparkForConditionalGeneration",
        keys={
            "text_config.moe_hidden_size": 16,
            "out_hidden_size": 32,
            "projector_hidden_size": 32,
            "audio_config.num_hidden_layers": 1,
            "audio_config.depths": [1],
            "audio_config.hidden_sizes": [8],
            "audio_config.patch_sizes": [4],
        },
    ),
    sample="core",
)
