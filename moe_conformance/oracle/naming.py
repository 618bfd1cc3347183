"""Which tensors the checkpoints of a model have, and which parts of canonical tensors they hold, from its record.

The reference reads and writes checkpoints with code of its own; a test compares both with what transformers saves.
No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from moe_conformance.model.families.describe import describe
from moe_conformance.model.families.families import NESTED, NESTED_LAST, RECORDS
from moe_conformance.model.families.naming import Piece, Pieces, Stack
from moe_conformance.model.families.record import Record
from moe_conformance.model.families.scope import levels, model_type_of
from moe_conformance.model.specs import LayerSpec, Shape

# As transformers writes them; by the names of transformers' modules; or as the family was published, which is mostly
# the first.
Form = Literal["hub", "modules", "published"]


@dataclass(frozen=True)
class Layer:
    """One MoE layer. before: what precedes its names in a checkpoint; prefix: in canonical ones. index: its number."""

    before: str
    prefix: str
    index: int
    spec: LayerSpec
    tensors: Mapping[str, Shape]


class Part(NamedTuple):
    """A part of a canonical tensor. half: the gate rows (0) or the up rows (1); expert: which; None is all of them."""

    tensor: str
    half: int | None
    expert: int | None


class Entry(NamedTuple):
    """One tensor of a checkpoint: its name, the layer that it is of, and the parts that it holds, none if unread."""

    name: str
    layer: Layer
    pieces: Pieces
    expert: int | None

    @property
    def parts(self) -> tuple[Part, ...]:
        number = self.expert
        if any(piece.experts == "second" for piece in self.pieces) and number is not None:
            number -= self.layer.spec.num_experts
        held = (piece for piece in self.pieces if piece.experts != "identity")
        return tuple(Part(self.layer.prefix + piece.target, piece.half, number) for piece in held)


def layers(record: Record, config: Mapping[str, Any]) -> Iterator[Layer]:
    """The MoE layers of a model of this config.json, the encoder's too."""
    names = record.names
    if names is None:
        raise ValueError(f"record of {record.model_type}: got no names, want those of its checkpoints")
    spec = describe(config)
    level = _level(record, config)
    before = names.prefixes.get(model_type_of(config), names.prefix)
    for stack in names.stacks:
        for index, layer in _of_stack(stack, spec, level):
            tensors = dict(layer.tensors())
            if names.second_width:
                width = level[names.second_width][1]
                second = replace(layer, experts=replace(layer.experts, width=width), shared=None)
                tensors |= {f"vision.{name}": shape for name, shape in second.tensors().items()}
            place = f"{before}{stack.path}.{index}.{stack.inner}"
            yield Layer(place, f"{stack.canonical}.{index}.", index, layer, tensors)


def _level(record: Record, config: Mapping[str, Any]) -> Mapping[str, Any]:
    root = model_type_of(config)
    found = [level for _, level in [*levels(config, NESTED), *levels(config, NESTED_LAST)]]
    return next(level for level in found if RECORDS.record_of(model_type_of(level) or root) is record)


def _of_stack(stack: Stack, spec: Any, level: Mapping[str, Any]) -> Iterator[tuple[int, LayerSpec]]:
    if stack.canonical == "layers":
        yield from zip(spec.moe_layers, spec.layers, strict=False)  # if only the encoder has experts, there are none
        return
    for index in spec.encoder_moe_layers:
        experts = spec.layers[0].experts
        yield index, replace(spec.layers[0], experts=replace(experts, width=level.get(stack.width, experts.width)))


def pieces_of(record: Record, form: Form) -> Pieces:
    """The pieces of one spelling: as written, or with those of the modules or the publishers where these differ.

    () for the modules' names if they are the same, if more than one set of them is read, or if they lie elsewhere in
    the model than the hub's.
    """
    names = record.names
    if names is None or form == "hub":
        return names.written if names else ()
    if form == "published":
        return tuple(replace(p, pattern=names.published.get(p.pattern, p.pattern)) for p in names.written)
    if record.wrapper is not None or names.prefix != "model.":
        return ()
    targets = {piece.target for piece in names.read}
    for target in targets:
        halves = [piece.half for piece in names.read if piece.target == target]
        if (
            sorted(halves, key=str) not in ([None], [0, 1])
            and len({p.row for p in names.read if p.target == target}) < 2
        ):
            return ()
    kept = tuple(piece for piece in names.written if piece.target not in targets)
    return names.read + kept if targets else ()


def entries(record: Record, config: Mapping[str, Any], form: Form) -> Iterator[Entry]:
    """Every tensor of the MoE layers in a checkpoint of this spelling."""
    for layer in layers(record, config):
        by_pattern: dict[str, list[Piece]] = {}
        for piece in pieces_of(record, form):
            if piece.target in layer.tensors:
                by_pattern.setdefault(piece.pattern, []).append(piece)
        for pattern, pieces in by_pattern.items():
            if "{e}" not in pattern:
                rows = tuple(sorted(pieces, key=lambda piece: piece.row))
                yield Entry(layer.before + pattern, layer, rows, None)
            for piece in pieces if "{e}" in pattern else ():
                for expert in _numbers(piece, layer):
                    yield Entry(layer.before + pattern.replace("{e}", str(expert)), layer, (piece,), expert)


def _numbers(piece: Piece, layer: Layer) -> range:
    routed = layer.spec.num_experts
    if piece.experts == "routed":
        return range(routed)
    behind = routed if piece.experts == "second" else layer.spec.routing.identity_experts
    return range(routed, routed + behind)
