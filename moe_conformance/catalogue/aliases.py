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

# Case ids are permanent; one that had to change stands here for good.
CASES: Mapping[str, str] = {"config-vitpose-one-expert": "config-vitpose-backbone-one-expert"}
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
