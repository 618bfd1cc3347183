"""Checks that every canonical tensor of every MoE layer is there exactly once, and whole."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import islice

from moe_conformance.checkpoints.findings import Findings
from moe_conformance.checkpoints.folder import CONFIG, Folder
from moe_conformance.checkpoints.layout import CUT, MTP, Layout
from moe_conformance.checkpoints.model import OTHER_MODEL
from moe_conformance.checkpoints.sorting import Group, Key, Matrix, again
from moe_conformance.model.families.naming import Piece, Stack
from moe_conformance.quote import FEW, plainly
from moe_conformance.reference_impl.checkpoint.places import Layer


class Coverage:
    """Finds what is missing and what is there twice."""

    def __init__(self, folder: Folder, layout: Layout, findings: Findings) -> None:
        self._folder, self._layout, self._findings = folder, layout, findings
        # Spellings that occur in some layer.
        self._used: set[str] = set()

    def judge(self, groups: Mapping[Key, Group], unknown: frozenset[tuple[Stack, int]] = frozenset()) -> None:
        """Every canonical tensor of every layer, whole and once.

        unknown: layers whose tensors go by names of a method of quantisation that is not known.
        """
        layout = self._layout
        self._used = {pattern for _, _, pattern in groups}
        by_layer: dict[tuple[Stack, int], list[Group]] = {}
        for (stack, index, _), group in groups.items():
            by_layer.setdefault((stack, index), []).append(group)
        for place, layer in layout.layers.items():
            if place in unknown:
                continue
            self._covered(place, layer, by_layer.get(place, []))
        for place, held in by_layer.items():
            draft, is_draft = layout.layer(*place)
            routed = any("experts." in piece.target for group in held for piece in group.spelling.pieces)
            if is_draft and draft is not None and routed and place not in unknown:
                self._covered(place, draft, held)

    def _covered(self, place: tuple[Stack, int], layer: Layer, held: list[Group]) -> None:
        stack, index = place
        routed = [g for g in held if any(".experts." in f".{piece.target}" for piece in g.spelling.pieces)]
        if not routed:
            self._no_experts(stack, index, layer)
            return
        if not any(group.experts for group in held):
            return  # none can be read, and each has a finding of its own
        before = self._before(stack, index, held)
        for target in layer.tensors:
            halves: tuple[int | None, ...] = (0, 1) if target.rpartition(".")[2] in ("w13", "b13") else (None,)
            for half in halves:
                self._filled(before, layer, target, half, held)

    def _no_experts(self, stack: Stack, index: int, layer: Layer) -> None:
        """One finding for the layer, not one for each of its experts."""
        if not self._folder.whole:
            return  # they may be in a shard that was not read, which has a finding of its own
        place = f"{self._layout.names.prefix}{stack.path}.{index}.{stack.inner}"
        dense = self._dense.get(f"{self._layout.names.prefix}{stack.path}.{index}.")
        got = "no experts" + (f"; {plainly(dense)} in their place" if dense else "")
        if not self._used and self._elsewhere:
            got = f"no experts by that name; {plainly(self._elsewhere)} elsewhere"
        want = f"{layer.sizes.experts} experts in this layer, as config.json says"
        kind = "contradiction" if dense else "missing"
        do = OTHER_MODEL if dense else "download the missing shards, or mend the export"
        self._findings.add(kind, CONFIG, place, got=got, want=want, do=do)

    @cached_property
    def _dense(self) -> dict[str, str]:
        """A tensor of a dense MLP in each layer, by what precedes the layer's names."""
        names = (name for name in self._folder.tensors if "gate_proj" in name and ".experts." not in name)
        return {name[: match.end() + 1]: name for name in names if (match := CUT.search(name))}

    @cached_property
    def _elsewhere(self) -> str | None:
        """An expert, wherever it is."""
        return next((name for name in self._folder.tensors if ".experts." in name), None)

    def _before(self, stack: Stack, index: int, held: list[Group]) -> str:
        """What precedes the layer's names."""
        name = next(matrix.carrier.name for group in held for matrix in group.experts.values())
        middle = f".{index}."
        inner = self._layout.own.inner if stack is MTP else stack.inner
        return name[: name.index(middle) + len(middle)] + inner

    def _filled(self, before: str, layer: Layer, target: str, half: int | None, held: list[Group]) -> None:
        """One half of one tensor: what fills it, and for which experts it is not filled."""
        routed = ".experts." in f".{target}" and target.rpartition(".")[2] in ("w13", "w1", "w2", "b13", "b1", "b2")
        fillers = [
            (group, piece)
            for group in held
            for piece in group.spelling.pieces
            if piece.target == target and piece.experts != "identity" and (half is None or piece.half in (None, half))
        ]
        if not fillers:
            self._missing(before + self._spelled(target, half, held), held)
            return
        if len(fillers) == 1 and _are_all(*fillers[0], layer.sizes.experts):
            return
        filled: dict[int | None, Matrix] = {}
        for group, piece in fillers:
            first = layer.sizes.experts if piece.experts == "second" else 0
            last = first + layer.sizes.experts
            for number, matrix in group.experts.items():
                expert = number if number is None else number - first
                if number is not None and not first <= number < last:
                    continue
                # The same expert, or all of them in one tensor.
                other = filled.get(expert) or filled.get(None)
                if other is None and expert is None:
                    other = next(iter(filled.values()), None)
                if other is not None:
                    again(other.carrier, matrix.carrier, self._findings)
                filled.setdefault(expert, matrix)
        if not routed or None in filled:
            return
        experts = layer.sizes.experts
        gone = experts - len(filled)
        if not gone or not self._folder.whole:
            return
        group, piece = fillers[0]
        first = experts if piece.experts == "second" else 0
        names = [
            f"{before}{group.spelling.name.replace('{e}', str(first + expert))}"
            for expert in islice((e for e in range(experts) if e not in filled), FEW)
        ]
        # Expected shape and file are those of its neighbour.
        absent = next(e for e in range(experts) if e not in filled)
        like = filled[min((e for e in filled if e is not None), key=lambda e: (abs(e - absent), e))].carrier
        if set(filled) == set(range(len(filled))) and gone > 1:
            got, want = f"{len(filled)} experts", f"{experts}, as config.json says"
            self._findings.add("contradiction", like.file, names, got=got, want=want, do=OTHER_MODEL, count=gone)
            return
        want = f"{like.dtype} {list(like.shape)}, as its like"
        do = "download the shard that has it, or mend the export"
        self._findings.add("missing", like.file, names, got="no such tensor", want=want, do=do, count=gone)

    def _spelled(self, target: str, half: int | None, held: list[Group]) -> str:
        """The name of the missing tensor: as other layers spell it, or as this layer spells its other tensors."""
        by_expert = any(group.spelling.by_expert for group in held)
        options = [
            spelling
            for spelling in self._layout.spellings
            if any(p.target == target and (half is None or p.half in (None, half)) for p in spelling.pieces)
        ]
        present = {_block(group.spelling.pattern) for group in held}
        best = sorted(
            options,
            key=lambda s: (s.pattern not in self._used, _block(s.pattern) not in present, s.by_expert != by_expert),
        )
        return best[0].name.replace("{e}", "0") if best else target

    def _missing(self, name: str, held: list[Group]) -> None:
        if not self._folder.whole:
            return  # it may be in a shard that was not read, which has a finding of its own
        file = next(iter(held[0].experts.values())).carrier.file
        do = "download the shard that has it, or mend the export"
        want = "it, as config.json says"
        self._findings.add("missing", file, name, got="no such tensor", want=want, do=do)


def _are_all(group: Group, piece: Piece, experts: int) -> bool:
    """Whether every expert is there, and no other."""
    numbers = [number for number in group.experts if number is not None]
    first = experts if piece.experts == "second" else 0
    if len(numbers) != experts or len(group.experts) != experts:
        return False
    return (min(numbers), max(numbers)) == (first, first + experts - 1)


def _block(pattern: str) -> str:
    return pattern.rpartition(".")[0]
