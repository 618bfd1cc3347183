"""Sorts tensors: into an expert's matrix in a layer, or outside the MoE layers by the stem of the name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from moe_conformance.checkpoints.findings import Findings
from moe_conformance.checkpoints.forms import CARRIERS, Held
from moe_conformance.checkpoints.headers import Stored
from moe_conformance.checkpoints.layout import CUT, NUMBER, TORCHAO, Layout, Spelling, Spot, ends
from moe_conformance.model.families.naming import Stack
from moe_conformance.quote import plainly

# What bitsandbytes adds to the weight's own name.
OF_THE_WEIGHT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")


class Matrix(NamedTuple):
    """The tensors of one matrix: by the end of each one's name."""

    stored: dict[str, Stored]

    @property
    def members(self) -> dict[str, Held]:
        return {end: Held(entry.dtype, entry.shape) for end, entry in self.stored.items()}

    @property
    def carrier(self) -> Stored:
        """The tensor that the matrix is called by."""
        return next((self.stored[end] for end in CARRIERS if end in self.stored), next(iter(self.stored.values())))


Experts = dict[int | None, Matrix]


class Group(NamedTuple):
    """The tensors of a layer in one spelling: each expert's matrix, or one matrix of all experts under None."""

    spelling: Spelling
    experts: Experts


# stack, layer, pattern of the spelling.
Key = tuple[Stack, int, str]
Outside = dict[str, dict[str, Stored]]


class Sorted(NamedTuple):
    """groups: what the MoE layers hold, by layer and spelling. outside: what is elsewhere, by stem and end.

    ends: of all names. strange: the layers whose MoE blocks have names that are in no spelling of the family.
    """

    groups: dict[Key, Group]
    outside: Outside
    ends: frozenset[str]
    strange: frozenset[tuple[Stack, int]] = frozenset()


class _Kind(NamedTuple):
    """Names that differ in their numbers alone. spot: None outside the MoE blocks; then cut: how much their end takes.

    layer, expert: where these numbers are among the parts of a name. held: by layer, expert and tensor.
    """

    spot: Spot | None
    end: str
    cut: int
    layer: int
    expert: int
    held: dict[str, list[tuple[str, Stored]]]


def sorted_out(
    tensors: Mapping[str, Stored], layout: Layout | None, findings: Findings, is_open: bool = False
) -> Sorted:
    """Sort every tensor into the MoE layers, or by the stem of its name.

    is_open: quantised by a method that is not known, whose names are not either.
    """
    kinds: dict[tuple[str, ...], _Kind] = {}
    others: list[_Kind] = []
    outside: Outside = {}
    split = CUT.split
    for name, entry in tensors.items():
        parts = split(name)
        words = tuple(parts[::2])
        kind = kinds.get(words)
        if kind is None:
            kind = kinds[words] = _kind(name, layout)
        if kind.spot is None:
            outside.setdefault(name[: len(name) - kind.cut], {}).setdefault(kind.end, entry)
            continue
        if kind.spot.fixed and any(parts[2 * at + 1] != text for at, text in kind.spot.fixed):
            kind = _kind(name, layout)
            if kind.spot is None:
                outside.setdefault(name[: len(name) - kind.cut], {}).setdefault(kind.end, entry)
                continue
            others.append(kind)
        layer = parts[kind.layer]
        held = kind.held.get(layer)
        if held is None:
            held = kind.held[layer] = []
        held.append((parts[kind.expert], entry))
    inside = [kind for kind in (*kinds.values(), *others) if kind.spot is not None]
    groups = _grouped(inside, findings)
    if not is_open:
        _strangers(inside, layout, groups, findings)
    strange = frozenset(
        (kind.spot.stack, int(digits))
        for kind in inside
        if kind.spot is not None and kind.spot.spelling is None
        for digits in kind.held
        if NUMBER.fullmatch(digits)
    )
    return Sorted(groups, outside, frozenset(kind.end for kind in (*kinds.values(), *others)), strange)


