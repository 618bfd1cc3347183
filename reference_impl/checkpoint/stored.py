"""Load the experts of a quantised checkpoint: what `checkpoint` finds whole, as numbers in their canonical places.

What belongs to a matrix, in which form it is and what is wrong with it is known by moe_conformance/checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_conformance.checkpoints.findings import Finding, Findings
from moe_conformance.checkpoints.folder import Folder, read_folder
from moe_conformance.checkpoints.forms import kind_of
from moe_conformance.checkpoints.headers import Stored
from moe_conformance.checkpoints.layout import Layout, Spelling, stored_shape
from moe_conformance.checkpoints.matrices import piece_of
from moe_conformance.checkpoints.model import model_of
from moe_conformance.checkpoints.scheme import HF_QUANT, KEYS, Kind, Scheme
from moe_conformance.checkpoints.sorting import Matrix, Sorted
from moe_conformance.checkpoints.whole import judge
from moe_conformance.errors import CheckpointError, ConfigError
from moe_conformance.model.families.naming import Piece
from moe_conformance.protocol.checkpoint import Loaded
from moe_conformance.quote import few, plainly
from moe_conformance.reference_impl.checkpoint.arrange import part, to_canonical
from moe_conformance.reference_impl.checkpoint.canonical import Matrix as Named
from moe_conformance.reference_impl.checkpoint.canonical import Packed, Place, deinterleaved, of_layer, packed
from moe_conformance.reference_impl.checkpoint.forms import Form, numbers
from moe_conformance.reference_impl.checkpoint.places import Layer


class Placed(NamedTuple):
    """One matrix of a layer, of one expert or of all. kind: None for floats. tail: what ends the name of floats."""

    layer: Layer
    piece: Piece
    expert: int | None
    matrix: Matrix
    kind: Kind | None
    tail: str


def is_stored(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether config.json, at the top or in its text part, or ModelOpt's own file says that weights are quantised."""
    return (path / HF_QUANT).exists() or any(said_of(config))


def said_of(config: Mapping[str, Any]) -> Iterator[Any]:
    """Each quantization_config, at the top or in the text part."""
    levels = (config, config.get("text_config"))
    return (value for level in levels if isinstance(level, Mapping) for key in KEYS if (value := level.get(key)))


class Whole(NamedTuple):
    """A quantised folder without defects, by its config and headers. held: every tensor in its place."""

    folder: Folder
    layout: Layout
    scheme: Scheme
    held: Sorted


def whole(path: Path) -> Whole:
    """Raises CheckpointError for the first defects that `moe-conformance checkpoint` would list."""
    findings = Findings()
    folder = read_folder(path, findings)
    try:
        model = model_of(folder, findings)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if model.layout is None:
        raise CheckpointError(model.why or _said(findings.all()))
    held = judge(folder, model, findings)
    defects = [finding for finding in findings.all() if finding.level == "defect"]
    if defects:
        raise CheckpointError(_said(defects))
    scheme = model.scheme or Scheme("")
    if not scheme.known:
        raise CheckpointError(f"quantization_config: got {plainly(scheme.method)}, want a method whose form is known")
    return Whole(folder, model.layout, scheme, held)


def load_stored(path: Path) -> Loaded:
    """As `loading.load`: stored weights in float32, each rounded once, others as they are; scales are not given on.

    Raises CheckpointError as `whole` does.
    """
    found = whole(path)
    try:
        return _read(found, list(placed(found)))
    except (SafetensorError, OSError) as error:
        trouble = plainly(str(error))
        raise CheckpointError(f"{path}: a shard changed while it was read ({trouble}); download it again") from error


def _said(findings: list[Finding] | tuple[Finding, ...]) -> str:
    first = findings[0]
    where = few(list(first.tensors)) or plainly(first.files[0])
    more = f" ({len(findings) - 1} other defects; moe-conformance checkpoint lists them)" if len(findings) > 1 else ""
    return f"{where} in {plainly(first.files[0])}: got {first.got}, want {first.want}; {first.do}{more}"


