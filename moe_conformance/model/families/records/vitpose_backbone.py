from __future__ import annotations

from moe_conformance.model.families.configs import EXPERTS, HEADS, HIDDEN, LATENT, LAYERS, MODEL
from moe_conformance.model.families.record import Config, Method, Record, Sizes, Tiny

RECORD = Record(
    model_type="vitpose_backbone",
    config_class="VitPoseBackboneConfig",
    # The router is the index of the data set: one expert a sample, in every layer.
    sizes=Sizes(top_k=1, width=(), width_of_hidden="mlp_ratio", least_experts=2),
    method=Method(experts={}, unsaid="the data set of a sample, not a router, chooses its expert"),
    config=MODEL
    | {
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "mlp_ratio": 3,
        "num_experts": EXPERTS,
        "part_features": LATENT,
    },
    block=None,
    configs=(Config("one-expert", kind="dense", keys={"num_experts": 1}),),
    tiny=Tiny(
        "VitPoseBackbone",
        keys={"part_features": 8, "mlp_ratio": 2, "num_experts": 6, "image_size": [16, 8], "patch_size": [4, 4]},
    ),
)