def _kind(name: str, layout: Layout | None) -> _Kind:
    spot = layout.spot(name) if layout else None
    if spot is None:
        stem, end = next(ends(name), (name, ""))
        return _Kind(None, end, len(name) - len(stem), 0, 0, {})
    # What is no expert's has the text before the first number there, which is no number.
    return _Kind(spot, spot.end, 0, 2 * spot.layer + 1, 0 if spot.expert is None else 2 * spot.expert + 1, {})


def _grouped(kinds: Iterable[_Kind], findings: Findings) -> dict[Key, Group]:
    groups: dict[Key, Group] = {}
    numbers: dict[str, int] = {}
    for kind in kinds:
        spot, end = kind.spot, kind.end
        if spot is None or spot.spelling is None:
            continue
        for digits, held in kind.held.items():
            if not NUMBER.fullmatch(digits):
                for _, entry in held:
                    _number(entry, findings)
                continue
            key = spot.stack, int(digits), spot.spelling.pattern
            experts = groups.setdefault(key, Group(spot.spelling, {})).experts
            for expert, entry in held:
                number = numbers.get(expert) if kind.expert else None
                if number is None and kind.expert:
                    if not NUMBER.fullmatch(expert):
                        _number(entry, findings)
                        continue
                    number = numbers[expert] = int(expert)
                matrix = experts.get(number)
                if matrix is None:
                    experts[number] = Matrix({end: entry})
                elif matrix.stored.setdefault(end, entry) is not entry:
                    again(matrix.stored[end], entry, findings)
    return groups


def _number(entry: Stored, findings: Findings) -> None:
    do = "rename the tensor"
    findings.add(
        "extra", entry.file, entry.name, got="a number that no layer or expert has", want="0, 1, 2, ...", do=do
    )


def again(held: Stored, entry: Stored, findings: Findings) -> None:
    findings.add(
        "doubled",
        entry.file,
        entry.name,
        got=f"the same weights as {plainly(held.name)} in {plainly(held.file)}",
        want="each weight once",
        do="remove one of them: which is read depends on the engine",
    )


def _strangers(kinds: Iterable[_Kind], layout: Layout | None, groups: Mapping[Key, Group], findings: Findings) -> None:
    """Names within an MoE block that are in no spelling of the family."""
    if layout is None:
        return
    routed = {(stack, index) for stack, index, _ in groups}
    for kind in kinds:
        if kind.spot is None or kind.spot.spelling is not None:
            continue
        is_absent = any(kind.end == known or kind.end.startswith(f"{known}.") for known in layout.absent)
        for digits, held in kind.held.items():
            index = int(digits) if NUMBER.fullmatch(digits) else -1
            layer, is_draft = layout.layer(kind.spot.stack, index)
            if layer is None or is_draft or (kind.spot.stack, index) not in routed:
                continue
            for _, entry in held:
                if is_absent:
                    findings.add(
                        "contradiction",
                        entry.file,
                        entry.name,
                        got="a tensor of a part that config.json switches off",
                        want="none, or the key that switches it on",
                        do="take config.json from where the tensors come from",
                    )
                else:
                    findings.add(
                        "extra",
                        entry.file,
                        entry.name,
                        got="a name in the MoE block that this family does not have",
                        want="the family's own names",
                        do="rename it or remove it: engines that read it by name do not find it",
                    )


def beside(entry: Stored, end: str, matrix: Matrix) -> str:
    """The name of a tensor that is not there, of the matrix that the entry is of."""
    own = next(known for known, held in matrix.stored.items() if held is entry)
    if entry.name.rpartition(".")[2].startswith("_"):
        written = {meant: word for word, meant in TORCHAO.items()}
        if end in written and entry.name.endswith(f"_{written.get(own)}"):
            return entry.name.removesuffix(written[own]) + written[end]
    if end in OF_THE_WEIGHT:
        return f"{entry.name}.{end}"
    if own in OF_THE_WEIGHT and entry.name.endswith(f".weight.{own}"):
        return entry.name.removesuffix(f".{own}")
    stem = entry.name.removesuffix(own) if own and entry.name.endswith(own) else f"{entry.name}_"
    # What is put after an underscore belongs to a tensor that is called by the stem alone.
    return stem.removesuffix("_") if end == "weight" and stem.endswith("_") else f"{stem}{end}"
