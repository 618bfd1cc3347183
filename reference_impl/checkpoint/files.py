"""The files of a checkpoint folder: config.json, an index or none, safetensors; what they hold, and that they agree."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from moe_conformance.checkpoints.json_files import read_json
from moe_conformance.errors import CheckpointError
from moe_conformance.quote import FEW, plainly, quoted

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class Stored(NamedTuple):
    """A tensor as its shard's header describes it. dtype: in safetensors' words, "BF16", "I8", ..."""

    name: str
    shard: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{plainly(self.name)} in {plainly(self.shard)}"


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
        if not _is_file(folder / file):
            named = f"; {INDEX} names it" if weight_map is not None else ""
            raise CheckpointError(f"{folder / plainly(file)}: not there, or no file{named}; download it")
        try:
            shard = stack.enter_context(safe_open(folder / file, framework="pt"))
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                part = shard.get_slice(name)
                stored.append(Stored(name, file, tuple(part.get_shape()), part.get_dtype()))
        except (SafetensorError, OSError, OverflowError) as error:
            trouble = plainly(str(error))
            raise CheckpointError(f"{folder / file}: damaged or cut short ({trouble}); download it again") from error
        except MemoryError as error:
            raise CheckpointError(f"{folder / file}: larger than what this process may map; raise its limit") from error
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
                f"{index}: {plainly(name)}: got shard {quoted(file)}, want the name of a .safetensors file in the "
                "same folder; do not load this checkpoint unless you trust where it came from"
            )
    return weight_map


def _none(entries: set[tuple[str, str]], trouble: str, cure: str) -> None:
    if entries:
        first = ", ".join(f"{plainly(name)} ({plainly(file)})" for name, file in sorted(entries)[:FEW])
        raise CheckpointError(f"{len(entries)} tensors are {trouble}, first {first}; {cure}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False
