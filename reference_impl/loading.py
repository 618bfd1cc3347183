"""Load the MoE tensors of a Gemma 4 checkpoint folder: all of them or, with a reason, none.

Three steps, and no tensor data is read before the first two have passed: list what the folder holds (config, index,
shard headers), plan which checkpoint tensor fills which place, then read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_conformance.engine import MoESpec
from moe_conformance.errors import CheckpointError
from moe_conformance.reference_impl.remap import experts_of, parse

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The tensor that carries the weights themselves: as numbers, or as packed integers of GPTQ, AWQ, compressed-tensors.
CARRIERS = ("weight", "qweight", "weight_packed")
FLOATS = ("F64", "F32", "F16", "BF16")
# The parts of each expert tensor, in the order of its rows, and last the part that is all of them.
OWNERS = {"w13": ("gate_proj", "up_proj", "gate_up_proj"), "w2": ("down_proj", "down_proj")}


class Stored(NamedTuple):
    """A tensor as its shard's header describes it. dtype: in safetensors' words, "BF16", "I8", ..."""

    name: str
    shard: str
    shape: tuple[int, ...]
    dtype: str


class Key(NamedTuple):
    """One tensor of the result. owner: "w13" or "w2"; "proj", "scale" or "per_expert_scale" of a router (suffix "")."""

    layer: int
    owner: str
    suffix: str

    def __str__(self) -> str:
        if not self.suffix:
            return f"layers.{self.layer}.router.{self.owner}"
        return f"layers.{self.layer}.experts.{self.owner}" + ("" if self.suffix == "weight" else f".{self.suffix}")


# (part, expert) -> tensor. expert is None where one tensor is the whole: a router's, or packed experts.
Pieces = dict[tuple[str, int | None], Stored]
Plan = dict[Key, Pieces]


def load(folder: Path) -> dict[str, Tensor]:
    """Load a folder of config.json and safetensors, one file or shards with an index.

    returns, for each MoE layer I, tensors of their own memory in the checkpoint's dtype:
      layers.I.experts.w13 [E, 2F, H], gate rows above up rows; layers.I.experts.w2 [E, H, F];
      layers.I.router.proj [E, H]; layers.I.router.scale [H]; layers.I.router.per_expert_scale [E].
    Where the config has a quantization_config, widths and dtypes of weights are as stored, and every further suffix S
    comes as layers.I.experts.w13.S [E, 2, ...] (gate, up) and layers.I.experts.w2.S [E, ...]; from packed tensors
    both as stored. Biases come the same way, in any checkpoint.

    The layout is Gemma 4's, which the config fixes; shapes are checked against it and never used to guess it.
    Tensors outside the MoE blocks are not read. Shards may be symbolic links (the hub's cache is made of them).
    Raises CheckpointError, and ConfigError for a config that is not of a MoE model.
    """
    from moe_conformance.reference_impl.config import describe

    folder = Path(folder)
    config = _json(folder / "config.json")
    spec = describe(config)
    with ExitStack() as stack:
        shards, stored = _open(folder, stack)
        plan = _plan(spec, stored)
        _check(spec, plan, quantised=bool(_quantization(config)))
        try:
            return _read(plan, shards)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{folder}: a shard changed while it was read ({error}); download it again"
            ) from error


def _json(path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := sorted({key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else ()):
            raise CheckpointError(f"{path}: {', '.join(twice)} given twice; keep the one that is meant")
        return dict(pairs)

    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not there; point to a folder with config.json and safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: got a JSON {type(found).__name__}, want an object; download it again")
    return found


def _quantization(config: Mapping[str, Any]) -> Any:
    text = config.get("text_config")
    return config.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config"))


def _open(folder: Path, stack: ExitStack) -> tuple[dict[str, Any], list[Stored]]:
    """Open every shard and list its tensors; the index and the shards must agree on every name."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(f"{folder}: has both {SINGLE} and {INDEX}; remove the one that is not meant")
    if single.exists():
        weight_map, files = None, [SINGLE]
    else:
        weight_map = _weight_map(index)
        files = sorted(set(weight_map.values()))
    shards, stored = {}, []
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file}: not there, but {INDEX} names it; download it")
        try:
            shard = stack.enter_context(safe_open(folder / file, framework="pt"))
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                part = shard.get_slice(name)
                stored.append(Stored(name, file, tuple(part.get_shape()), part.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / file}: damaged or cut short ({error}); download it again") from error
        shards[file] = shard
    if weight_map is not None:
        held = {(entry.name, entry.shard) for entry in stored}
        _none(held - weight_map.items(), "in a shard but not in the index", "write the index anew from the shards")
        _none(weight_map.items() - held, "in the index but not in its shard", "download the shard again")
    return shards, stored


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard, a plain file name beside the index."""
    if not index.exists():
        raise CheckpointError(f"{index.parent}: has neither {SINGLE} nor {INDEX}; download one")
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: got no weight_map, want tensor names and their shards; download it again")
    for name, file in weight_map.items():
        # A name with a separator, a drive or ".." would read outside the folder.
        if not isinstance(file, str) or not file.endswith(".safetensors") or any(c in file for c in "/\\:\0"):
            raise CheckpointError(
                f"{index}: {name}: got shard {file!r}, want the name of a .safetensors file in the same folder; "
                "do not load this checkpoint unless you trust where it came from"
            )
    return weight_map


def _none(entries: set[tuple[str, str]], trouble: str, cure: str) -> None:
    if entries:
        listed = ", ".join(f"{name} ({file})" for name, file in sorted(entries)[:8])
        raise CheckpointError(f"{len(entries)} tensors are {trouble}, first {listed}; {cure}")


def _plan(spec: MoESpec, stored: Sequence[Stored]) -> Plan:
    """Give every MoE tensor its place; no place may be given twice, in one style or in two."""
    plan: Plan = {}
    for entry in stored:
        place = parse(entry.name)
        if place is None:
            continue
        experts_of(spec, entry.name, place)
        owner = next((owner for owner, parts in OWNERS.items() if place.part in parts), place.part)
        pieces = plan.setdefault(Key(place.layer, owner, place.suffix), {})
        piece = place.part, place.expert
        for other, held in pieces.items():
            # The same piece again, or a packed tensor beside pieces of it.
            if other == piece or None in (other[1], piece[1]):
                raise CheckpointError(
                    f"{held.name} in {held.shard} and {entry.name} in {entry.shard} hold the same weights; "
                    "remove one of them"
                )
        pieces[piece] = entry
    return plan


def _check(spec: MoESpec, plan: Plan, quantised: bool) -> None:
    """Every place filled, with the config's shapes and dtypes of one kind; or an error that lists what is not."""
    missing: list[str] = []
    for position, layer in enumerate(spec.moe_layers):
        experts, width, hidden = (
            _at(spec.num_experts, position),
            _at(spec.moe_intermediate_size, position),
            spec.hidden_size,
        )
        want = {
            "w13": (experts, 2 * width, hidden),
            "w2": (experts, hidden, width),
            "proj": (experts, hidden),
            "scale": (hidden,),
            "per_expert_scale": (experts,),
        }
        for owner, shape in want.items():
            keys = [key for key in plan if key[:2] == (layer, owner)]
            carriers = [key for key in keys if key.suffix in CARRIERS or not key.suffix]
            if not carriers:
                missing.append(str(Key(layer, owner, "weight" if owner in OWNERS else "")))
            if len(carriers) > 1:
                raise CheckpointError(f"{' and '.join(map(str, carriers))} are the same weights; remove one of them")
            for key in keys:
                missing += _missing_pieces(key, plan[key], experts)
                _same_kind(plan[key])
                if key.suffix in ("weight", ""):
                    _fits(plan[key], shape, exact=not quantised or owner not in OWNERS)
                elif key.suffix != "bias" and not quantised:
                    raise CheckpointError(
                        f"{key}: belongs to a quantised model, but config.json has no quantization_config; take "
                        "config.json from where the tensors come from"
                    )
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors are missing from the checkpoint: {', '.join(missing[:8])}"
            f"{', ...' if len(missing) > 8 else ''}; download the missing shards, or mend the export"
        )


