"""Which tensor belongs where: to an expert's matrix in a layer, or by the stem of its name to one outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from moe_conformance.checkpoints.findings import Findings
from moe_conformance.checkpoints.forms import CARRIERS, Held
from moe_conformance.checkpoints.headers import Stored
from moe_conformance.checkpoints.layout import CUT, NUMBER, Layout, Spelling, Spot, ends
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
    """What a layer holds in one spelling: each expert's matrix, or one of all, under None."""

    spelling: Spelling
    experts: Experts


# stack, layer, pattern of the spelling.
Key = tuple[Stack, int, str]
Outside = dict[str, dict[str, Stored]]


class Sorted(NamedTuple):
    """groups: what the MoE layers hold, by layer and spelling. outside: what is elsewhere, by stem and end."""

    groups: dict[Key, Group]
    outside: Outside


def sorted_out(tensors: Mapping[str, Stored], layout: Layout | None, findings: Findings) -> Sorted:
    """Every tensor in its place: in the MoE layers, or by the stem of its name."""
    spots: dict[tuple[str, ...], Spot | None] = {}
    raw: dict[tuple[Stack, str, Spelling], list[tuple[str | None, str, Stored]]] = {}
    outside: Outside = {}
    strangers: list[tuple[Spot, str, Stored]] = []
    stems: dict[tuple[str, ...], tuple[int, str]] = {}
    split = CUT.split
    for name, entry in tensors.items():
        cut = split(name)
        words = tuple(cut[::2])
        if words in spots:
            spot = spots[words]
        else:
            spot = spots[words] = layout.spot(name) if layout else None
        if spot is not None and any(cut[2 * at + 1] != text for at, text in spot.fixed):
            spot = layout.spot(name) if layout else None
        if spot is None:
            found = stems.get(words)
            if found is None:
                stem, end = next(ends(name), (name, ""))
                found = stems[words] = len(name) - len(stem), end
            outside.setdefault(name[: len(name) - found[0]], {}).setdefault(found[1], entry)
            continue
        layer = cut[2 * spot.layer + 1]
        if spot.spelling is None:
            strangers.append((spot, layer, entry))
            continue
        expert = None if spot.expert is None else cut[2 * spot.expert + 1]
        raw.setdefault((spot.stack, layer, spot.spelling), []).append((expert, spot.end, entry))
    groups = dict(_grouped(raw, findings))
    _strangers(strangers, layout, groups, findings)
    return Sorted(groups, outside)


def _grouped(
    raw: Mapping[tuple[Stack, str, Spelling], list[tuple[str | None, str, Stored]]], findings: Findings
) -> Iterator[tuple[Key, Group]]:
    for (stack, digits, spelling), held in raw.items():
        if not NUMBER.fullmatch(digits):
            for _, _, entry in held:
                _number(entry, findings)
            continue
        experts: Experts = {}
        for expert, end, entry in held:
            if expert is None:
                number = None
            elif NUMBER.fullmatch(expert):
                number = int(expert)
            else:
                _number(entry, findings)
                continue
            matrix = experts.get(number)
            if matrix is None:
                matrix = experts[number] = Matrix({})
            other = matrix.stored.setdefault(end, entry)
            if other is not entry:
                again(other, entry, findings)
        yield (stack, int(digits), spelling.pattern), Group(spelling, experts)


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


def _strangers(
    strangers: list[tuple[Spot, str, Stored]], layout: Layout | None, groups: Mapping[Key, Group], findings: Findings
) -> None:
    """Names within an MoE block that are in no spelling of the family."""
    if layout is None:
        return
    routed = {(stack, index) for stack, index, _ in groups}
    for spot, digits, entry in strangers:
        index = int(digits) if NUMBER.fullmatch(digits) else -1
        layer, is_draft = layout.layer(spot.stack, index)
        if layer is None or is_draft or (spot.stack, index) not in routed:
            continue
        if any(spot.end == known or spot.end.startswith(f"{known}.") for known in layout.absent):
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
    if end in OF_THE_WEIGHT:
        return f"{entry.name}.{end}"
    own = next(known for known, held in matrix.stored.items() if held is entry)
    stem = entry.name.removesuffix(own) if own and entry.name.endswith(own) else f"{entry.name}_"
    return f"{stem}{end}"
