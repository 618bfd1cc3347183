"""Where each tensor of a checkpoint belongs, and which shape it has there, in every spelling of its family.

In addition to the names in the family's record it knows those of quantisers, which split packed experts and name each
expert's matrices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from moe_conformance.checkpoints.forms import ENDS
from moe_conformance.model.families.naming import Piece, Pieces, Stack
from moe_conformance.model.specs import Shape
from moe_conformance.reference_impl.checkpoint.places import Layer, Places, Sizes

# What quantisers call the projections of an expert that they split off a packed tensor.
SPLIT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("w1", "v1", "w2"))
_NUMBERED = re.compile(r"(experts\.(?:mlp\.)?(?:expert_)?)([0-9]+)(?=\.)")
TORCHAO = {
    "qdata": "weight",
    "zero_point": "weight_zero_point",
    "act_quant_scale": "input_scale",
    "scale": "weight_scale",
}
# At most six digits: a longer number is not an index but an attack on int().
NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")
# The numbers in a name.
CUT = re.compile(r"(?<=[._])([0-9]+)(?=\.)")
# Parts of names that only draft layers have, whatever number the config gives.
DRAFT_MARKS = (".eh_proj.", ".enorm.", ".hnorm.", ".shared_head.")
DRAFT_KEYS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
    "num_mtp_modules",
    "mtp_num_layers",
)


class Spelling(NamedTuple):
    """One tensor of an MoE layer as one of several conventions names it.

    pattern: its name in the layer without the end that says which of a matrix' tensors it is; {e} is an expert.
    tail: what ends it where it is stored as floats, ".weight" or nothing. pieces: what it holds.
    """

    pattern: str
    tail: str
    pieces: Pieces

    @property
    def by_expert(self) -> bool:
        return "{e}" in self.pattern

    @property
    def name(self) -> str:
        return self.pattern + self.tail


class Spot(NamedTuple):
    """Where names belong that differ only in their numbers.

    stack: which stack of layers; "mtp" for that of draft layers. spelling: None for a name in the block that is no
    spelling's. end: of a matrix' tensors, which one. layer, expert: which of the numbers they are. fixed: the others.
    """

    stack: Stack
    spelling: Spelling | None
    end: str
    layer: int
    expert: int | None
    fixed: tuple[tuple[int, str], ...]


# Of layers for multi-token prediction that lie apart from the model's own.
MTP = Stack("mtp", canonical="mtp")


class Layout:
    """The MoE layers of a model, by stack and index, and where names belong.

    drafts: how many layers for multi-token prediction follow the model's own; a checkpoint may have none of them.
    """

    def __init__(self, places: Places, config: Mapping[str, Any]) -> None:
        self.names = places.names
        self.layers: dict[tuple[Stack, int], Layer] = places.by_stack
        self.num_layers = places.num_layers
        self.own = next((stack for stack in self.names.stacks if stack.canonical == "layers"), self.names.stacks[0])
        mine = [layer for (stack, _), layer in self.layers.items() if stack == self.own]
        self.draft = mine[-1] if mine else None
        self.drafts = places.drafts or max(_drafts(config), default=0)
        self._marked: set[int] = set()
        targets = {name for layer in self.layers.values() for name in layer.tensors}
        # By name as floats, and by the stem to which quantisers add their ends.
        self._exact: dict[str, Spelling] = {}
        self._stems: dict[str, Spelling] = {}
        self.spellings: list[Spelling] = []
        by_pattern: dict[str, list[Piece]] = {}
        for piece in self.names.pieces:
            if piece.target in targets:
                by_pattern.setdefault(piece.pattern, []).append(piece)
        for pattern, pieces in by_pattern.items():
            self._add(pattern, tuple(pieces))
        for pattern, split in _split(by_pattern):
            if pattern not in self._exact:
                self._add(pattern, split)
        known = {piece.pattern for piece in self.names.pieces}
        self.absent = {pattern.removesuffix(".weight") for pattern in known - by_pattern.keys()}
        self.roots = tuple({f"{piece.pattern.split('.')[0]}." for piece in self.names.pieces})
        inner = re.escape(self.own.inner)
        self._patterns = [
            *((stack, pattern) for stack, pattern in places.patterns.items()),
            (MTP, re.compile(rf"(?:model\.)?mtp\.(?:layers\.)?([0-9]+)\.{inner}(.+)", re.DOTALL)),
        ]

    def _add(self, pattern: str, pieces: Pieces) -> None:
        tail = ".weight" if pattern.endswith(".weight") else ""
        spelling = Spelling(pattern.removesuffix(".weight"), tail, pieces)
        self.spellings.append(spelling)
        self._exact[pattern] = spelling
        self._stems[spelling.pattern] = spelling

    def spot(self, name: str) -> Spot | None:
        """None for a tensor outside the MoE blocks."""
        for stack, pattern in self._patterns:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            rest = match[2]
            numbered = _NUMBERED.search(rest)
            generic = _NUMBERED.sub(r"\1{e}", rest, count=1)
            spelling, end = self._find(generic)
            if spelling is None and (stack is MTP or not f"{rest}.".startswith(self.roots)):
                return None
            by_expert = numbered is not None and (spelling is None or spelling.by_expert)
            at = [found.start(1) for found in CUT.finditer(name)]
            layer = at.index(match.start(1))
            expert = at.index(match.start(2) + numbered.start(2)) if by_expert and numbered else None
            digits = CUT.findall(name)
            fixed = tuple((i, text) for i, text in enumerate(digits) if i not in (layer, expert))
            return Spot(stack, spelling, end, layer, expert, fixed)
        return None

    def _find(self, generic: str) -> tuple[Spelling | None, str]:
        if spelling := self._exact.get(generic):
            return spelling, "weight"
        for stem, end in ends(generic):
            if spelling := self._stems.get(stem):
                return spelling, end
        return None, generic

    def find_drafts(self, indices: Iterable[int], names: Iterable[str]) -> None:
        """Which of these layers beyond the config's own are draft layers by their other tensors."""
        beyond = {f".{index}{mark}": index for index in indices for mark in DRAFT_MARKS if index >= self.num_layers}
        if beyond:
            self._marked = {index for name in names for part, index in beyond.items() if part in name}

    def layer(self, stack: Stack, index: int) -> tuple[Layer | None, bool]:
        """The layer there, and whether it is a draft layer, which may be absent."""
        if stack is MTP:
            return self.draft, True
        found = self.layers.get((stack, index))
        counted = self.num_layers <= index < self.num_layers + self.drafts
        if found is None and stack == self.own and (counted or index in self._marked):
            return self.draft, True
        return found, False