def placed(found: Whole) -> Iterator[Placed]:
    """The matrices of the model's own MoE layers, in the order of their names."""
    for (stack, index, _), group in found.held.groups.items():
        layer, is_draft = found.layout.layer(stack, index)
        if layer is None or is_draft:
            continue
        spelling: Spelling = group.spelling
        pieces = [piece for piece in spelling.pieces if piece.target in layer.tensors]
        for number, matrix in group.experts.items():
            kind = kind_of(matrix.members, found.scheme, found.held.ends)
            if number is None:
                for piece in pieces:
                    yield Placed(layer, piece, None, matrix, kind, spelling.tail)
            elif (at := piece_of(pieces, number, layer)) is not None and pieces[at].experts != "identity":
                yield Placed(layer, pieces[at], number % layer.sizes.experts, matrix, kind, spelling.tail)


def _read(found: Whole, places: list[Placed]) -> Loaded:
    folder, layout, scheme, _ = found
    said: Mapping[str, Any] = next(said_of(folder.config), {})
    out = Loaded()
    forms: dict[str, dict[Named, dict[Place, Packed | None]]] = {}
    quantised = {placed.layer.prefix + placed.piece.target for placed in places if placed.kind}
    with ExitStack() as stack:
        files: dict[str, Any] = {}

        def tensor(entry: Stored) -> Tensor:
            if entry.file not in files:
                files[entry.file] = stack.enter_context(safe_open(folder.path / entry.file, framework="pt"))
            value: Tensor = files[entry.file].get_tensor(entry.name)
            return value

        for layer, piece, expert, matrix, kind, _ in places:
            name = layer.prefix + piece.target
            tensors = {end: tensor(entry) for end, entry in matrix.stored.items() if end != "bias"}
            if "bias" in matrix.stored and set(matrix.stored) == {"bias"}:
                continue
            shape, piece = as_stored(layout, layer, piece, expert, matrix, kind)
            one = None
            if kind is None:
                values = tensors["weight"].reshape(shape)
            else:
                halves = piece.half is None and piece.target.endswith("w13")
                form = Form(kind, tensors, shape, scheme, halves, said)
                values, one = numbers(form), packed(form) if piece.ops in ((), ("interleaved",)) else None
                one = deinterleaved(one) if piece.ops and one is not None else one
            if piece.target in ("experts.w13", "experts.w1", "experts.w2"):
                target: Any = piece.target.removeprefix("experts.")
                forms.setdefault(layer.prefix, {}).setdefault(target, {})[piece.half, expert] = one
            if name not in out:
                dtype = torch.float32 if name in quantised else values.dtype
                out[name] = torch.empty(layer.tensors[piece.target], dtype=dtype)
            row = values.chunk(piece.rows)[piece.row]
            part(out[name], piece, expert).copy_(to_canonical(row, piece, layer.sizes))
    experts = {layer.prefix: layer.sizes.experts for layer, *_ in places}
    for prefix, held in forms.items():
        if stored := of_layer(held, experts[prefix]):
            out.stored[prefix] = stored
    return out


def as_stored(
    layout: Layout, layer: Layer, piece: Piece, expert: int | None, matrix: Matrix, kind: Kind | None
) -> tuple[tuple[int, ...], Piece]:
    """The shape of the numbers in the file, and the piece as it lies there.

    Blocks of gpt-oss lie as outputs times inputs, which its floats do not; packed experts of a family that once was
    transposed are, where their shape says so.
    """
    shape = stored_shape(piece, layer.tensors[piece.target], layer.sizes, expert is not None)
    if kind is None and layout.names.once_transposed and expert is None and matrix.carrier.shape != shape:
        turned = replace(piece, ops=("transposed",))
        return stored_shape(turned, layer.tensors[piece.target], layer.sizes, False), turned
    if kind in ("mxfp4", "nvfp4", "mxfp8") and "transposed" in piece.ops:
        plain = replace(piece, ops=tuple(op for op in piece.ops if op != "transposed"))
        return stored_shape(plain, layer.tensors[piece.target], layer.sizes, expert is not None), plain
    return shape, piece
