from __future__ import annotations

from moe_conformance.model.families.configs import (
    MODEL,
    NO_NORM,
    NORM,
    NORM_OR_NOT,
    NUM_EXPERTS,
    ONE_SHARED,
    OWN_WIDTH,
    SECOND_OF_TWO,
)
from moe_conformance.model.families.naming import EACH, PACKED, ROUTER, SHARED_GATED, Names
from moe_conformance.model.families.record import (
    ONE_OF_ITS_OWN_WIDTH,
    Block,
    Method,
    Record,
    Sizes,
    Tiny,
    Variant,
    Wrapper,
)
from moe_conformance.model.families.words import norm

RECORD = Record(
    model_type="qwen3_omni_moe_talker_text",
    slug="qwen3-omni-talker",
    config_class="Qwen3OmniMoeTalkerTextConfig",
    wrapper=Wrapper("Qwen3OmniMoeTalkerConfig"),
    # Its config has Qwen2-MoE's layer keys; its modeling does not read them.
    sizes=Sizes(shared=ONE_OF_ITS_OWN_WIDTH),
    method=Method(norm(False), shared={"gate": True}),
    dead=("decoder_sparse_step", "mlp_only_layers"),
    names=Names(PACKED + ROUTER + SHARED_GATED, EACH),
    config=MODEL | NUM_EXPERTS | OWN_WIDTH | ONE_SHARED | SECOND_OF_TWO,
    ways=NORM_OR_NOT,
    block=Block(NORM),
    variants={"no-norm": Variant(NO_NORM)},
    tiny=Tiny(
        "Qwen3OmniMoeTalkerForConditionalGeneration",
        keys={"text_config.shared_expert_intermediate_size": 28, "spatial_merge_size": 2},
    ),
)
