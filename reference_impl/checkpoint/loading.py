"""Load the MoE tensors of a checkpoint folder: all of them or, with a reason, none.

Three steps, and no tensor data is read before the first two have passed: list what the folder holds (config, index,
shard headers), plan which checkpoint tensor fills which place, then read. What a family's tensors are called and how
they lie is in names.py; shapes are checked against the config and never used to guess a layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from moe_conformance.checkpoints.json_files import read_json
from moe_conformance.errors import CheckpointError
from moe_conformance.model.families.naming import Piece
from moe_conformance.model.specs import Shape
from moe_conformance.quote import FEW, few, plainly, quoted
from moe_conformance.reference_impl.checkpoint.arrange import part, to_canonical, to_stored
from moe_conformance.reference_impl.checkpoint.files import CONFIG, Stored, open_shards
from moe_conformance.reference_impl.checkpoint.places import Places, Sizes
from moe_conformance.reference_impl.checkpoint.stored import is_stored, load_stored

# The tensor that carries the weights themselves: as numbers, or as packed integers of GPTQ, AWQ, compressed-tensors.
CARRIERS = ("weight", "qweight", "weight_packed")
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32")


class Key(NamedTuple):
    """One tensor of the result. suffix: "weight" for the weights themselves."""

    tensor: str
    suffix: str

    def __str__(self) -> str:
        return self.tensor if self.suffix == "weight" else f"{self.tensor}.{self.suffix}"


class Slot(NamedTuple):
    """A part of a tensor. half: the gate rows (0) or the up rows (1); None is all of them, or all experts."""

    half: int | None
    expert: int | None


class Filled(NamedTuple):
    piece: Piece
    entry: Stored


Slots = dict[Slot, Filled]
Plan = dict[Key, Slots]


def load(folder: Path) -> dict[str, Tensor]:
    """Load a folder of config.json and safetensors, one file or shards with an index, of any MoE family.

    returns, for each MoE layer I, tensors of their own memory in the checkpoint's dtype: layers.I.NAME for each name
    of `LayerSpec.tensors`, shaped as there. The encoder of an encoder-decoder has encoder.layers.I.NAME, a second set
    of experts for images (ernie4_5_vl_moe) layers.I.vision.NAME.
    Where the config says that weights are quantised, these come as numbers, in float32 (`load_stored`).

    Tensors outside the MoE blocks are not read, nor those of further layers for multi-token prediction.
    Raises CheckpointError, and ConfigError for a config that is not of a known MoE model.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    if is_stored(folder, config):
        return load_stored(folder)
    places = Places(config)
    with ExitStack() as stack:
        shards, stored = open_shards(folder, stack)
        plan = _plan(places, stored)
        plan = _oriented(places, plan, config)
        _check(places, plan)
        try:
            return _read(places, plan, shards)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{folder}: a shard changed while it was read ({plainly(str(error))}); download it again"
            ) from error
        except MemoryError as error:
            raise CheckpointError(f"{folder}: more tensors than memory holds; load it where there is more") from error


def _plan(places: Places, stored: Sequence[Stored]) -> Plan:
    """Give every MoE tensor its place; no place may be given twice, in one spelling or in two."""
    plan: Plan = {}
    for entry in stored:
        for tensor, piece, expert, suffix in places.locate(entry.name):
            slots, slot = plan.setdefault(Key(tensor, suffix), {}), Slot(piece.half, expert)
            if held := _held(slots, slot):
                raise CheckpointError(f"{held.entry} and {entry} hold the same weights; remove one of them")
            slots[slot] = Filled(piece, entry)
    return plan


def _held(slots: Slots, slot: Slot) -> Filled | None:
    """What is already there of a slot: the same, a whole it is part of, or a part of it."""
    halves = (None, 0, 1) if slot.half is None else (None, slot.half)
    if slot.expert is None:
        return next((filled for other, filled in slots.items() if other.half in halves), None)
    both = (Slot(half, expert) for half in halves for expert in (slot.expert, None))
    return next((slots[other] for other in both if other in slots), None)


def _oriented(places: Places, plan: Plan, config: Mapping[str, Any]) -> Plan:
    """Say of packed experts that once were stored transposed which of the two they are (qwen3_vl_moe).

    By the shape, or where it is the same both ways by the version of transformers that wrote the folder.
    """
    if not places.names.once_transposed:
        return plan
    version = config.get("transformers_version")
    release = re.match(r"([0-9]{1,4})\.", version) if isinstance(version, str) else None
    turned = dict(plan)
    for key, slots in plan.items():
        if key.suffix != "weight" or ".experts." not in key.tensor or Slot(None, None) not in slots:
            continue
        piece, entry = slots[Slot(None, None)]
        *lead, rows, columns = places.wanted[key.tensor]
        if rows == columns and release is None:
            raise CheckpointError(
                f"{entry}: {list(entry.shape)} may be transposed or not, and config.json has "
                f"transformers_version {quoted(version)}; add the version that wrote the folder"
            )
        if entry.shape == (*lead, columns, rows) and (rows != columns or (release and int(release[1]) < 5)):
            turned[key] = {Slot(None, None): Filled(replace(piece, ops=("transposed",)), entry)}
    return turned


