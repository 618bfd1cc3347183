"""The tensors of a folder under the names that they have as floats: read, and dequantised, when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_conformance.checkpoints.forms import kind_of
from moe_conformance.checkpoints.headers import Stored
from moe_conformance.checkpoints.layout import ends, stored_shape
from moe_conformance.checkpoints.scheme import Kind, Scheme
from moe_conformance.checkpoints.sorting import Matrix
from moe_conformance.engines.transformers.skeleton import sources
from moe_conformance.model.families.naming import Piece
from moe_conformance.reference_impl.checkpoint.arrange import part, to_canonical, to_stored
from moe_conformance.reference_impl.checkpoint.forms import Form, numbers
from moe_conformance.reference_impl.checkpoint.places import Layer
from moe_conformance.reference_impl.checkpoint.stored import (
    Placed,
    Whole,
    as_stored,
    is_stored,
    placed,
    said_of,
    whole,
)

# Opens a file once, for as long as a layer is loaded.
Files = Callable[[str], Any]


@dataclass(frozen=True)
class Plain:
    """A tensor as the file has it."""

    entry: Stored

    def open(self, files: Files) -> Any:
        return files(self.entry.file).get_slice(self.entry.name)


@dataclass(frozen=True)
class Quantised:
    """A matrix with what belongs to it. shape: as numbers. turned: floats lie transposed to it."""

    kind: Kind
    stored: Mapping[str, Stored]
    shape: tuple[int, ...]
    scheme: Scheme
    said: Mapping[str, Any]
    halves: bool = False
    turned: bool = False

    def open(self, files: Files) -> Any:
        return _Opened(self, files)

    def read(self, files: Files) -> Tensor:
        held = {end: files(one.file).get_tensor(one.name) for end, one in self.stored.items() if end != "bias"}
        found = numbers(Form(self.kind, held, self.shape, self.scheme, self.halves, self.said))
        return found.mT if self.turned else found


class _Opened:
    """As safetensors' slices are."""

    def __init__(self, matrix: Quantised, files: Files) -> None:
        self.matrix, self.files = matrix, files

    def __getitem__(self, index: Any) -> Tensor:
        return self.matrix.read(self.files)[index]

    def get_shape(self) -> list[int]:
        *lead, rows, columns = self.matrix.shape
        return [*lead, columns, rows] if self.matrix.turned else [*lead, rows, columns]

    def get_dtype(self) -> str:
        return "F64"


@dataclass(frozen=True)
class Joined:
    """A tensor of all experts, of which a quantiser made one for each.

    pieces: what it holds of the layer's canonical tensors. of: of each of these, its parts with their experts.
    """

    layer: Layer
    pieces: tuple[Piece, ...]
    of: Mapping[str, tuple[tuple[Piece, int, Plain | Quantised], ...]]

    @property
    def stored(self) -> Iterator[Stored]:
        for parts in self.of.values():
            for _, _, one in parts:
                yield from one.stored.values() if isinstance(one, Quantised) else (one.entry,)

    def open(self, files: Files) -> Any:
        return _OpenedJoined(self, files)

    def read(self, files: Files) -> Tensor:
        found = []
        for piece in self.pieces:
            canonical = torch.empty(self.layer.tensors[piece.target], dtype=torch.float64)
            for own, expert, one in self.of[piece.target]:
                values = one.read(files) if isinstance(one, Quantised) else one.open(files)[:]
                part(canonical, own, expert).copy_(to_canonical(values, own, self.layer.sizes))
            found.append(to_stored(part(canonical, piece, None), piece, self.layer.sizes))
        return torch.cat(found)


class _OpenedJoined:
    """As safetensors' slices are."""

    def __init__(self, joined: Joined, files: Files) -> None:
        self.joined, self.files = joined, files

    def __getitem__(self, index: Any) -> Tensor:
        return self.joined.read(self.files)[index]

    def get_shape(self) -> list[int]:
        layer, pieces = self.joined.layer, self.joined.pieces
        shapes = [stored_shape(piece, layer.tensors[piece.target], layer.sizes, False) for piece in pieces]
        return [sum(rows for rows, *_ in shapes), *shapes[0][1:]]

    def get_dtype(self) -> str:
        return "F64"


Parts = Mapping[str, Plain | Quantised | Joined]


def parts(path: Path, config: Mapping[str, Any], stored: Mapping[str, Stored], model: Any) -> Parts:
    """By name. model: transformers', without weights, which says how large a matrix outside the experts is.

    Raises CheckpointError for the first defects that `moe-conformance checkpoint` would list, in a quantised folder.
    """
    if not is_stored(path, config):
        return {name: Plain(entry) for name, entry in stored.items()}
    found = whole(path)
    out: dict[str, Plain | Quantised | Joined] = dict(_routed(found, config))
    out |= _elsewhere(found, config, out, model)
    taken = _taken(out)
    return {**{name: Plain(entry) for name, entry in stored.items() if name not in taken}, **out}


