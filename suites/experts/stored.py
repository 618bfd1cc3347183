"""Experts cases with stored weights and with adapters: what each format keeps beside its codes, and where it is cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_conformance.catalogue.case import Case
from moe_conformance.model.specs import MLPSpec
from moe_conformance.model.storage import LoraSpec, QuantSpec

# Whole tiles of 16 x 16 and groups of 16 and 32; four tiles across w13, two across w2.
WHOLE = {"T": 13, "E": 5, "K": 2, "D": 64, "F": 32}
# The last tile of either dim is cut, of gate's and up's rows as well, and the last group of 16 and 32.
CUT = {**WHOLE, "D": 40, "F": 24}
WIDE = {**WHOLE, "D": 256, "F": 128}

_FP8, _INT8, _INT4 = (QuantSpec(name, "channel") for name in ("fp8_e4m3", "int8", "int4"))
_TILES = (16, 16)
FORMS: dict[str, QuantSpec] = {
    "fp8-tensor": replace(_FP8, granularity="tensor"),
    "fp8-tensor-halves": replace(_FP8, granularity="tensor", split_gate_up=True),
    "fp8-channel": _FP8,
    "fp8-block": replace(_FP8, granularity="block", block=_TILES),
    "fp8-block-halves": replace(_FP8, granularity="block", block=_TILES, split_gate_up=True),
    "fp8-block-oblong": replace(_FP8, granularity="block", block=(8, 32), split_gate_up=True),
    "fp8-group": replace(_FP8, granularity="group", group=16),
    "int8-tensor-halves": replace(_INT8, granularity="tensor", split_gate_up=True),
    "int8-channel": _INT8,
    "int8-channel-zero": replace(_INT8, zero_points=True),
    "int8-group": replace(_INT8, granularity="group", group=16),
    "int8-group-zero": replace(_INT8, granularity="group", group=16, zero_points=True),
    "int4-channel": _INT4,
    "int4-channel-zero": replace(_INT4, zero_points=True),
    "int4-group": replace(_INT4, granularity="group", group=16),
    "int4-group-zero": replace(_INT4, granularity="group", group=16, zero_points=True),
    "mxfp4": QuantSpec("mxfp4", "group", group=32),
    "nvfp4": QuantSpec("nvfp4", "group", group=16),
    "nvfp4-halves": QuantSpec("nvfp4", "group", group=16, split_gate_up=True),
    # Activations are quantised, too.
    "fp8-tensor-static": replace(_FP8, granularity="tensor", activations="static"),
    "fp8-channel-token": replace(_FP8, activations="token"),
    "fp8-block-group": replace(_FP8, granularity="block", block=_TILES, activations="group", group=16),
    "int8-channel-token": replace(_INT8, activations="token"),
    "int8-channel-static": replace(_INT8, activations="static"),
}

_SILU = MLPSpec(0)
FUNCTIONS: dict[str, MLPSpec] = {
    "silu": _SILU,
    "not-gated": replace(_SILU, activation="relu2", gated=False),
    "bias": replace(_SILU, bias=True),
    # gpt-oss
    "swiglu-oai": replace(_SILU, clamp="before", limit=0.75, alpha=1.75, up_offset=1.0, bias=True),
    # DeepSeek-V4, Gemma 4, Nemotron-H, Llama 4.
    "clamp-before": replace(_SILU, clamp="before", limit=0.75),
    "gelu-tanh": replace(_SILU, activation="gelu_tanh"),
    "relu2-not-gated": replace(_SILU, activation="relu2", gated=False),
    "weight-on-input": replace(_SILU, weight_on="input"),
}


def _case(name: str, clause: str, dims: dict[str, int], tier: str, function: str, **recipe: Any) -> Case:
    rest: dict[str, Any] = {"dropped": 0, "hot": None, "dtype": "float32", "output_scale": 1.0, "identity_experts": 0}
    rest |= {"owners": (), "rank": 0, "arguments": {}, **recipe}
    mlp = replace(FUNCTIONS[function], width=dims["F"])
    return Case(f"experts-{name}", "experts", clause, {**dims, "mlp": mlp, **rest}, tier)


def _stored(
    form: str, suffix: str = "", dims: dict[str, int] = WHOLE, tier: str = "core", function: str = "silu", **recipe: Any
) -> Case:
    """input_scales: whether experts have one each, where activations have a given one."""
    quant = FORMS[form]
    clause = "experts.stored-weights" if quant.activations == "no" else "experts.quantised-activations"
    if quant.activations == "static":
        recipe = {"input_scales": "one", **recipe}
    name = f"stored-{form}{f'-{suffix}' if suffix else ''}"
    return _case(name, clause, dims, tier, function, quant=quant, **recipe)


_WEIGHTS = [form for form, quant in FORMS.items() if quant.activations == "no"]
_OTHERS = [form for form in FORMS if form not in _WEIGHTS]
_SCATTERED = (1, 0, 1, 0, 1)

# What the default run looks at, sharply; the sweep of all forms over all sizes is the full tier's.
_CORE = (
    _stored("fp8-block", tier="smoke"),
    _stored("fp8-block-halves", "cut", CUT),
    _stored("fp8-tensor-halves"),
    _stored("int8-channel", "fp16", dtype="float16"),
    _stored("int8-group"),
    _stored("int4-group", "cut", CUT),
    _stored("int4-group-zero", tier="smoke"),
    _stored("int4-group-zero", "cut", CUT),
    _stored("mxfp4", "swiglu-oai", function="swiglu-oai"),
    _stored("mxfp4", "cut", CUT),
    _stored("nvfp4", "ep", owners=_SCATTERED, rank=1),
    _stored("nvfp4-halves"),
    # What a kernel takes beside codes and scales is handed to each format's kernel by itself.
    _stored("fp8-block", "swiglu-oai", function="swiglu-oai"),
    _stored("nvfp4", "bias", function="bias"),
)
_SWEEP = (
    *(_stored(form, tier="full") for form in _WEIGHTS),
    *(_stored(form, "cut", CUT, "full") for form in _WEIGHTS),
    *(_stored(form, "bf16", tier="full", dtype="bfloat16") for form in _WEIGHTS),
    *(_stored(form, "cut-fp16", CUT, "full", dtype="float16") for form in _WEIGHTS),
    *(_stored(form, "not-gated", CUT, "full", "not-gated") for form in _WEIGHTS if "halves" not in form),
    *(_stored(form, "bias", tier="full", function="bias") for form in _WEIGHTS),
    *(_stored(form, "ep-dropped", CUT, "full", owners=_SCATTERED, rank=0, dropped=6) for form in _WEIGHTS),
    *(_stored(form, "wide", WIDE, "full") for form in _WEIGHTS),
    *(_stored(form, "one-token", {**WHOLE, "T": 1}, "full") for form in _WEIGHTS),
)
WEIGHT_CASES = (*_CORE, *(case for case in _SWEEP if case.id not in {known.id for known in _CORE}))

ACTIVATION_CASES = (
    _stored("fp8-tensor-static"),
    _stored("fp8-channel-token"),
    _stored("fp8-block-group", tier="smoke"),
    _stored("int8-channel-token"),
    _stored("fp8-tensor-static", "by-expert", tier="full", input_scales="each"),
    _stored("int8-channel-static", tier="full"),
    _stored("int8-channel-static", "by-expert", tier="full", input_scales="each"),
    *(_stored(form, "cut", CUT, "full") for form in _OTHERS),
    *(_stored(form, "fp16", tier="full", dtype="float16") for form in _OTHERS),
    *(_stored(form, "bf16", tier="full", dtype="bfloat16") for form in _OTHERS),
    *(_stored(form, "wide", WIDE, "full") for form in _OTHERS),
    *(_stored(form, "not-gated", tier="full", function="not-gated") for form in _OTHERS),
    *(_stored(form, "ep-dropped", tier="full", owners=_SCATTERED, rank=0, dropped=6) for form in _OTHERS),
)

# A format has kernels of its own, and each is told by itself of everything else that a call has.
_BESIDE = ("fp8-block", "fp8-channel-token", "int8-channel-token", "int4-group", "mxfp4", "nvfp4")


def _beside(what: str, clause: str, dims: dict[str, int] = WHOLE, function: str = "silu", **recipe: Any) -> list[Case]:
    return [
        _case(f"stored-{form}-beside-{what}", clause, dims, "core", function, quant=FORMS[form], **recipe)
        for form in _BESIDE
    ]


STORED_FUNCTION_CASES = (
    *_beside("clamp", "experts.function", function="clamp-before"),
    *_beside("gelu-tanh-one-token", "experts.function", {**WHOLE, "T": 1}, "gelu-tanh"),
    *_beside("relu2-not-gated", "experts.function", function="relu2-not-gated"),
)
STORED_SUM_CASES = (
    *_beside("scale", "experts.combine", output_scale=2.5),
    *_beside("weight-on-input", "experts.combine", {**WHOLE, "K": 1}, "weight-on-input"),
)
STORED_NO_EXPERT_CASES = tuple(_beside("no-expert", "experts.no-expert", dropped=6))

_LORA = LoraSpec(adapters=3, rank=4, alpha=6.0)
TINY = {"T": 35, "E": 5, "K": 2, "D": 20, "F": 12}


def _adapted(name: str, dims: dict[str, int] = TINY, tier: str = "core", function: str = "silu", **recipe: Any) -> Case:
    """lora: adapters. absent: experts whose updates are zero. none: of 20 tokens so many have no adapter."""
    recipe = {"lora": _LORA, "absent": (), "none": 6, **recipe}
    return _case(f"lora-{name}", "experts.adapters", dims, tier, function, **recipe)


LORA_CASES = (
    _adapted("three", tier="smoke"),
    _adapted("one", lora=replace(_LORA, adapters=1), none=0),
    _adapted("rslora", lora=replace(_LORA, rslora=True)),
    _adapted("absent-experts", absent=(1, 4)),
    _adapted("ep-dropped", owners=_SCATTERED, rank=1, dropped=6),
    _adapted("fp16", dtype="float16"),
    _adapted("nobody", none=20),
    _adapted("rank-one", lora=replace(_LORA, rank=1)),
    # 2F < D, as most models have it.
    _adapted("rank-16", {**TINY, "D": 48}, lora=replace(_LORA, rank=16)),
    # More tokens than a chunk has.
    _adapted("many", {**TINY, "T": 70}, lora=replace(_LORA, adapters=8)),
    _adapted("bf16", tier="full", dtype="bfloat16"),
    _adapted("not-gated", function="not-gated"),
    _adapted("bias", tier="full", function="bias"),
    _adapted("one-token", {**TINY, "T": 1}, "full", none=0),
    _adapted("hundreds", {**TINY, "E": 256, "K": 8, "T": 9}, "full"),
    _adapted("scale", tier="full", output_scale=2.5),
    _adapted("stored-fp8", WHOLE, "full", quant=FORMS["fp8-block"]),
    _adapted("stored-int4", WHOLE, "full", quant=FORMS["int4-group-zero"]),
)

CASES = (
    *WEIGHT_CASES,
    *ACTIVATION_CASES,
    *STORED_FUNCTION_CASES,
    *STORED_SUM_CASES,
    *STORED_NO_EXPERT_CASES,
    *LORA_CASES,
)
