from __future__ import annotations

from moe_conformance.model.families.bounds import MOST_WIDTH
from moe_conformance.model.families.configs import EPS, GELU, MODEL, MOE_WIDTH, NORM_EPS, NUM_EXPERTS
from moe_conformance.model.families.naming import PACKED, Names, Piece
from moe_conformance.model.families.record import Block, Method, Record, Sizes, Tiny, Variant
from moe_conformance.model.families.words import BIASED, INPUT, count, norm_eps

_ROUTER = {
    "balancing_biases": "router.selection_bias",
    "down_proj.weight": "router.down.weight",
    "down_proj.bias": "router.down.bias",
    "router_states_scale": "router.state_scale",
    "router_mlp.norm.weight": "router.norm",
    "router_mlp.fc1.weight": "router.fc1.weight",
    "router_mlp.fc1.bias": "router.fc1.bias",
    "router_mlp.fc2.weight": "router.fc2.weight",
    "router_mlp.fc2.bias": "router.fc2.bias",
    "router_mlp.out_proj.weight": "router.proj",
}

# A router of three layers; its first is added to that of the layer before. One class more than experts: skip.
RECORD = Record(
    model_type="zaya",
    config_class="ZayaConfig",
    sizes=Sizes(),
    method=Method(
        {**BIASED, **INPUT, "skip_expert": True},
        {
            "kind": "zaya",
            "width": count("router_hidden_size", 256, 1, MOST_WIDTH),
            **norm_eps(1e-05),
            "takes_state": lambda scope, layer: layer > 0,
        },
    ),
    names=Names(PACKED + tuple(Piece(f"mlp.gate.{name}", target) for name, target in _ROUTER.items())),
    config=MODEL | NUM_EXPERTS | MOE_WIDTH | {"num_experts_per_tok": 1},
    ways=({"router_hidden_size": 20} | NORM_EPS | GELU,),
    block=Block({"router_hidden_size": 16, "rms_norm_eps": EPS}, state=True),
    variants={"first": Variant(layer=0, state=False)},
    tiny=Tiny("ZayaForCausalLM", keys={"num_experts_per_tok": 1, "router_hidden_size": 16}),
    sample="core",
    authority=(
        "transformers, which adds nothing for the class that skips; by a public port the model's own code "
        "adds the input times the weight"
    ),
)
