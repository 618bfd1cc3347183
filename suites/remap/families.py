"""Which tensors of a family's checkpoint may have one target, and whether targets keep their tensors' numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from moe_conformance.engine import CheckpointName, Engine, Target
from moe_conformance.errors import CheckpointError, Nonconformance
from moe_conformance.judging import compare
from moe_conformance.model.families.families import BY_SLUG
from moe_conformance.oracle.naming import Entry, Form, Part, entries, layers
from moe_conformance.oracle.stored import tensor_of
from moe_conformance.suites.load.families import config_of
from moe_conformance.suites.remap.names import Targets, slots

# Shared experts that an engine may compute as further routed ones, and keep in their parameters.
FUSED = {"shared.w13": "experts.w13", "shared.w2": "experts.w2", "shared.w1": "experts.w1"}


class Placed(NamedTuple):
    """A tensor of a checkpoint and what the engine says of it. experts: how many its layer has."""

    entry: Entry
    targets: Targets

    @property
    def experts(self) -> int:
        return self.entry.layer.spec.num_experts


def placed(engine: Engine, slug: str, form: Form) -> list[Placed]:
    """What the engine says of each tensor of a tiny checkpoint of the family; of those that nothing reads, nothing."""
    record = BY_SLUG[slug]
    config = config_of(record)
    whole = {
        layer.prefix + name: torch.empty(shape, device="meta")
        for layer in layers(record, config)
        for name, shape in layer.tensors.items()
    }
    every = [entry for entry in entries(record, config, form) if entry.parts]
    names = [CheckpointName(entry.name, tuple(tensor_of(entry, whole).shape)) for entry in every]
    try:
        got = engine.remap(config, names)
    except CheckpointError as error:
        raise Nonconformance(f"names of {slug}: refused ({error}), want engine names") from error
    found = []
    for entry in every:
        mapped = got.get(entry.name)
        if not isinstance(mapped, tuple) or not mapped or not all(isinstance(t, str | Target) for t in mapped):
            raise Nonconformance(f"{entry.name}: got {mapped!r}, want a tuple of engine names or Targets, at least one")
        found.append(Placed(entry, mapped))
    return found


def each_has_its_own(found: list[Placed]) -> None:
    """No two tensors share a target, but as parts of a fused one, and each target keeps layer and expert."""
    owners: dict[str | Target, list[Placed]] = {}
    for tensor in found:
        for target in dict.fromkeys(tensor.targets):
            owners.setdefault(target, []).append(tensor)
            _keeps_its_numbers(target, tensor.entry)
    for target, sharing in owners.items():
        if len(sharing) > 1 and not _may_share(target, sharing):
            some = " and ".join(tensor.entry.name for tensor in sharing[:2])
            raise Nonconformance(f"{target}: got {len(sharing)} tensors, first {some}, want one, or all of a fused one")


def _keeps_its_numbers(target: str | Target, entry: Entry) -> None:
    name = target if isinstance(target, str) else target.parameter
    numbers = [int(segment) for segment in name.split(".") if segment.isdecimal()]
    if numbers:
        compare.same(f"layer in {name}, for {entry.name}", numbers[0], entry.layer.index)
    experts = {part.expert for part in entry.parts if part.expert is not None}
    if isinstance(target, Target) and target.expert is not None and experts:
        compare.same(f"expert of {target}, for {entry.name}", {target.expert}, experts)


def _may_share(target: str | Target, sharing: list[Placed]) -> bool:
    parts = [part for tensor in sharing for part in tensor.entry.parts]
    if len({_owner(part) for part in parts}) != 1:
        return False
    kinds, experts = {(part.tensor, part.half) for part in parts}, {part.expert for part in parts}
    whole = len(parts) == len(kinds) * len(experts) and (len(experts) == 1 or len(experts) == sharing[0].experts)
    if isinstance(target, Target):
        whole = whole and (target.expert is None or len(experts) == 1) and (target.shard is None or len(kinds) == 1)
    return whole


def _owner(part: Part) -> str:
    """The canonical tensor that a parameter with this part in it may be all of."""
    own = next((own for own in FUSED if part.tensor.endswith(f".{own}")), "")
    return part.tensor.removesuffix(own) + FUSED[own] if own else part.tensor


def reaches_the_same(found: list[Placed], want: list[Placed]) -> None:
    """Each part where the other spelling of it is; an engine that unpacks must reach the names of single experts.

    One that does not has packed parameters, which its names of single experts are parts of.
    """
    held = [(part, slots(tensor.targets)) for tensor in want for part in tensor.entry.parts]
    for tensor in found:
        got = slots(tensor.targets)
        for part in tensor.entry.parts:
            there = set().union(*(targets for other, targets in held if _overlap(part, other)))
            elsewhere = not _parameters(got) & _parameters(there)
            if elsewhere or (len(got) > 1 and there - got) or (len(got) == len(there) == 1 and got != there):
                raise Nonconformance(
                    f"{tensor.entry.name}: got {sorted(map(str, got))[:3]}, want {sorted(map(str, there))[:3]}"
                )


def _parameters(targets: Iterable[str | Target]) -> set[str]:
    return {target if isinstance(target, str) else target.parameter for target in targets}


def _overlap(part: Part, other: Part) -> bool:
    halves = part.half is None or other.half is None or part.half == other.half
    experts = part.expert is None or other.expert is None or part.expert == other.expert
    return part.tensor == other.tensor and halves and experts