def ends(name: str) -> Iterator[tuple[str, str]]:
    """The stems that a name may have, each with the end that says which tensor of a matrix it is."""
    module, _, own = name.rpartition(".")
    if own.startswith("_"):
        # torchao's: module._weight_qdata, of module.weight.
        for end, meant in TORCHAO.items():
            if own.endswith(f"_{end}"):
                yield f"{module}.{own[1 : -len(end) - 1]}".removesuffix(".weight"), meant
    for end in ENDS:
        if name.endswith(end) and name[-len(end) - 1 : -len(end)] in (".", "_"):
            stem = name[: -len(end) - 1]
            # bitsandbytes adds to the weight's own name.
            yield stem.removesuffix(".weight"), end


def _drafts(config: Mapping[str, Any]) -> Iterator[int]:
    """How many draft layers a config counts, under whichever name."""
    for level in (config, config.get("text_config")):
        for key in DRAFT_KEYS if isinstance(level, Mapping) else ():
            value = level.get(key)  # type: ignore[union-attr]
            if type(value) is int and 0 < value < 1000:
                yield value


def _split(by_pattern: Mapping[str, list[Piece]]) -> Iterator[tuple[str, Pieces]]:
    """Names of each expert's matrices in families whose experts are packed."""
    for pattern, pieces in by_pattern.items():
        piece = pieces[0]
        owner, _, part = piece.target.rpartition(".")
        if "{e}" in pattern or f".{owner}"[-8:] != ".experts" or part[:1] not in "wb" or piece.rows > 1:
            continue
        stem = pattern.removesuffix(".weight").rpartition(".")[0]
        bases = {stem, stem if stem.endswith(".experts") or stem == "experts" else f"{stem}.experts"}
        bases.add(stem.removesuffix(".mlp") if stem.endswith("experts.mlp") else stem)
        tail = "weight" if part.startswith("w") else "bias"
        for base in sorted(base for base in bases if base.endswith(("experts", "experts.mlp"))):
            for gate, up, down in SPLIT:
                names = {"2": ((down, None),), "1": ((up, None),), "13": ((gate, 0), (up, 1))}[part[1:]]
                for name, half in names:
                    new = replace(piece, pattern=f"{base}.{{e}}.{name}.{tail}", half=half, ops=(), experts="routed")
                    yield new.pattern, (new,)


def stored_shape(piece: Piece, whole: Shape, sizes: Sizes, by_expert: bool) -> Shape:
    """The shape that a piece of a canonical tensor has in the file. whole: of that tensor."""
    shape = whole[1:] if by_expert else whole
    if piece.half is not None:
        rows = int(not by_expert and ".experts." in f".{piece.target}")
        shape = (*shape[:rows], shape[rows] // 2, *shape[rows + 1 :])
    for op in piece.ops:
        shape = _arranged(shape, op, sizes)
    return (shape[0] * piece.rows, *shape[1:])


def _arranged(shape: Shape, op: str, sizes: Sizes) -> Shape:
    match op:
        case "transposed":
            return (*shape[:-2], shape[-1], shape[-2])
        case "stacked":
            return (shape[0] * shape[1], *shape[2:])
        case "row":
            return (1, *shape)
        case "padded":
            return (shape[0] + sizes.identity, *shape[1:])
        case "apart" | "apart_interleaved":
            return (sizes.shared, shape[0] // sizes.shared, *shape[1:])
        case "apart_columns":
            return (sizes.shared, shape[0], shape[1] // sizes.shared)
    return shape
