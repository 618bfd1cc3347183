"""Names that changed: old -> new, in one table. Old ones work wherever a name is given or read back.

That is in --case and --class, known-failure files, `explain`, and verdict streams of older releases that `diff` reads.
A case's class and stage need no entry: a stream that is read back takes both from the catalogue of today.
This module imports no table that it renames, so that each of them may import it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from difflib import get_close_matches
from types import MappingProxyType

from moe_conformance.errors import UsageError

# Names up to which a message lists all that there are.
LISTED = 40

# Cases that varied one size, dtype or part at a time -> those in which each two values meet.
_SIZES: Mapping[str, str] = {
    "align-1-tokens": "align-sizes-t1-e60-k22-block64-int64",
    "align-7-tokens": "align-sizes-t7-e60-k5-block128-int64",
    "align-131-tokens": "align-sizes-t131-e60-k8-block8-int32",
    "align-block-8": "align-sizes-t131-e60-k8-block8-int32",
    "align-block-64": "align-sizes-t1-e60-k22-block64-int64",
    "align-block-128": "align-sizes-t7-e60-k5-block128-int64",
    "align-e5-k2": "align-sizes-t131-e5-k5-block1-int64",
    "align-e5-k5-int64": "align-sizes-t131-e5-k5-block1-int64",
    "align-e60-k22-int64": "align-sizes-t1-e60-k22-block64-int64",
    "align-e60-k8-1048-pairs": "align-sizes-t131-e60-k8-block8-int32",
    "align-e128-k8-int64": "align-sizes-t131-e896-k8-block128-int64",
    "align-e257-k22": "align-sizes-t131-e257-k22-block128-int32",
    "align-e257-k22-7-tokens-block-64": "align-sizes-t7-e257-k22-block1-int32",
    "align-e896-k16": "align-sizes-t131-e896-k8-block128-int64",
    "align-e896-k22-int64-7-tokens": "align-sizes-t7-e896-k22-block8-int64",
    "experts-1-tokens": "experts-sizes-t1-e24-k2-d72-f32-fp32-silu",
    "experts-2-tokens": "experts-sizes-t520-e24-k10-d64-f32-bf16-silu",
    "experts-131-tokens-bias-not-gated-bf16": "experts-sizes-t17-e5-k1-d20-f7-bf16-relu2-not-gated",
    "experts-70-tokens-k10": "experts-sizes-t70-e24-k10-d72-f36-fp16-relu2-not-gated",
    "experts-hot-fp16": "experts-sizes-t520-e24-k22-d20-f36-fp16-swiglu-oai",
    "experts-hundreds": "experts-sizes-t17-e256-k10-d20-f36-fp32-silu",
    "experts-hundreds-bias": "experts-sizes-t1-e256-k10-d64-f7-fp16-silu-bias",
    "experts-hundreds-one-token": "experts-sizes-t1-e256-k22-d64-f36-bf16-relu2-not-gated",
    "experts-silu-bf16": "experts-sizes-t520-e24-k10-d64-f32-bf16-silu",
    "experts-silu-fp16": "experts-sizes-t70-e24-k1-d20-f7-fp16-silu",
    "experts-relu2-not-gated-bf16": "experts-sizes-t17-e5-k1-d20-f7-bf16-relu2-not-gated",
    "experts-relu2-not-gated-fp16": "experts-sizes-t70-e24-k10-d72-f36-fp16-relu2-not-gated",
    **{f"experts-gelu-tanh-{dtype}": "experts-narrow-gelu-tanh" for dtype in ("bf16", "fp16")},
    **{
        f"experts-tiny-{name}": f"experts-narrow-{name}"
        for name in (
            *("clamp-after", "clamp-before", "gelu", "gelu-not-gated", "gelu-tanh", "output-norm", "relu", "relu2"),
            *("relu2-not-gated", "relu2-not-gated-bias", "silu-bias", "silu-not-gated", "softcap", "weight-on-input"),
            "weight-on-w2-input",
        )
    },
    "layer-hundreds-plain": "layer-sizes-t9-e256-k10-h20-f7-tile64-bf16-padded-hidden-padded-intermediate",
    "layer-hundreds-shared-padded-hidden-padded-intermediate": (
        "layer-sizes-t1-e256-k8-h72-f7-tile8-fp16-shared-padded-hidden-padded-intermediate"
    ),
    "layer-many-tokens-plain": "layer-sizes-t70-e24-k8-h64-f7-tile0-fp32-plain",
    "layer-many-tokens-shared": "layer-sizes-t70-e256-k2-h72-f36-tile0-fp32-shared",
    **{
        f"layer-equal-{parts}{padded}": f"layer-tiny-{parts}{padded}"
        for parts in ("shared", "latent", "shared-latent")
        for padded in ("", "-padded-hidden")
    },
    "layer-equal-plain": "layer-tiny-plain",
    "layer-equal-padded-hidden": "layer-tiny-padded-hidden",
    **{f"layer-tiny-bf16-{parts}": "layer-tiny-bf16-plain" for parts in ("latent", "shared", "shared-latent")},
    **{
        f"layer-tiny-bf16-{parts}padded-hidden": "layer-tiny-bf16-shared-latent-padded-hidden"
        for parts in ("", "latent-", "shared-")
    },
    **{f"layer-tiny-fp16-{parts}": "layer-tiny-fp16-shared" for parts in ("plain", "latent", "shared-latent")},
    **{
        f"layer-tiny-fp16-{parts}padded-hidden": "layer-tiny-fp16-latent-padded-hidden"
        for parts in ("", "shared-", "shared-latent-")
    },
}
# Case ids are permanent; one that had to change stands here for good.
CASES: Mapping[str, str] = {"config-vitpose-one-expert": "config-vitpose-backbone-one-expert", **_SIZES}
CLASSES: Mapping[str, str] = {}
# A clause begins with its stage, or with the subject that two stages share (capture, config, routing).
CLAUSES: Mapping[str, str] = {
    "config.resolve": "describe.resolve",
    "config.layers": "describe.layers",
    "config.both-sides": "capture-shape.both-sides",
    "closure.current-values": "router-module.current-values",
    "rows.own": "capture.own-rows",
    "rows.refuse-count": "capture.refuse-count",
    "replay.only-real-rows": "capture.only-real-rows",
    "replay.layers": "capture.layers",
    "replay.bounds": "capture.bounds",
    "replay.narrow": "capture.narrow",
    "replay.other-process": "capture.other-process",
    "padding.cut-before-add": "layer.cut-before-add",
    "padding.traceable": "layer.traceable",
    "routing.fused-shared": "route.fused-shared",
    "routing.padding-rows": "route.padding-rows",
    "routing.unique-ids": "route.unique-ids",
    "routing.family": "block.routing",
    "ranks.one-place": "expert-map.one-place",
    "ranks.sum": "shard.sum",
    "ranks.nothing-of-others": "shard.nothing-of-others",
    "ranks.out-of-range": "shard.out-of-range",
    "replicas.same-output": "shard.same-output",
    "replicas.choice": "replicate.choice",
    "replicas.load": "replicate.load",
    "shared.once": "shard.shared",
}
CHECKS: Mapping[str, str] = {}

_METHODS: Mapping[str, tuple[str, ...]] = {
    "softmax_topk": ("softmax", "not_renormalized"),
    "softmax_topk_renorm": ("softmax", "renormalize"),
    "gemma4": ("softmax", "renormalize", "per_expert_scale"),
}
# (stage, feature) -> what is declared instead; () where nothing is, because every engine must do it.
WORDS: Mapping[tuple[str, str], tuple[str, ...]] = {
    **{(stage, word): now for stage in ("route", "router_module", "layer") for word, now in _METHODS.items()},
    ("layer", "scale"): ("output_scale",),
    ("capture_session", "layer_bounds"): (),
    ("capture_store", "bounds"): (),
}


def current(
    what: str, got: Iterable[str], there: Collection[str], renamed: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """These names as they are now. Raises UsageError with the near matches where one does not exist."""
    names = [renamed.get(name, name) for name in got]
    for name in names:
        if name not in there:
            near = get_close_matches(name, there, n=3)
            want = ", ".join(near if len(there) > LISTED else there) or f"one of the {len(there)} that exist"
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{what}: got {name!r}, want {want}{guess}")
    return names


def renamed_word(stage: str, word: str) -> str | None:
    """What an adapter that declares an old feature should do, or None where the word was never one."""
    if (stage, word) not in WORDS:
        return None
    now = WORDS[stage, word]
    instead = f"declare {' and '.join(map(repr, now))} instead" if now else "take it out: every engine must do it"
    return f"{stage}: got feature {word!r}, which protocol 2 no longer has; {instead} (docs/migrating.md)"


def astray(
    cases: Container[str],
    classes: Container[str],
    clauses: Container[str],
    checks: Container[str],
    stages: Container[str],
    is_word: Callable[[str, str], bool],
) -> Iterator[str]:
    """Aliases that lead nowhere, or whose old name is still in use."""
    tables = (
        ("case", CASES, cases),
        ("class", CLASSES, classes),
        ("clause", CLAUSES, clauses),
        ("check", CHECKS, checks),
    )
    for what, table, there in tables:
        for old, new in table.items():
            if new not in there:
                yield f"alias of {what} {old!r}: got {new!r}, want a {what} that exists"
            if old in there:
                yield f"alias of {what} {old!r}: got the name of a {what} that exists, want a name that is free"
    for (stage, old), now in WORDS.items():
        if stage not in stages:
            yield f"alias of feature {old!r}: got stage {stage!r}, want one that exists"
        for new in now:
            if not is_word(stage, new):
                yield f"alias of feature {old!r} of {stage}: got {new!r}, want a feature that exists"
        if is_word(stage, old):
            yield f"alias of feature {old!r} of {stage}: got a feature that exists, want a word that is free"
