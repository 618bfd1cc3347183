"""Where each tensor of a checkpoint belongs among the canonical tensors of its model's MoE layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from moe_conformance.errors import CheckpointError
from moe_conformance.model.description import MoESpec
from moe_conformance.model.families.bounds import MOST_WIDTH
from moe_conformance.model.families.describe import describe, layer_of
from moe_conformance.model.families.families import RECORDS, Families
from moe_conformance.model.families.naming import Piece, Stack
from moe_conformance.model.families.scope import Scope
from moe_conformance.model.families.sizes import spelled_out
from moe_conformance.model.specs import LayerSpec, Shape
from moe_conformance.quote import few, quoted
from moe_conformance.reference_impl.checkpoint.names import READ_PREFIXES, family_of, names_of

VISION = "vision."
# Unquantised, FP8 and ModelOpt NVFP4, compressed-tensors, GPTQ and AWQ.
SUFFIXES = (
    "weight",
    "bias",
    "weight_scale",
    "weight_scale_2",
    "weight_scale_inv",
    "input_scale",
    "weight_packed",
    "weight_global_scale",
    "input_global_scale",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
)
# At most six digits: a longer number is not an index but an attack on int().
_NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")
_NUMBERED = re.compile(r"(experts\.(?:expert_)?)([0-9]+)(?=\.)")


class Sizes(NamedTuple):
    """Counts of a layer: routed experts, shared experts, and identity experts that have rows all the same."""

    experts: int
    shared: int = 1
    identity: int = 0


class Place(NamedTuple):
    """tensor: canonical name, layers.I.experts.w13 for example. suffix: "weight" for the weights themselves."""

    tensor: str
    piece: Piece
    expert: int | None
    suffix: str


class Layer(NamedTuple):
    """One MoE layer: canonical name -> shape, without the layer; counts; and what precedes it in canonical names."""

    tensors: Mapping[str, Shape]
    sizes: Sizes
    prefix: str


class Places:
    """The MoE layers of a model and the names of their tensors, from its config.json.

    wanted, sizes: shape, and counts of its layer, of every canonical tensor of the model. by_stack: its MoE layers.
    patterns: of the names of each stack, with the layer and what follows as groups.
    num_layers, drafts: of the model's own layers, and of those for multi-token prediction that its config counts.
    """

    def __init__(self, config: Mapping[str, Any], families: Families = RECORDS) -> None:
        """Raises ConfigError for a config that is not of a known MoE model."""
        self.names = names_of(config, families)
        record, level = family_of(config, families)
        level = spelled_out(level, record.sizes)
        spec = describe(config, families)
        if not spec.layers:
            layer_of(config, (spec.moe_layers or spec.encoder_moe_layers)[0], families)  # raises, and says why
        self.by_stack = {
            (stack, index): self._layer(stack, index, layer, level)
            for stack in self.names.stacks
            for index, layer in _layers_of(stack, spec, level)
        }
        layers = self.by_stack.values()
        self.wanted = {layer.prefix + name: shape for layer in layers for name, shape in layer.tensors.items()}
        self.sizes = {layer.prefix + name: layer.sizes for layer in layers for name in layer.tensors}
        # Layers for multi-token prediction, which follow the model's own, are no part of it.
        self.num_layers = spec.num_layers
        self.drafts = level.optional("layers for prediction", "num_nextn_predict_layers", 0)
        self._moe_layers = spec.moe_layers
        self._by_pattern: dict[str, list[Piece]] = {}
        targets = {name for layer in layers for name in layer.tensors}
        for piece in self.names.pieces:
            if piece.target in targets:
                self._by_pattern.setdefault(piece.pattern, []).append(piece)
        # A name below one of these belongs to the block, known or not.
        self._roots = tuple({f"{piece.pattern.split('.')[0]}." for piece in self.names.pieces})
        prefixes = "|".join(re.escape(prefix) for prefix in {*READ_PREFIXES, self.names.prefix})
        self.patterns = {
            stack: re.compile(
                rf"(?:{prefixes}){re.escape(stack.path)}\.([0-9]+)\.{re.escape(stack.inner)}(.+)", re.DOTALL
            )
            for stack in self.names.stacks
        }

    def _layer(self, stack: Stack, index: int, spec: LayerSpec, level: Scope) -> Layer:
        tensors = spec.tensors()
        if self.names.second_width:
            key, widths = level.find("expert width", (self.names.second_width,))
            if len(level.sequence("expert width", key, widths)) < 2:
                raise level.error("expert width", f"{key}: got {quoted(widths)}, want a width for each set of experts")
            width = level.checked("expert width", key, widths[1], 1, MOST_WIDTH)
            second = replace(spec, experts=replace(spec.experts, width=width), shared=None).tensors()
            tensors |= {VISION + name: shape for name, shape in second.items()}
        shared = spec.shared.count if spec.shared else 1
        identity = spec.routing.identity_experts if self.names.identity_written else 0
        return Layer(tensors, Sizes(spec.num_experts, shared, identity), f"{stack.canonical}.{index}.")

    def layers(self) -> Iterator[tuple[str, Layer]]:
        """Each MoE layer with what precedes its tensors' names in a checkpoint."""
        for (stack, index), layer in self.by_stack.items():
            yield f"{self.names.prefix}{stack.path}.{index}.{stack.inner}", layer

    def locate(self, name: str) -> list[Place]:
        """The places that a checkpoint tensor fills: one, or more where a family stores several tensors as one.

        returns [] for a tensor outside the MoE blocks, and for one that nothing reads. Raises CheckpointError for a
        name within a block that is none of the family's, and for a layer or expert that the model lacks.
        """
        for stack, pattern in self.patterns.items():
            if match := pattern.fullmatch(name):
                return self._in_layer(stack, name, match[1], match[2])
        return []

    def _in_layer(self, stack: Stack, name: str, layer_digits: str, rest: str) -> list[Place]:
        numbered = _NUMBERED.search(rest)
        generic = _NUMBERED.sub(r"\1{e}", rest, count=1)
        pieces, suffix = self._find(generic)
        if not pieces and not f"{rest}.".startswith(self._roots):
            return []
        index = index_of(name, "layer", layer_digits)
        layer = self.by_stack.get((stack, index))
        if layer is None:
            if not pieces or self._is_extra(index):
                return []
            raise CheckpointError(
                f"{quoted(name)}: got layer {index}, want one of the config's MoE layers {few(self._moe_layers)}; "
                "config.json and the tensors are of different models"
            )
        if not pieces:
            raise CheckpointError(
                f"{quoted(name)}: got {quoted(rest)} in the MoE block, want one of "
                f"{', '.join(sorted(self._by_pattern))}, with {{e}} an expert, or for quantised weights one of "
                f"{', '.join(SUFFIXES)} at the end; "
                "rename the tensor or remove it from the checkpoint"
            )
        expert = index_of(name, "expert", numbered[2]) if numbered and "{e}" in pieces[0].pattern else None
        return list(self._filled(name, layer, pieces, expert, suffix))

    def _find(self, generic: str) -> tuple[list[Piece], str]:
        if pieces := self._by_pattern.get(generic):
            return pieces, "weight"
        stem, _, suffix = generic.rpartition(".")
        if suffix in SUFFIXES:
            for pattern in (f"{stem}.weight", stem):
                if pieces := self._by_pattern.get(pattern):
                    return pieces, suffix
        return [], ""

    def _is_extra(self, index: int) -> bool:
        return self.num_layers <= index < self.num_layers + self.drafts

    def _filled(self, name: str, layer: Layer, pieces: list[Piece], expert: int | None, suffix: str) -> Iterator[Place]:
        experts, _, identity = layer.sizes
        second = any(piece.experts == "second" for piece in pieces)
        limit = experts * (1 + second) + identity * any(piece.experts == "identity" for piece in pieces)
        if expert is not None and expert >= limit:
            raise CheckpointError(
                f"{quoted(name)}: got expert {expert}, want 0 to {limit - 1} as config.json says; "
                "config.json and the tensors are of different models"
            )
        for piece in pieces:
            if expert is None:
                yield Place(layer.prefix + piece.target, piece, None, suffix)
            elif (piece.experts == "routed" and expert < experts) or (piece.experts == "second" and expert >= experts):
                yield Place(layer.prefix + piece.target, piece, expert % experts, suffix)


def index_of(name: str, what: str, digits: str) -> int:
    if not _NUMBER.fullmatch(digits):
        raise CheckpointError(
            f"{quoted(name)}: got {what} {digits[:20]!r}, want a number without leading zeros and of at most six "
            "digits; rename the tensor"
        )
    return int(digits)


def _layers_of(stack: Stack, spec: MoESpec, level: Scope) -> Iterator[tuple[int, LayerSpec]]:
    if stack.canonical == "layers":
        if spec.moe_layers:  # otherwise the layers are the encoder's
            yield from zip(spec.moe_layers, spec.layers, strict=True)
        return
    for index in spec.encoder_moe_layers:
        layer = spec.layers[0]
        width = level.integer("expert width", (stack.width,)) if stack.width else layer.experts.width
        yield index, replace(layer, experts=replace(layer.experts, width=width))
