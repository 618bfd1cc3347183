"""Checkpoint names reach one parameter each, in every naming style."""

from __future__ import annotations

import itertools

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import CheckpointName, Engine, Target
from moe_conformance.errors import CheckpointError, Nonconformance, Unsupported
from moe_conformance.judging import compare
from moe_conformance.suites.load import checkpoint
from moe_conformance.suites.remap import families
from moe_conformance.suites.remap.cases import IDEMPOTENT, OF_FAMILIES, ONE_TARGET
from moe_conformance.suites.remap.names import (
    EXPERTS,
    Targets,
    Tensor,
    config_of,
    may_share,
    names_of,
    remapped,
    slots,
    unpacked,
)


@check([case for case in ONE_TARGET if case["baseline"]])
def test_every_style_of_a_tensor_reaches_one_target(engine: Engine, case: Case) -> None:
    """Packed against single: an engine that unpacks must reach the names of single experts; one that does not may."""
    style, baseline = case["style"], case["baseline"]
    named = names_of(style, case["suffixes"])
    want = remapped(engine, baseline, names_of(baseline, case["suffixes"]))
    for tensor, targets in remapped(engine, style, named).items():
        what = f"targets of {named[tensor].name}, against style {baseline}"
        if tensor in want:
            differ = slots(targets) ^ slots(want[tensor])
            if differ:
                raise Nonconformance(f"{what}: got {targets[:2]}, want {want[tensor][:2]}; {len(differ)} names differ")
        elif len(targets) > 1:
            for single in unpacked(tensor):
                absent = slots(want[single]) - slots(targets)
                if absent:
                    raise Nonconformance(f"{what}: got {targets[:3]} and more, want {sorted(absent)} among them")


@check(ONE_TARGET)
def test_two_tensors_never_share_a_target(engine: Engine, case: Case) -> None:
    """But as parts of a fused one. A target keeps the layer and the expert, and repeats no segment of its path."""
    named = names_of(case["style"], case["suffixes"])
    owners: dict[str | Target, list[Tensor]] = {}
    for tensor, targets in remapped(engine, case["style"], named).items():
        for target in dict.fromkeys(targets):
            owners.setdefault(target, []).append(tensor)
            _keeps_its_numbers(target, tensor)
        _unpacks_whole(named[tensor].name, tensor, targets)
    for target, tensors in owners.items():
        if not may_share(target, tensors):
            some = " and ".join(map(str, tensors[:2]))
            raise Nonconformance(f"{target}: got {len(tensors)} tensors, first {some}, want one, or all of a fused one")
    # Attention, norms and the dense MLP, whose parts are called as an expert's.
    beside = _beside(case["style"])
    for name, targets in engine.remap(config_of(case["style"]), beside).items():
        for target in targets:
            if target in owners:
                raise Nonconformance(f"{target}: got both {owners[target][0]} and {name}, want one of them")


def _keeps_its_numbers(target: str | Target, tensor: Tensor) -> None:
    layer, _, expert, _ = tensor
    name = target if isinstance(target, str) else target.parameter
    segments = name.split(".")
    doubled = [a for a, b in itertools.pairwise(segments) if a == b and not a.isdecimal()]
    compare.same(f"segments that follow themselves in {name}", doubled, [])
    numbers = [int(segment) for segment in segments if segment.isdecimal()]
    if numbers:
        compare.same(f"layer in {name}", numbers[0], layer)
    if len(numbers) == 2 and expert is not None:
        compare.same(f"expert in {name}", numbers[1], expert)
    if isinstance(target, Target) and None not in (target.expert, expert):
        compare.same(f"expert of {target}", target.expert, expert)


def _unpacks_whole(name: str, tensor: Tensor, targets: Targets) -> None:
    """A packed tensor that is unpacked goes to every expert, gate and up to one parameter or two."""
    _, part, expert, suffix = tensor
    count, want = len(set(targets)), {EXPERTS, 2 * EXPERTS} if part == "gate_up_proj" else {EXPERTS}
    if expert is None and suffix and count > 1 and count not in want:
        raise Nonconformance(f"names that {name} unpacks to: got {count}, want {' or '.join(map(str, sorted(want)))}")


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
    """An engine whose own names are no checkpoint names may refuse them, but must not map them elsewhere.

    A part of a fused parameter has no name that could be given again.
    """
    named = names_of(case["style"], case["suffixes"])
    own: dict[str, tuple[int, ...]] = {}
    for tensor, targets in remapped(engine, case["style"], named).items():
        shape = named[tensor].shape
        if len(targets) > 1:
            shape = (shape[1] // 2 if tensor[1] == "gate_up_proj" else shape[1], *shape[2:])
        own |= dict.fromkeys((target for target in targets if isinstance(target, str)), shape)
    if not own:
        raise Unsupported("remap: every tensor is a part of a fused parameter, and parts have no names to map again")
    try:
        again = engine.remap(config_of(case["style"]), [CheckpointName(*entry) for entry in own.items()])
    except (CheckpointError, LookupError, ValueError):
        return
    for name in own:
        if name in again:
            compare.same(f"{name} mapped again", again[name], (name,))


@check(OF_FAMILIES)
def test_every_tensor_of_every_family_has_its_target(engine: Engine, case: Case) -> None:
    """The names of modules are judged where those of the hub are right."""
    hub = families.placed(engine, case["family"], "hub")
    if case["form"] == "hub":
        families.each_has_its_own(hub)
        return
    try:
        families.each_has_its_own(hub)
    except Nonconformance as error:
        raise Unsupported(f"the hub's names of the same tensors are not right: {error}") from error
    modules = families.placed(engine, case["family"], case["form"])
    families.each_has_its_own(modules)
    families.reaches_the_same(modules, hub)