def _taken(parts: Parts) -> set[str]:
    """The names of the tensors that others are made of."""
    return {
        entry.name
        for one in parts.values()
        if not isinstance(one, Plain)
        for entry in (one.stored if isinstance(one, Joined) else one.stored.values())
    }


def _routed(found: Whole, config: Mapping[str, Any]) -> Iterator[tuple[str, Plain | Quantised | Joined]]:
    """The matrices of the MoE layers."""
    own = {piece.pattern for piece in found.layout.names.pieces}
    split: dict[str, list[tuple[Layer, Piece, int, Plain | Quantised]]] = {}
    for place in placed(found):
        layer, piece, expert, *_ = place
        named = dict(_of_one(found, config, place))
        if piece.pattern in own or expert is None:
            yield from named.items()
            continue
        end = piece.pattern.replace("{e}", str(expert))
        for name, one in named.items():
            # A bias has a place of its own.
            if name.endswith(end):
                split.setdefault(name.removesuffix(end), []).append((layer, piece, expert, one))
    yield from _joined(found, split)


def _of_one(found: Whole, config: Mapping[str, Any], place: Placed) -> Iterator[tuple[str, Plain | Quantised]]:
    said: Mapping[str, Any] = next(said_of(config), {})
    layer, piece, expert, matrix, kind, tail = place
    if kind is None:
        yield from ((entry.name, Plain(entry)) for entry in matrix.stored.values())
        return
    if "bias" in matrix.stored:
        yield matrix.stored["bias"].name, Plain(matrix.stored["bias"])
    shape, turned = as_stored(found.layout, layer, piece, expert, matrix, kind)
    halves = piece.half is None and piece.target.endswith("w13")
    yield f"{_stem(matrix)}{tail}", Quantised(kind, matrix.stored, shape, found.scheme, said, halves, turned != piece)


def _joined(
    found: Whole, split: Mapping[str, list[tuple[Layer, Piece, int, Plain | Quantised]]]
) -> Iterator[tuple[str, Joined]]:
    """The tensors of all experts as the family has them. split: parts of each layer, by what precedes its names."""
    for before, parts in split.items():
        of: dict[str, list[tuple[Piece, int, Plain | Quantised]]] = {}
        for _, piece, expert, one in parts:
            of.setdefault(piece.target, []).append((piece, expert, one))
        by_pattern: dict[str, list[Piece]] = {}
        for piece in found.layout.names.written:
            if piece.target in of and "{e}" not in piece.pattern:
                by_pattern.setdefault(piece.pattern, []).append(piece)
        for pattern, pieces in by_pattern.items():
            rows = tuple(sorted(pieces, key=lambda piece: piece.row))
            yield before + pattern, Joined(parts[0][0], rows, {one.target: tuple(of[one.target]) for one in rows})


def _stem(matrix: Matrix) -> str:
    """What the names of a matrix' tensors have in common."""
    name = matrix.carrier.name
    if name.rpartition(".")[2].startswith("_"):
        return next(ends(name))[0]
    end = next(end for end, entry in matrix.stored.items() if entry is matrix.carrier)
    return name.removesuffix(end)[:-1] if name.endswith((f".{end}", f"_{end}")) else name


def _elsewhere(found: Whole, config: Mapping[str, Any], routed: Parts, model: Any) -> dict[str, Plain | Quantised]:
    """Other matrices, as those of attention: each is one parameter of the model."""
    taken = _taken(routed)
    stems: dict[str, dict[str, Stored]] = {}
    for name, entry in found.folder.tensors.items():
        if name not in taken and name not in routed:
            stem, end = next(ends(name), (name, ""))
            stems.setdefault(stem, {}).setdefault(end, entry)
    kinds = {}
    for held in stems.values():
        matrix = Matrix(held)
        if (kind := kind_of(matrix.members, found.scheme, found.held.ends)) is not None:
            kinds[f"{_stem(matrix)}.weight"] = kind, held
    said: Mapping[str, Any] = next(said_of(config), {})
    state = model.state_dict()
    out: dict[str, Plain | Quantised] = {}
    for target, names in sources(model, kinds).items():
        for name in names if target in state else ():
            kind, held = kinds[name]
            out[name] = Quantised(kind, held, tuple(state[target].shape), found.scheme, said)
            if "bias" in held:
                out[held["bias"].name] = Plain(held["bias"])
    return out
