"""Save canonical MoE tensors as a checkpoint folder, named and laid out as the real model's `save_pretrained` does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moe_conformance.errors import CheckpointError
from moe_conformance.model.families.naming import Piece
from moe_conformance.model.specs import Shape
from moe_conformance.quote import few, plainly, quoted
from moe_conformance.reference_impl.checkpoint.arrange import part, to_stored
from moe_conformance.reference_impl.checkpoint.files import CONFIG, INDEX, SINGLE
from moe_conformance.reference_impl.checkpoint.places import Layer, Places

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32)


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], shards: int = 1) -> None:
    """Write config.json and safetensors that `load` reads back bit for bit, and transformers too beside the rest.

    config: as in config.json. tensors: every canonical tensor of the model and no other, as `load` returns them.
    shards: above 1, that many files of about the same size and an index.
    Raises ConfigError as `describe` does, and CheckpointError where a tensor is missing, unknown or of another shape,
    dtype or layout, or the config is none of JSON; then nothing is written. And where the folder cannot be written to.
    """
    folder, places = Path(folder), Places(config)
    _check(places, tensors)
    named = dict(_named(places, tensors))
    if isinstance(shards, bool) or not isinstance(shards, int) or not 1 <= shards <= len(named):
        raise CheckpointError(f"shards: got {quoted(shards)}, want an integer from 1 to {len(named)}, the tensors")
    try:
        text = json.dumps(config, indent=2)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"config: not what a config.json can say ({error}); pass plain data") from error
    try:
        _write(folder, text, named, shards)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written ({error}); what is there is not whole") from error


def _write(folder: Path, config: str, named: Mapping[str, Tensor], shards: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(config, encoding="utf-8")
    metadata = {"format": "pt"}  # what transformers looks for
    if shards == 1:
        save_file(dict(named), folder / SINGLE, metadata)
        return
    weight_map: dict[str, str] = {}
    total = sum(tensor.nbytes for tensor in named.values())
    files: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    written = 0
    for name, tensor in named.items():
        number = min(written * shards // max(total, 1), shards - 1)
        files[number][name] = tensor
        written += tensor.nbytes
    for number, content in enumerate(files, 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file(content, folder / file, metadata)
        weight_map |= dict.fromkeys(content, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _check(places: Places, tensors: Mapping[str, Tensor]) -> None:
    wanted = places.wanted
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - tensors.keys())]
    wrong += [f"{plainly(str(name))} is unknown" for name in tensors if name not in wanted]
    wrong += [
        f"{name}: got {_got(tensors[name])}, want shape {list(shape)} of {_dtypes(name)}"
        for name, shape in wanted.items()
        if name in tensors and not _fits(name, tensors[name], shape)
    ]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors do not fit the config: {few(wrong)}; "
            "pass the canonical tensors of this model, all of them"
        )


def _fits(name: str, tensor: Any, shape: Shape) -> bool:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        return False
    return tuple(tensor.shape) == shape and tensor.dtype in _dtypes(name)


def _dtypes(name: str) -> tuple[torch.dtype, ...]:
    """What `load` takes for it."""
    return INTEGERS if name.endswith("router.table") else FLOATS


def _got(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return quoted(tensor)
    return f"shape {list(tensor.shape)} of {tensor.dtype}, {tensor.layout}, on {tensor.device}"


def _named(places: Places, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint name and tensor, each of its own memory."""
    for before, layer in places.layers():
        by_pattern: dict[str, list[Piece]] = {}
        for piece in places.names.written:
            if piece.target in layer.tensors:
                by_pattern.setdefault(piece.pattern, []).append(piece)
        for pattern, pieces in by_pattern.items():
            if "{e}" in pattern:
                for piece in pieces:
                    for number, tensor in _each(piece, layer, tensors):
                        yield before + pattern.replace("{e}", str(number)), tensor
            else:
                rows = sorted(pieces, key=lambda piece: piece.row)
                parts = [to_stored(part(tensors[layer.prefix + p.target], p, None), p, layer.sizes) for p in rows]
                yield (
                    before + pattern,
                    (parts[0] if len(parts) == 1 else torch.cat(parts)).clone(memory_format=torch.contiguous_format),
                )


def _each(piece: Piece, layer: Layer, tensors: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """The number and the tensor of each expert."""
    whole = tensors[layer.prefix + piece.target]
    experts, _, identity = layer.sizes
    if piece.experts == "identity":
        for number in range(experts, experts + identity):
            yield number, torch.zeros_like(part(whole, piece, 0), memory_format=torch.contiguous_format)
        return
    first = experts if piece.experts == "second" else 0
    for expert in range(experts):
        cut = to_stored(part(whole, piece, expert), piece, layer.sizes)
        yield first + expert, cut.clone(memory_format=torch.contiguous_format)
