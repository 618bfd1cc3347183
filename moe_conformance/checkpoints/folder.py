"""The files of a checkpoint folder: which hold the model, and that index, links and shards agree."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_conformance.checkpoints.findings import Findings
from moe_conformance.checkpoints.headers import Damaged, Header, Stored, read_header
from moe_conformance.checkpoints.json_files import read_json
from moe_conformance.checkpoints.scheme import HF_QUANT
from moe_conformance.errors import CheckpointError
from moe_conformance.quote import few, plainly, quoted

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Mistral's own names for the same weights, in addition to another form of the model.
CONSOLIDATED = re.compile(r"consolidated[.\w-]*\.safetensors")
_OF = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.safetensors")
# Formats that may run code when they are read.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Bytes of all headers together: of 115 a tensor, they hold 290,000; Kimi-K2 in int4 has 207,000.
MOST_HEADERS = 2**25
# How many entries of a folder are examined; the largest published folder has 700.
MOST_FILES = 20_000


class Folder(NamedTuple):
    """What a folder holds. tensors: by name, of the shards that could be read. data: where each shard's data begin.

    whole: every shard was read, so that an absent tensor is really missing.
    """

    path: Path
    config: dict[str, Any]
    modelopt: dict[str, Any] | None
    tensors: dict[str, Stored]
    data: Mapping[str, int]
    size: int
    whole: bool


def read_folder(path: Path, findings: Findings) -> Folder:
    """Raises CheckpointError where there is nothing to judge."""
    files = _files(path)
    config = _json(path, CONFIG)
    modelopt = _json(path, HF_QUANT) if HF_QUANT in files else None
    shards, weight_map, whole = _shards(path, files, findings)
    _beside(files, shards, findings)
    tensors: dict[str, Stored] = {}
    data: dict[str, int] = {}
    size = headers = 0
    for file in shards:
        header = _header(path, file, weight_map is not None, findings)
        if header is None:
            whole = False
            continue
        data[file] = header.data
        headers += header.data
        if headers > MOST_HEADERS:
            raise CheckpointError(
                f"{path}: got headers of more than {MOST_HEADERS} bytes together, up to {plainly(file)}; join small "
                "tensors, or do not load this folder unless you trust where it came from"
            )
        size += header.size
        for entry in header.tensors:
            held = tensors.setdefault(entry.name, entry)
            if held is not entry:
                _doubled(held, entry, findings)
    if weight_map is not None:
        _agree(weight_map, tensors, data, findings)
    return Folder(path, config, modelopt, tensors, data, size, whole)


def _json(path: Path, file: str) -> dict[str, Any]:
    if outside := _outside(path, file):
        raise CheckpointError(
            f"{path / file}: got a link to {plainly(outside)}, want a file; put the file itself there"
        )
    return read_json(path / file)


def _files(path: Path) -> list[str]:
    try:
        with os.scandir(path) as found:
            names = [entry.name for entry, _ in zip(found, range(MOST_FILES + 1), strict=False)]
    except (OSError, ValueError) as error:  # a name with a zero in it
        why = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{plainly(str(path))}: not readable ({why}); point to the model's folder") from error
    if len(names) > MOST_FILES:
        raise CheckpointError(f"{path}: got more than {MOST_FILES} files; point to the model's folder")
    return sorted(names)


def _shards(path: Path, files: list[str], findings: Findings) -> tuple[list[str], dict[str, str] | None, bool]:
    """The files that hold the model; the index, None without one; whether they are as many as their names say."""
    if INDEX in files:
        weight_map = _weight_map(path)
        if SINGLE in files and SINGLE not in weight_map.values():
            findings.add(
                "index",
                SINGLE,
                got=f"{SINGLE} beside {INDEX}, which does not name it",
                want="one of them",
                do="remove the one that is not meant; engines differ in which they read",
            )
        return sorted(set(weight_map.values())), weight_map, True
    if SINGLE in files:
        return [SINGLE], None, True
    held = [file for file in files if file.endswith(".safetensors")]
    main = [file for file in held if not CONSOLIDATED.fullmatch(file)] or held
    if not main:
        raise CheckpointError(f"{path}: has neither {SINGLE} nor {INDEX}, nor other safetensors; download them")
    if main is not held or not all(map(CONSOLIDATED.fullmatch, main)):
        findings.add(
            "index",
            INDEX,
            got="no such file",
            want=f"an index of {few(main)}, or one {SINGLE}",
            do="download it, or write it anew from the shards",
        )
    return main, None, _are_all(main, findings)


def _are_all(files: list[str], findings: Findings) -> bool:
    """Whether there are as many files as their names say."""
    whole = True
    for stem, of in dict.fromkeys((match[1], match[3]) for file in files if (match := _OF.fullmatch(file))):
        present = {int(m[2]) for file in files if (m := _OF.fullmatch(file)) and (m[1], m[3]) == (stem, of)}
        gone = [n for n in range(1, int(of) + 1) if n not in present]
        if gone:
            whole = False
            _shard_missing(f"{stem}-{gone[0]:05}-of-{of}.safetensors", len(gone), findings)
    return whole


def _shard_missing(file: str, count: int, findings: Findings) -> None:
    more = f" and {count - 1} more" if count > 1 else ""
    findings.add("shard-missing", file, got="no such file" + more, want="every shard", do="download it")


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> shard, a plain file name beside the index."""
    index, weight_map = path / INDEX, _json(path, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: got no weight_map, want tensor names and their shards; download it again")
    # A name with a separator, a drive or ".." would read outside the folder.
    files = dict.fromkeys(file if isinstance(file, str) else None for file in weight_map.values())
    for file in files:
        if file is None or not file.endswith(".safetensors") or any(c in file for c in "/\\:\0"):
            name, got = next((n, f) for n, f in weight_map.items() if f == file or not isinstance(f, str))
            raise CheckpointError(
                f"{index}: {plainly(name)}: got shard {quoted(got)}, want the name of a .safetensors file in the "
                "same folder; do not load this checkpoint unless you trust where it came from"
            )
    return weight_map


def _beside(files: list[str], shards: list[str], findings: Findings) -> None:
    """Files in the folder that are not part of the model."""
    for file in files:
        if file.endswith(".safetensors") and file not in shards and file != SINGLE:
            got, do = "a file that is no part of the model", "remove it if it is not meant; it was not judged"
            if CONSOLIDATED.fullmatch(file):
                got, do = "the model once more, by its maker's own names", "leave it; it was not judged"
            findings.add("beside", file, got=got, want="nothing beside the model's files", do=do, level="note")
        elif file.endswith(PICKLES):
            findings.add(
                "pickle",
                file,
                got="a format that may run code when it is read",
                want="safetensors alone",
                do="remove it unless you trust where it came from; it was not opened",
                level="note",
            )


def _header(path: Path, file: str, is_indexed: bool, findings: Findings) -> Header | None:
    try:
        if outside := _outside(path, file):
            findings.add(
                "link",
                file,
                got=f"a link to {plainly(outside)}",
                want="a file in this folder",
                do="put the file itself there; it was not read",
            )
            return None
        return read_header(path / file, file)
    except Damaged as error:
        findings.add(error.kind, file, got=error.got, want=error.want, do=error.do)
    except FileNotFoundError:
        _shard_missing(file, 1, findings)
    except OSError as error:
        do = "download it" if is_indexed else "point to a folder that can be read"
        findings.add("unreadable", file, got=error.strerror or str(error), want="a file that can be read", do=do)
    except MemoryError:
        findings.add("unreadable", file, got="more than memory holds", want="a header that fits", do="raise its limit")
    return None


def _outside(path: Path, file: str) -> str:
    """The target of a link that leaves the folder.

    The hub's cache, whose snapshots link to its blobs, counts as one folder.
    """
    place = path / file
    if not place.is_symlink():
        return ""
    target, home = os.path.realpath(place), os.path.realpath(path)
    snapshots = os.path.dirname(home)
    homes = [home]
    if os.path.basename(snapshots) == "snapshots":
        homes.append(os.path.join(os.path.dirname(snapshots), "blobs"))
    return "" if os.path.dirname(target) in homes else target


def _doubled(held: Stored, entry: Stored, findings: Findings) -> None:
    same = (held.dtype, held.shape) == (entry.dtype, entry.shape)
    findings.add(
        "doubled",
        entry.file,
        entry.name,
        got=f"it in {plainly(held.file)} and in {plainly(entry.file)}"
        + ("" if same else ", of another shape or dtype"),
        want="each tensor once",
        do="remove one of them: which is read depends on the order of the files",
    )


def _agree(
    weight_map: Mapping[str, str], tensors: Mapping[str, Stored], data: Mapping[str, int], findings: Findings
) -> None:
    """Whether index and shards agree; a shard that could not be read is left out."""
    for file, names in _by_file((n, e.file) for n, e in tensors.items() if weight_map.get(n) != e.file):
        lost = [name for name in names if name not in weight_map]
        moved = [name for name in names if name in weight_map and weight_map[name] in data]
        if lost:
            do = "write the index anew from the shards: engines that go by it skip the tensor"
            findings.add("index", file, lost, got="a tensor that the index does not have", want="every one", do=do)
        if moved:
            do = "write the index anew from the shards"
            findings.add("index", file, moved, got="the tensor here", want="it where the index says", do=do)
    gone = ((name, file) for name, file in weight_map.items() if name not in tensors and file in data)
    for file, names in _by_file(gone):
        do = "download the shard again, or write the index anew from the shards"
        findings.add("missing", file, names, got="no such tensor", want="it, as the index says", do=do)


def _by_file(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for name, file in pairs:
        found.setdefault(file, []).append(name)
    yield from found.items()
