"""Checkpoint names reach one parameter each, in every naming style."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import CheckpointName, Engine
from moe_conformance.errors import CheckpointError, Nonconformance
from moe_conformance.judging import compare
from moe_conformance.suites.load import checkpoint
from moe_conformance.suites.load.cases import WIDTHS
from moe_conformance.suites.remap.cases import (
    IDEMPOTENT,
    ONE_TARGET,
    PACKED_PARTS,
    PARTS,
    ROUTER,
    spell,
    spell_router,
)

LAYERS, EXPERTS = 12, 12  # indices of one and of two digits, the one a prefix of the other
SOME = (0, 1, 10, 11)
_SCALARS = ("weight_scale_2", "input_scale", "weight_global_scale")

# A tensor, whatever its name: layer, part, expert (None: packed or a router's), suffix.
Tensor = tuple[int, str, int | None, str]


def _shape(part: str, suffix: str, packed: bool) -> tuple[int, ...]:
    """Widths of the "distinct" config; a packed tensor has the experts first."""
    hidden, width = WIDTHS["distinct"]
    matrix = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}.get(part, (width, hidden))
    full: tuple[int, ...] = {"bias": matrix[:1], "g_idx": matrix[1:]}.get(suffix, matrix)
    if suffix in _SCALARS:
        full = ()
    return (EXPERTS, *full) if packed else full


def _names(style: str, suffixes: Sequence[str]) -> dict[Tensor, CheckpointName]:
    """Expert and router tensors of some layers, as a checkpoint of this style names them."""
    packed = "packed" in style.split("-")
    parts, experts = (PACKED_PARTS, (None,)) if packed else (PARTS, SOME)
    named: dict[Tensor, CheckpointName] = {
        (layer, part, expert, suffix): CheckpointName(
            spell(style, layer, part, expert, suffix), _shape(part, suffix, packed)
        )
        for layer in SOME
        for part in parts
        for expert in experts
        for suffix in suffixes
    }
    shapes = dict(zip(ROUTER, ((EXPERTS, 64), (64,), (EXPERTS,)), strict=True))
    for layer in SOME:
        for part in ROUTER:
            named[layer, part, None, ""] = CheckpointName(spell_router(style, layer, part), shapes[part])
    return named


def _config(style: str) -> dict[str, Any]:
    return checkpoint.config("distinct", "multimodal" in style, LAYERS, EXPERTS)


def _remap(engine: Engine, style: str, named: dict[Tensor, CheckpointName]) -> dict[Tensor, tuple[str, ...]]:
    try:
        got = engine.remap(_config(style), list(named.values()))
    except CheckpointError as error:
        raise Nonconformance(f"names of style {style}: refused ({error}), want engine names") from error
    targets = {}
    for tensor, entry in named.items():
        mapped = got.get(entry.name)
        if not isinstance(mapped, tuple) or not mapped:
            raise Nonconformance(f"{entry.name}: got {mapped!r}, want a tuple of one or more engine names")
        targets[tensor] = mapped
    return targets


def _slots(targets: Sequence[str]) -> set[str]:
    """Targets without their ".weight": an engine may write a bare name for the weights themselves."""
    return {target.removesuffix(".weight") for target in targets}


def _unpacked(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a packed one holds, for the experts that are tried."""
    layer, part, _, suffix = tensor
    for expert in SOME:
        for half in ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,):
            yield layer, half, expert, suffix


@check([case for case in ONE_TARGET if case["baseline"]])
def test_every_style_of_a_tensor_reaches_one_target(engine: Engine, case: Case) -> None:
    """Packed against single: an engine that unpacks must reach the names of single experts; one that does not may."""
    style, baseline = case["style"], case["baseline"]
    named = _names(style, case["suffixes"])
    want = _remap(engine, baseline, _names(baseline, case["suffixes"]))
    for tensor, targets in _remap(engine, style, named).items():
        what = f"targets of {named[tensor].name}, against style {baseline}"
        if tensor in want:
            differ = _slots(targets) ^ _slots(want[tensor])
            if differ:
                raise Nonconformance(f"{what}: got {targets[:2]}, want {want[tensor][:2]}; {len(differ)} names differ")
        elif len(targets) > 1:
            for single in _unpacked(tensor):
                absent = _slots(want[single]) - _slots(targets)
                if absent:
                    raise Nonconformance(f"{what}: got {targets[:3]} and more, want {sorted(absent)} among them")


@check(ONE_TARGET)
def test_two_tensors_never_share_a_target(engine: Engine, case: Case) -> None:
    """And a target repeats no segment of its path and keeps the layer and the expert."""
    named = _names(case["style"], case["suffixes"])
    owner: dict[str, Tensor] = {}
    for tensor, targets in _remap(engine, case["style"], named).items():
        layer, _, expert, suffix = tensor
        for target in targets:
            if owner.setdefault(target, tensor) != tensor:
                raise Nonconformance(f"{target}: got both {owner[target]} and {tensor}, want one of them")
            segments = target.split(".")
            doubled = [a for a, b in itertools.pairwise(segments) if a == b and not a.isdecimal()]
            compare.same(f"segments that follow themselves in {target}", doubled, [])
            numbers = [int(segment) for segment in segments if segment.isdecimal()]
            if numbers:
                compare.same(f"layer in {target}", numbers[0], layer)
            if len(numbers) == 2 and expert is not None:
                compare.same(f"expert in {target}", numbers[1], expert)
        if expert is None and suffix and len(targets) > 1:
            copies = 2 if tensor[1] == "gate_up_proj" else 1
            compare.same(f"names that {named[tensor].name} unpacks to", len(set(targets)), EXPERTS * copies)
    # Attention, norms and the dense MLP, whose parts are called as an expert's.
    beside = _beside(case["style"])
    for name, targets in engine.remap(_config(case["style"]), beside).items():
        for target in targets:
            if target in owner:
                raise Nonconformance(f"{target}: got both {owner[target]} and {name}, want one of them")


def _beside(style: str) -> list[CheckpointName]:
    """The tensors of two layers that are neither experts nor router."""
    named = checkpoint.shapes("distinct", 2)
    prefix = "model.language_model." if "multimodal" in style else "model."
    return [
        CheckpointName(prefix + name.removeprefix("model."), shape)
        for name, shape in named.items()
        if ".experts." not in name and ".router." not in name
    ]


@check(IDEMPOTENT)
def test_mapping_twice_equals_mapping_once(engine: Engine, case: Case) -> None:
    """An engine whose own names are no checkpoint names may refuse them, but must not map them elsewhere."""
    named = _names(case["style"], case["suffixes"])
    own: dict[str, tuple[int, ...]] = {}
    for tensor, targets in _remap(engine, case["style"], named).items():
        shape = named[tensor].shape
        if len(targets) > 1:
            shape = (shape[1] // 2 if tensor[1] == "gate_up_proj" else shape[1], *shape[2:])
        own |= dict.fromkeys(targets, shape)
    try:
        again = engine.remap(_config(case["style"]), [CheckpointName(*entry) for entry in own.items()])
    except (CheckpointError, LookupError, ValueError):
        return
    for name in own:
        compare.same(f"{name} mapped again", again.get(name), (name,))
