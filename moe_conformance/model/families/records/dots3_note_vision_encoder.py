from __future__ import annotations

from moe_conformance.model.families.configs import GELU, HEADS, HIDDEN, LAYERS, OWN_WIDTH, SCALE, TOP_K
from moe_conformance.model.families.layers import typed
from moe_conformance.model.families.naming import PACKED, ROUTER, Names, Stack, each, one
from moe_conformance.model.families.record import Block, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import FLOAT32, SIGMOID_EPS, scale

RECORD = Record(
    model_type="dots3_note_vision_encoder",
    slug="dots3-note-vision",
    config_class="Dots3NoteVisionConfig",
    sizes=Sizes(
        layers=typed(None),
        pyramid="pyramid_num_routed",
        nulls={"num_experts_per_tok": ("capacity_factor", 2), "router_scaling_factor": ("router_scale", 1.0)},
    ),
    method=Method({**SIGMOID_EPS, **scale(1.0, "router_scaling_factor", "router_scale")}, FLOAT32),
    # True is refused where a layer has experts.
    dead=("mlp_bias",),
    names=Names(
        each("mlp.experts", "fc1", "fc3", "fc2")
        + one("mlp.gate_weight", "router.proj")
        + one("mlp.router_bias", "router.selection_bias"),
        PACKED + ROUTER + one("mlp.e_score_correction_bias", "router.selection_bias"),
        prefix="",
        stacks=(Stack("blocks"),),
    ),
    config={"num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS}
    | OWN_WIDTH
    | {"num_experts_per_tok": TOP_K, "pyramid_num_routed": [-1, -1, 2, -1, 5, 7, 11, -1, 13], "adapter_in_dim": HIDDEN},
    ways=({"router_scaling_factor": 3.5} | GELU,),
    block=Block(
        {
            "num_experts_per_tok": 3,
            "pyramid_num_routed": [-1, 7, 12],
            "num_hidden_layers": 3,
            "router_scaling_factor": SCALE,
        },
        layer=2,
    ),
    variants={"small": Variant(layer=1)},
    tiny=Tiny(
        "Dots3NoteVisionModel",
        keys={"mlp_layer_types": ["dense", "sparse", "sparse"], "adapter_in_dim": 32, "adapter_out_dim": 32},
    ),
)
