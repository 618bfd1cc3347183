from __future__ import annotations

from dataclasses import replace

from moe_conformance.model.families.configs import EPS, MODEL, NORM_EPS, OWN_WIDTH, TOP_K_EXPERTS
from moe_conformance.model.families.naming import GEMMA
from moe_conformance.model.families.record import Block, Method, Record, Sizes, Tiny, Wrapper
from moe_conformance.model.families.words import ALWAYS, activation, dense_width, norm_eps

RECORD = Record(
    model_type="diffusion_gemma_text",
    config_class="DiffusionGemmaTextConfig",
    wrapper=Wrapper("DiffusionGemmaConfig"),
    sizes=Sizes(),
    method=Method(
        {**ALWAYS, "per_expert_scale": True},
        {"kind": "gemma4", **norm_eps(1e-06)},
        activation("hidden_activation", "gelu_pytorch_tanh"),
        dense=norm_eps(1e-06),
        dense_mlp={**activation("hidden_activation", "gelu_pytorch_tanh"), "width": dense_width},
    ),
    names=replace(GEMMA, prefixes={"diffusion_gemma": "model.decoder."}),
    config=MODEL | TOP_K_EXPERTS | OWN_WIDTH,
    ways=({"hidden_activation": "gelu"} | NORM_EPS,),
    block=Block({"rms_norm_eps": EPS}),
    tiny=Tiny("DiffusionGemmaForBlockDiffusion", keys={"text_config.global_head_dim": 8}),
)
