"""Cases of checkpoint names and of real loads: Gemma 4 in the naming styles that published checkpoints use.

A style is a few words: "plain" (one tensor an expert), "moe" (the block named `moe`), "packed" (all experts in one
tensor), "multimodal" (prefix `model.language_model.`). An engine declares the words it offers.
"""

from __future__ import annotations

from moe_conformance.catalogue.case import Case

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
    needs = set(style.split("-")) | set(baseline.split("-") if baseline else ())
    recipe = {"style": style, "baseline": baseline, "suffixes": suffixes}
    return Case(f"remap-gemma4-{style}{tail}", "remap", "remap.one-target", recipe, needs=frozenset(needs))


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
        needs=frozenset(style.split("-")),
    )
    for style in ("plain", "moe", "packed", "moe-packed", "multimodal-moe", "multimodal-packed")
)

# 2F = H makes gate_up_proj square, F = H down_proj: no layout can be told from such a shape.
WIDTHS = {"distinct": (64, 48), "square-gate-up": (64, 32), "square-down": (64, 64)}


def _load(style: str, tail: str = "", tier: str = "core", **recipe: object) -> Case:
    """widths: key into WIDTHS. shards: 1 means a single file without index. shuffled: tensors dealt out by turns.

    layers: how many, if not few. stale_file: another checkpoint's shard lies beside, which the index does not name.
    """
    defaults = {"style": style, "widths": "distinct", "shards": 2, "shuffled": False}
    recipe = defaults | recipe
    return Case(f"load-gemma4-{style}{tail}", "load", "load.whole", recipe, tier, frozenset(style.split("-")))


LOAD = (
    _load("packed", "-one-file", tier="smoke", shards=1),
    _load("packed", "-two-shards"),
    _load("packed", "-square-gate-up", widths="square-gate-up"),
    _load("packed", "-square-down", widths="square-down"),
    _load("packed", "-shuffled", shards=3, shuffled=True),
    _load("packed", "-eleven-layers", layers=11),
    _load("packed", "-stale-file", stale_file=True),
    _load("plain", "-one-file", shards=1),
    _load("plain", "-shuffled", shards=3, shuffled=True),
    _load("plain", "-square-gate-up", widths="square-gate-up"),
    _load("plain", "-square-down", widths="square-down"),
    _load("moe", "-two-shards"),
    _load("moe", "-shuffled-square-gate-up", shards=3, shuffled=True, widths="square-gate-up"),
    _load("moe-packed", "-two-shards"),
    _load("multimodal-packed", "-two-shards"),
    _load("multimodal-plain", "-shuffled", shards=3, shuffled=True),
    _load("multimodal-moe", "-square-down", widths="square-down"),
)

LOAD_TWICE = (_load("packed", "-twice"), _load("plain", "-twice", shards=3))


def _broken(style: str, damage: str, tier: str = "core") -> Case:
    recipe = {"style": style, "widths": "distinct", "shards": 2, "shuffled": False, "damage": damage}
    needs = frozenset(style.split("-"))
    return Case(f"load-gemma4-{style}-{damage}", "load", "load.refuse-broken", recipe, tier, needs)


BROKEN = (
    _broken("plain", "missing-expert", "smoke"),
    _broken("moe", "missing-expert"),
    _broken("plain", "extra-expert"),
    _broken("plain", "short-expert"),
    _broken("plain", "wide-expert"),
    _broken("plain", "unknown-suffix"),
    _broken("packed", "unknown-tensor"),
    _broken("packed", "unknown-router-tensor"),
    _broken("packed", "extra-layer"),
    _broken("packed", "more-experts"),
    _broken("packed", "router-transposed"),
    _broken("packed", "missing-layer", "smoke"),
    _broken("packed", "fewer-experts"),
    _broken("packed", "transposed"),
    _broken("packed", "missing-router-scale"),
    _broken("packed", "truncated-shard"),
    _broken("packed", "missing-shard"),
    _broken("plain", "truncated-shard"),
)

CASES = (*ONE_TARGET, *IDEMPOTENT, *LOAD, *LOAD_TWICE, *BROKEN)
