from __future__ import annotations

from moe_conformance.model.families.configs import MODEL, NUM_LOCAL, PLAIN_WIDTH
from moe_conformance.model.families.naming import Names, one, packed
from moe_conformance.model.families.record import DENSE_WIDTH, Block, Method, Record, Sizes, Tiny
from moe_conformance.model.families.words import CHOSEN, activation

RECORD = Record(
    model_type="jetmoe",
    config_class="JetMoeConfig",
    sizes=Sizes(width=DENSE_WIDTH),
    method=Method(CHOSEN, experts=activation("activation_function"), layer={"output_bias": True}),
    names=Names(
        packed("mlp", first="input_linear.weight", second="output_linear.weight")
        + one("mlp.router.layer.weight", "router.proj")
        + one("mlp.bias", "output.bias")
    ),
    config=MODEL | NUM_LOCAL | PLAIN_WIDTH,
    ways=({"activation_function": "gelu"},),
    block=Block(grouped=False),
    tiny=Tiny("JetMoeForCausalLM"),
    sample="core",
)
