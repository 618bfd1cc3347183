from __future__ import annotations

from dataclasses import replace

from moe_conformance.model.families.configs import EPS, MODEL, NORM_EPS, OWN_WIDTH, TOP_K_EXPERTS
from moe_conformance.model.families.naming import GEMMA
from moe_conformance.model.families.record import Block, Config, Method, Record, Sizes, Tiny, Wrapper
from moe_conformance.model.families.words import ALWAYS, activation, gemma4_width, norm_eps

RECORD = Record(
    model_type="gemma4_text",
    config_class="Gemma4TextConfig",
    wrapper=Wrapper("Gemma4Config"),
    sizes=Sizes(switch="enable_moe_block"),
    method=Method(
        {**ALWAYS, "per_expert_scale": True},
        {"kind": "gemma4", **norm_eps(1e-06)},
        activation("hidden_activation", "gelu_pytorch_tanh"),
        dense=norm_eps(1e-06),
        dense_mlp={
            **activation("hidden_activation", "gelu_pytorch_tanh"),
            "width": gemma4_width,
        },
    ),
    names=replace(GEMMA, prefixes={"gemma4": "model.language_model."}),
    config=MODEL | TOP_K_EXPERTS | OWN_WIDTH | {"enable_moe_block": True},
    ways=(
        {"hidden_activation": "gelu", "use_double_wide_mlp": True, "num_kv_shared_layers": 3} | NORM_EPS,
        {"use_double_wide_mlp": False, "num_kv_shared_layers": 3},
    ),
    block=Block({"rms_norm_eps": EPS}),
    configs=(
        Config("hub", form="plain", model_type="gemma4"),
        Config("without-num-experts", kind="refused", keys={"num_experts": None}, names=("num_experts",)),
        Config("without-top-k-experts", kind="refused", keys={"top_k_experts": None}, names=("top_k_experts",)),
        Config(
            "without-moe-intermediate-size",
            kind="refused",
            keys={"moe_intermediate_size": None},
            names=("moe_intermediate_size",),
        ),
        Config(
            "hub-without-top-k",
            kind="refused",
            keys={"top_k_experts": None},
            form="plain",
            model_type="gemma4",
            names=("top_k_experts",),
        ),
        Config(
            "nested-without-top-k",
            kind="refused",
            keys={"top_k_experts": None},
            form="nested",
            names=("top_k_experts", "text_config"),
        ),
        Config("dense", kind="dense", bare=True),
        Config("switched-off", kind="dense", keys={"enable_moe_block": False}),
        Config("nested-dense", kind="dense", keys={"enable_moe_block": False}, form="nested"),
    ),
    captured=("", "nested", "hub"),
    tiny=Tiny(
        "Gemma4ForConditionalGeneration",
        text_class="Gemma4ForCausalLM",
        keys={
            "text_config.enable_moe_block": True,
            "text_config.hidden_size_per_layer_input": 0,
            "text_config.global_head_dim": 8,
        },
    ),
    sample="smoke",
)
