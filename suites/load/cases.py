"""Cases of `load`: whole checkpoints of Gemma 4 in every naming style and broken ones, and every family's own names.

Styles are those of `remap`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moe_conformance.catalogue.case import Case
from moe_conformance.model.families.families import BY_SLUG, RECORDS
from moe_conformance.suites.load.forms import FORMS, PACKED_ALONE
from moe_conformance.suites.of_families import of_families

# H and F. 2F = H makes gate_up_proj square, F = H down_proj: no layout can be told from such a shape. 2F < H, as most
# models have it: a layout guessed from the larger dim is the other one.
WIDTHS = {"distinct": (64, 48), "square-gate-up": (64, 32), "square-down": (64, 64), "narrow": (64, 24)}


def _load(style: str, tail: str = "", tier: str = "core", **recipe: object) -> Case:
    """widths: key into WIDTHS. shards: 1 means a single file without index. shuffled: tensors dealt out by turns.

    layers: how many, if not few. stale_file: another checkpoint's shard lies beside, which the index does not name.
    """
    defaults = {"style": style, "widths": "distinct", "shards": 2, "shuffled": False}
    recipe = defaults | recipe
    return Case(f"load-gemma4-{style}{tail}", "load", "load.whole", recipe, tier)


LOAD = (
    _load("packed", "-one-file", tier="smoke", shards=1),
    _load("packed", "-two-shards"),
    _load("packed", "-square-gate-up", widths="square-gate-up"),
    _load("packed", "-square-down", widths="square-down"),
    _load("packed", "-narrow", widths="narrow"),
    _load("packed", "-shuffled", shards=3, shuffled=True),
    _load("packed", "-eleven-layers", layers=11),
    _load("packed", "-stale-file", stale_file=True),
    _load("plain", "-one-file", shards=1),
    _load("plain", "-shuffled", shards=3, shuffled=True),
    _load("plain", "-square-gate-up", widths="square-gate-up"),
    _load("plain", "-square-down", widths="square-down"),
    _load("plain", "-narrow", widths="narrow"),
    _load("moe", "-two-shards"),
    _load("moe", "-shuffled-square-gate-up", shards=3, shuffled=True, widths="square-gate-up"),
    _load("moe-packed", "-two-shards"),
    _load("multimodal-packed", "-two-shards"),
    _load("multimodal-plain", "-shuffled", shards=3, shuffled=True),
    _load("multimodal-moe", "-square-down", widths="square-down"),
)

LOAD_TWICE = (_load("packed", "-twice"), _load("plain", "-twice", shards=3))


# What is too much in the checkpoint: the model of its config is loaded whole and right without.
LENIENT = dict.fromkeys(
    ("unknown-suffix", "unknown-tensor", "unknown-router-tensor", "extra-expert", "up-beside"),
    "every parameter that the config asks for is there and fits; the engine left out what it has no place for",
) | {
    name: "published checkpoints carry draft layers that the config's number of layers does not count"
    for name in ("extra-layer", "far-layer")
}


def _broken(style: str, damage: str, tier: str = "core") -> Case:
    recipe = {"style": style, "widths": "distinct", "shards": 2, "shuffled": False, "damage": damage}
    return Case(f"load-gemma4-{style}-{damage}", "load", "load.refuse-broken", recipe, tier, LENIENT.get(damage, ""))


BROKEN = (
    _broken("plain", "missing-expert", "smoke"),
    _broken("moe", "missing-expert"),
    _broken("plain", "missing-up"),
    _broken("plain", "extra-expert"),
    _broken("plain", "short-expert"),
    _broken("plain", "wide-expert"),
    _broken("plain", "unknown-suffix"),
    _broken("packed", "unknown-tensor"),
    _broken("packed", "up-beside"),
    _broken("packed", "unknown-router-tensor"),
    _broken("packed", "extra-layer"),
    _broken("packed", "far-layer"),
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

# What only some families have is missing, in every layer: nothing else says that it belongs there.
INCOMPLETE = tuple(
    Case(
        f"load-{family.replace('_', '-')}-without-{missing.replace('.', '-').replace('_', '-')}",
        "load",
        "load.refuse-broken",
        {"family": family.replace("_", "-"), "model_type": family, "missing": missing},
    )
    for family, missing in (
        ("deepseek_v3", "router.selection_bias"),
        ("deepseek_v3", "shared.w2"),
        ("gpt_oss", "experts.b2"),
        ("gpt_oss", "router.bias"),
        ("qwen2_moe", "shared.gate"),
        ("mixtral", "experts.w2"),
    )
    if family in RECORDS
)

OF_FAMILIES = of_families("load", "load.whole")
# As the publishers wrote them, where transformers 5 writes them otherwise.
PUBLISHED = tuple(
    Case(
        f"load-{record.slug}-published",
        "load",
        "load.whole",
        {"family": record.slug, "model_type": record.model_type, "form": "published"},
        "full",
    )
    for record in RECORDS.values()
    if record.names is not None and (record.names.published or record.names.once_transposed)
)
# What a config need not say, and a loader must not lean on.
VERSION = "transformers_version"
UNSAID = tuple(
    replace(case, id=f"{case.id}-without-version", tier="full", recipe={**case.recipe, "unsaid": VERSION})
    for case in OF_FAMILIES
    if case["form"] == "hub" and case["family"] in ("qwen3-vl-moe", "mixtral", "deepseek-v3")
)


def _beside(slug: str, beside: str, tier: str) -> Case:
    """beside: what the folder has that is of no layer of the model: a draft layer, or the same in another form."""
    model_type = slug.replace("-", "_")
    recipe = {"family": slug, "model_type": model_type, "form": "hub", "beside": beside}
    return Case(f"load-{slug}-beside-{beside}", "load", "load.whole", recipe, tier)


BESIDE = tuple(
    _beside(slug, beside, tier)
    for slug, beside, tier in (
        ("deepseek-v3", "draft", "core"),
        ("glm4-moe", "draft", "full"),
        ("qwen3-next", "draft-apart", "full"),
        ("mixtral", "consolidated", "core"),
    )
    if slug in BY_SLUG
)


# Forms that hold what no release does, and an engine may refuse by name.
UNPUBLISHED = {
    "fp8-block-e8m0": "DeepSeek-V4 alone was published with scales of that name, and this one may be refused by name",
    "fp8-group": "no release has fp8 in groups of columns, and this one may be refused by name",
    "fp8-tensor-halves": "no release of a packed family has two scales, and this one may be refused by name",
    "fp8-block-halves": "no release of a packed family has a tile that is cut, and this one may be refused by name",
    "int3-packed-zero": "no release has codes of three bits, and an engine may refuse them by name",
    "int4-packed-tensor": "no release has packed weights with one scale, and this one may be refused by name",
    "int4-packed-no-order": "what nothing was ordered by need not be stored, and may be refused by name",
    "awq-channel": "releases of AWQ have groups, and this one may be refused by name",
}


def _stored(
    form: str, family: str, layout: str, tier: str, left: tuple[str, ...] = (), what: str = "", **recipe: object
) -> Case:
    """left: which experts or projections were left as floats. what: ends the id; recipe: what else is special.

    width: of experts that tiles and groups do not divide. shuffled: tensors are dealt out to three files by turns, as
    weights and what belongs to them lie where a file is full.
    """
    recipe = {"stored": form, "codes": FORMS[form][0], "model_type": family, "layout": layout, "left": left, **recipe}
    place = "mixed" if left else layout
    tail = "-" + "-".join(name.strip(".").replace(".", "-").replace("_", "-") for name in left) if left else ""
    is_published = family != "granitemoe" or (layout == "split" and FORMS[form][1]["quant_method"] in SPLITS)
    lenient = "" if is_published else "no release of a packed family lies so, and this one may be refused by name"
    if "width" in recipe:
        lenient = "no release has experts that a tile or group is cut at"
    return Case(
        f"load-stored-{form}-{place}{tail}{what}",
        "load",
        "load.stored",
        recipe,
        tier,
        UNPUBLISHED.get(form, lenient),
    )


# Quantisers that split packed experts: sglang#37679, vllm#54047.
SPLITS = ("compressed-tensors", "modelopt")
# What each form looks like by expert is judged in every run, one of its kind.
_CORE = ("fp8-block", "fp8-number", "int4-packed-zero", "gptq", "gptq-in-order", "nvfp4", "nvfp4-modelopt")
# Form, family, layout, tier, what was left as floats, what ends the id, and what else is special.
_SPECIAL: tuple[tuple[str, str, str, str, tuple[str, ...], str, Mapping[str, object]], ...] = (
    ("fp8-block", "qwen3_moe", "by-expert", "core", (), "-shuffled", {"shuffled": True}),
    ("gptq", "qwen3_moe", "by-expert", "full", (), "-shuffled", {"shuffled": True}),
    ("fp8-block", "deepseek_v3", "by-expert", "core", (), "-draft", {}),
    ("fp8-block", "deepseek_v3", "by-expert", "full", ("shared_experts",), "-draft", {}),
    *(
        (form, family, layout, "core" if form == "fp8-block" else "full", (), f"-of-{width}", {"width": width})
        for form, family, layout, width in (
            ("fp8-block", "qwen3_moe", "by-expert", 40),
            ("fp8-block", "granitemoe", "packed", 40),
            ("fp8-block-halves", "granitemoe", "packed", 40),
            ("mxfp8", "qwen3_moe", "by-expert", 40),
            ("mxfp4", "qwen3_moe", "by-expert", 40),
            ("nvfp4", "qwen3_moe", "by-expert", 40),
            ("nvfp4-modelopt", "qwen3_moe", "by-expert", 40),
            ("int4-packed-zero", "qwen3_moe", "by-expert", 36),
            ("int8-packed-zero", "qwen3_moe", "by-expert", 38),
        )
    ),
)
STORED = tuple(
    _stored(form, family, layout, tier, left)
    for form, family, layout, tier, left in (
        ("mxfp4-blocks", "gpt_oss", "packed", "core", ()),
        *(
            (form, family, layout, "core" if layout == "by-expert" and form in _CORE else "full", ())
            for family, layout in (("qwen3_moe", "by-expert"), ("granitemoe", "packed"), ("granitemoe", "split"))
            for form in FORMS
            if form not in PACKED_ALONE
        ),
        ("fp8-channel", "qwen3_moe", "by-expert", "core", ("experts.1.",)),
        ("fp8-channel", "qwen3_moe", "by-expert", "full", ("down_proj",)),
        ("int4-packed", "qwen3_moe", "by-expert", "full", ("experts.3.",)),
        ("nvfp4", "qwen3_moe", "by-expert", "full", ("experts.0.", "experts.2.")),
        ("fp8-fbgemm", "llama4_text", "packed", "core", ("shared_expert",)),
        ("fp8-tensor-halves", "granitemoe", "packed", "full", ()),
    )
    if family in RECORDS
) + tuple(
    _stored(form, family, layout, tier, left, what, **special)
    for form, family, layout, tier, left, what, special in _SPECIAL
    if family in RECORDS
)

CASES = (*LOAD, *LOAD_TWICE, *BROKEN, *INCOMPLETE, *OF_FAMILIES, *PUBLISHED, *UNSAID, *BESIDE, *STORED)
