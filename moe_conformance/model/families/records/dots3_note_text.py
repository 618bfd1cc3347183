from __future__ import annotations

from moe_conformance.model.families.configs import (
    HIDDEN,
    KNOBS,
    MODEL,
    N_ROUTED,
    N_SHARED,
    NOAUX,
    OWN_WIDTH,
    SHARED,
    TYPES,
)
from moe_conformance.model.families.layers import leading_dense_then_frequency, typed
from moe_conformance.model.families.naming import BIAS, EACH, PACKED, ROUTER, SHARED_EXPERTS, Names
from moe_conformance.model.families.record import (
    SHARED_COUNT,
    Block,
    Config,
    Method,
    Record,
    Shared,
    Sizes,
    Tiny,
    Wrapper,
)
from moe_conformance.model.families.words import FLOAT32, noaux

RECORD = Record(
    model_type="dots3_note_text",
    config_class="Dots3NoteTextConfig",
    wrapper=Wrapper(
        "Dots3NoteConfig", {"vision_config": {"adapter_out_dim": HIDDEN}, "audio_config": {"adapter_out_dim": HIDDEN}}
    ),
    sizes=Sizes(
        shared=Shared(SHARED_COUNT, ("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size")),
        layers=typed(leading_dense_then_frequency(1)),
    ),
    method=Method(noaux(1.0), FLOAT32),
    dead=("mlp_bias",),
    names=Names(EACH + ROUTER + BIAS + SHARED_EXPERTS, PACKED),
    config=MODEL | N_ROUTED | OWN_WIDTH | TYPES | N_SHARED | {"shared_experts_intermediate_size": SHARED},
    ways=NOAUX,
    block=Block(KNOBS | {"shared_experts_intermediate_size": 16}),
    configs=(
        Config(
            "hub",
            keys={"first_k_dense_replace": 2, "moe_layer_freq": [1, 1, 0, 1, 0, 1, 1, 0, 1]},
            dropped=("mlp_layer_types",),
            form="plain",
        ),
    ),
    tiny=Tiny(
        "Dots3NoteForConditionalGeneration",
        text_class="Dots3NoteForCausalLM",
        keys={
            "text_config.layer_types": ["indexed_attention"] * 3,
            "vision_config.mlp_layer_types": ["dense"],
            "vision_config.adapter_in_dim": 32,
            "vision_config.adapter_out_dim": 32,
            "audio_config.adapter_input_size": 32,
            "audio_config.adapter_output_size": 32,
        },
    ),
)