def _check(places: Places, plan: Plan) -> None:
    """Every place filled, with the config's shapes and dtypes of one kind; or an error that lists what is not."""
    missing: list[str] = []
    are_all = True
    for key in plan:
        if key.suffix != "weight":
            raise CheckpointError(
                f"{key}: belongs to a quantised model, but config.json has no quantization_config; take "
                "config.json from where the tensors come from"
            )
    for tensor, shape in places.wanted.items():
        slots = plan.get(key := Key(tensor, "weight"))
        if slots is None:
            missing.append(tensor)
            continue
        gone = _missing_slots(places, key, slots)
        missing += gone
        are_all &= len(gone) <= FEW
        _same_kind(slots)
        _fits(key, slots, _stored_shapes(slots, shape, places.sizes[tensor]))
    if missing:
        raise CheckpointError(
            f"{len(missing)}{'' if are_all else ' or more'} tensors are missing from the checkpoint: {few(missing)}"
            "; download the missing shards, or mend the export"
        )


def _missing_slots(places: Places, key: Key, slots: Slots) -> list[str]:
    """Checkpoint names of the first that are not there, in the spelling of what is."""
    first, (seen, entry) = next(iter(slots.items()))
    experts = (None,) if first.expert is None else range(places.sizes[key.tensor].experts)
    halves = (None,) if first.half is None else (0, 1)
    gone = (Slot(half, e) for e in experts for half in halves if not _held(slots, Slot(half, e)))
    # Not all of them: a config may say more experts than anybody has patience for.
    return [_spelled(places, entry.name, seen, slot, key.suffix) for slot in islice(gone, FEW + 1)]


def _spelled(places: Places, name: str, seen: Piece, slot: Slot, suffix: str) -> str:
    """The name of a slot that lies beside the piece `seen`, whose own name is `name`."""
    siblings = [p for p in places.names.pieces if p.target == seen.target and p.half == slot.half]
    like = next(p for p in siblings if _block(p.pattern) == _block(seen.pattern))
    before = name[: name.index(seen.pattern.split("{e}")[0].removesuffix("weight"))]
    return f"{before}{like.pattern.replace('{e}', str(slot.expert)).removesuffix('weight')}{suffix}"


def _block(pattern: str) -> str:
    return pattern.removesuffix(".weight").rpartition(".")[0]


def _same_kind(slots: Slots) -> None:
    first_piece, first = next(iter(slots.values()))
    for piece, entry in slots.values():
        if entry.dtype != first.dtype or (piece == first_piece and entry.shape != first.shape):
            raise CheckpointError(
                f"{entry}: got {entry.dtype} {quoted(list(entry.shape))}, want {first.dtype} "
                f"{quoted(list(first.shape))} as {plainly(first.name)} has; mend the export"
            )


def _stored_shapes(slots: Slots, shape: Shape, sizes: Sizes) -> dict[Piece, Shape]:
    """The shape each piece has in the file."""
    out: dict[Piece, Shape] = {}
    for slot, (piece, _) in slots.items():
        if piece not in out:
            cut = part(torch.empty(shape, device="meta"), piece, slot.expert)
            first, *others = to_stored(cut, piece, sizes).shape
            out[piece] = (first * piece.rows, *others)
    return out


def _fits(key: Key, slots: Slots, shapes: Mapping[Piece, Shape]) -> None:
    kinds = INTEGERS if key.tensor.endswith("router.table") else FLOATS
    for piece, entry in slots.values():
        want = shapes[piece]
        if entry.shape != want:
            raise CheckpointError(
                f"{entry}: got shape {quoted(list(entry.shape))}, want {list(want)} as config.json says; "
                "config.json and the tensors are of different models, or the export transposed them"
            )
        if entry.dtype not in kinds:
            raise CheckpointError(
                f"{entry}: got dtype {entry.dtype}, want one of {', '.join(kinds)}; add the "
                "quantization_config that it was made with, or export it unquantised"
            )


def _read(places: Places, plan: Plan, shards: Mapping[str, Any]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key, slots in sorted(plan.items()):
        shape, sizes = places.wanted[key.tensor], places.sizes[key.tensor]
        stored = {slot: shards[entry.shard].get_tensor(entry.name) for slot, (_, entry) in slots.items()}
        whole = torch.empty(shape, dtype=next(iter(stored.values())).dtype)
        for slot, (piece, _) in slots.items():
            row = stored[slot].chunk(piece.rows)[piece.row]
            part(whole, piece, slot.expert).copy_(to_canonical(row, piece, sizes))
        out[str(key)] = whole
    return out
