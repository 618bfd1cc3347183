"""The files of a checkpoint folder: config.json, an index or none, safetensors; what they hold, and that they agree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from moe_conformance.errors import CheckpointError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class Stored(NamedTuple):
    """A tensor as its shard's header describes it. dtype: in safetensors' words, "BF16", "I8", ..."""

    name: str
    shard: str
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in which no key is given twice. Raises CheckpointError."""

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


def open_shards(folder: Path, stack: ExitStack) -> tuple[dict[str, Any], list[Stored]]:
    """Open every shard and list its tensors; the index and the shards must agree on every name.

    Shards may be symbolic links (the hub's cache is made of them). Raises CheckpointError.
    """
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
    weight_map = read_json(index).get("weight_map")
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


def quantization(config: Mapping[str, Any]) -> Any:
    """The config's quantization_config, at the top or in its text part; None without."""
    text = config.get("text_config")
    return config.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config")) or None
