"""Cases of `remap`: Gemma 4's tensors in the styles that published checkpoints use, and every family's own names.

A style is a few words: "plain" (one tensor an expert), "moe" (the block named `moe`), "packed" (all experts in one
tensor), "multimodal" (prefix `model.language_model.`). An engine declares the words it offers.
"""

from __future__ import annotations

from moe_conformance.catalogue.case import Case
from moe_conformance.suites.of_families import of_families

# Unquantised, FP8 and ModelOpt NVFP4, compressed-tensors, GPTQ and AWQ.
SUFFIXES = (
    "weight",
    "bias",
    "weight_scale",
    "weight_scale_2",
    "weight_scale_inv",
    "input_scale",
    "weight_packed",
    "weight_global_scale",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
)
PARTS = ("gate_proj", "up_proj", "down_proj")
PACKED_PARTS = ("gate_up_proj", "down_proj")
ROUTER = ("proj.weight", "scale", "per_expert_scale")


def spell(style: str, layer: int, part: str, expert: int | None = None, suffix: str = "weight") -> str:
    """The checkpoint's name of an expert tensor; packed styles have neither expert nor suffix.

    Exporters do not agree on how to name the scales of a packed tensor, so nothing is asked of engines there.
    """
    words = style.split("-")
    block = ("model.language_model" if "multimodal" in words else "model") + f".layers.{layer}"
    if "packed" in words:
        return f"{block}.{'moe' if 'moe' in words else 'experts'}.{part}"
    return f"{block}.{'moe.' if 'moe' in words else ''}experts.{expert}.{part}.{suffix}"


def spell_router(style: str, layer: int, part: str) -> str:
    """The checkpoint's name of a router tensor: per_expert_scale sat in the block when the block was named `moe`."""
    words = style.split("-")
    owner = "moe" if {"moe", "packed"} <= set(words) and part == "per_expert_scale" else "router"
    return ("model.language_model" if "multimodal" in words else "model") + f".layers.{layer}.{owner}.{part}"


def _remap(style: str, baseline: str | None = None, suffixes: tuple[str, ...] = ("weight",), tail: str = "") -> Case:
    """baseline: the style whose targets this one must share; of single experts, or packed like this one."""
    if baseline and "packed" in baseline and "packed" not in style:
        raise ValueError(f"{style} against {baseline}: single experts cannot be looked up in packed targets; swap them")
    recipe = {"style": style, "baseline": baseline, "suffixes": suffixes}
    return Case(f"remap-gemma4-{style}{tail}", "remap", "remap.one-target", recipe)


ONE_TARGET = (
    _remap("plain", suffixes=SUFFIXES, tail="-every-suffix"),
    *(_remap("moe", "plain", (suffix,), f"-{suffix.replace('_', '-')}") for suffix in SUFFIXES),
    _remap("packed", "plain"),
    _remap("moe-packed", "packed"),
    _remap("multimodal-plain", suffixes=SUFFIXES, tail="-every-suffix"),
    _remap("multimodal-packed", "multimodal-plain"),
    _remap("multimodal-moe", "multimodal-plain", ("weight", "weight_scale_2", "g_idx"), "-suffixes"),
    _remap("multimodal-moe-packed", "multimodal-packed"),
)

IDEMPOTENT = tuple(
    Case(
        f"remap-gemma4-twice-{style}",
        "remap",
        "remap.idempotent",
        {"style": style, "suffixes": ("weight",) if "packed" in style else SUFFIXES},
    )
    for style in ("plain", "moe", "packed", "moe-packed", "multimodal-moe", "multimodal-packed")
)

OF_FAMILIES = of_families("remap", "remap.one-target")

CASES = (*ONE_TARGET, *IDEMPOTENT, *OF_FAMILIES)