def _at(value: int | tuple[int, ...], position: int) -> int:
    return value if isinstance(value, int) else value[position]


def _missing_pieces(key: Key, pieces: Pieces, experts: int) -> list[str]:
    if any(expert is None for _, expert in pieces):
        return []
    wanted = ((part, expert) for expert in range(experts) for part in OWNERS[key.owner][:-1])
    return [f"layers.{key.layer}.experts.{e}.{part}.{key.suffix}" for part, e in wanted if (part, e) not in pieces]


def _same_kind(pieces: Pieces) -> None:
    first, *rest = pieces.values()
    for entry in rest:
        if (entry.shape, entry.dtype) != (first.shape, first.dtype):
            raise CheckpointError(
                f"{entry.name} in {entry.shard}: got {entry.dtype} {list(entry.shape)}, want {first.dtype} "
                f"{list(first.shape)} as {first.name} has; mend the export"
            )


def _fits(pieces: Pieces, shape: tuple[int, ...], exact: bool) -> None:
    """shape: of the result. exact: float, and the last dim too; not so where one stored element holds several."""
    (part, expert), entry = next(iter(pieces.items()))
    if expert is not None:
        rows = shape[1] // len(OWNERS["w13"][:-1]) if part in OWNERS["w13"] else shape[1]
        shape = (rows, shape[2])
    compared = len(shape) if exact else len(shape) - 1
    if len(entry.shape) != len(shape) or entry.shape[:compared] != shape[:compared]:
        raise CheckpointError(
            f"{entry.name} in {entry.shard}: got shape {list(entry.shape)}, want {list(shape)} as config.json says; "
            "config.json and the tensors are of different models, or the export transposed them"
        )
    if exact and entry.dtype not in FLOATS:
        raise CheckpointError(
            f"{entry.name} in {entry.shard}: got dtype {entry.dtype}, want one of {', '.join(FLOATS)}; add the "
            "quantization_config that it was made with, or export it unquantised"
        )


def _read(plan: Plan, shards: Mapping[str, Any]) -> dict[str, Tensor]:
    def get(entry: Stored) -> Tensor:
        tensor: Tensor = shards[entry.shard].get_tensor(entry.name)
        return tensor

    out: dict[str, Tensor] = {}
    for key, pieces in sorted(plan.items()):
        experts = sorted({expert for _, expert in pieces if expert is not None})
        if not experts:
            (whole,) = pieces.values()
            out[str(key)] = get(whole).clone()  # what safetensors returns may still be the mapped file
            continue
        parts = [torch.stack([get(pieces[part, e]) for e in experts]) for part in OWNERS[key.owner][:-1]]  # [E, ...]
        if len(parts) == 1:
            out[str(key)] = parts[0]
        else:
            out[str(key)] = torch.cat(parts, dim=1) if key.suffix == "weight" else torch.stack(parts, dim=1)
    return out
