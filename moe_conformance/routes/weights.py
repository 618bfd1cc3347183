"""The tensors of a folder under the names that they have as floats: read, and dequantised, when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_conformance.checkpoints.forms import kind_of
from moe_conformance.checkpoints.headers import Stored
from moe_conformance.checkpoints.layout import ends
from moe_conformance.checkpoints.scheme import Kind, Scheme
from moe_conformance.checkpoints.sorting import Matrix
from moe_conformance.engines.transformers.skeleton import sources
from moe_conformance.reference_impl.checkpoint.forms import Form, numbers
from moe_conformance.reference_impl.checkpoint.stored import Whole, as_stored, is_stored, placed, said_of, whole

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


Parts = Mapping[str, Plain | Quantised]


def parts(path: Path, config: Mapping[str, Any], stored: Mapping[str, Stored], model: Any) -> Parts:
    """By name. model: transformers', without weights, which says how large a matrix outside the experts is.

    Raises CheckpointError for the first defects that `moe-conformance checkpoint` would list, in a quantised folder.
    """
    if not is_stored(path, config):
        return {name: Plain(entry) for name, entry in stored.items()}
    found = whole(path)
    out = dict(_routed(found, config))
    out |= _elsewhere(found, config, out, model)
    taken = {entry.name for part in out.values() if isinstance(part, Quantised) for entry in part.stored.values()}
    return {**{name: Plain(entry) for name, entry in stored.items() if name not in taken}, **out}


def _routed(found: Whole, config: Mapping[str, Any]) -> Iterator[tuple[str, Plain | Quantised]]:
    """The matrices of the MoE layers."""
    said: Mapping[str, Any] = next(said_of(config), {})
    for layer, piece, expert, matrix, kind, tail in placed(found):
        if kind is None:
            yield from ((entry.name, Plain(entry)) for entry in matrix.stored.values())
            continue
        if "bias" in matrix.stored:
            yield matrix.stored["bias"].name, Plain(matrix.stored["bias"])
        shape, turned = as_stored(found.layout, layer, piece, expert, matrix, kind)
        halves = piece.half is None and piece.target.endswith("w13")
        quantised = Quantised(kind, matrix.stored, shape, found.scheme, said, halves, turned != piece)
        yield f"{_stem(matrix)}{tail}", quantised


def _stem(matrix: Matrix) -> str:
    """What the names of a matrix' tensors have in common."""
    end = next(end for end, entry in matrix.stored.items() if entry is matrix.carrier)
    return matrix.carrier.name.removesuffix(end)[:-1]


def _elsewhere(found: Whole, config: Mapping[str, Any], routed: Parts, model: Any) -> dict[str, Plain | Quantised]:
    """Other matrices, as those of attention: each is one parameter of the model."""
    taken = {entry.name for part in routed.values() if isinstance(part, Quantised) for entry in part.stored.values()}
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
