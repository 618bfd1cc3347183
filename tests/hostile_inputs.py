"""Hostile configs, checkpoints and stored weights: each is data that can be kept in a file and tried again.

An input is a base (a valid config, a checkpoint of it, or a call that dequantises) and edits of it. What an edit does
with a config, a header or an index is one of set, drop, wrap; values that JSON has no words for are spelled {"$": ...}.
`tries` are the calls that a user would make with it. Each must give a result, or an error of this project's own.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import random
import re
import resource
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hostile_records as records
import torch

from moe_conformance.checkpoints.command import judged as judged_folder
from moe_conformance.checkpoints.report import text
from moe_conformance.engine import CheckpointName
from moe_conformance.engines.reference import Reference
from moe_conformance.errors import MoEConformanceError
from moe_conformance.model.families.describe import describe, layer_of
from moe_conformance.model.families.families import NESTED, NESTED_LAST, RECORDS
from moe_conformance.reference_impl.checkpoint.files import CONFIG, INDEX, SINGLE
from moe_conformance.reference_impl.checkpoint.places import SUFFIXES, Places
from moe_conformance.reference_impl.checkpoint.saving import save
from moe_conformance.reference_impl.quantised import fp4, fp8, gptq, integers
from moe_conformance.reference_impl.quantised.tiles import BLOCK_128, PER_CHANNEL, PER_TENSOR
from moe_conformance.routes.record import read_record
from moe_conformance.suites.block import configs as blocks
from moe_conformance.suites.describe import cases as described
from moe_conformance.suites.describe.families import flat_keys, layer_keys, nested

SECONDS = 2.0  # that one call may take
MEMORY = 2 * 2**30
LONGEST = 5000  # characters of a message

Edits = list[list[Any]]
Kind = str  # "config", "checkpoint", "stored", "record"


@dataclass(frozen=True)
class Hostile:
    kind: Kind
    base: str
    edits: Edits

    def text(self) -> str:
        return json.dumps({"kind": self.kind, "base": self.base, "edits": self.edits})


@dataclass(frozen=True)
class Found:
    """A call that gave neither a result nor an error of this project's own.

    what: "raw", an exception of another kind; "slow"; "endless", an error with a message that nobody reads; "hang" and
    "died", a process that had to be ended or ended.
    """

    call: str
    what: str
    trouble: str
    place: str

    @property
    def signature(self) -> tuple[str, ...]:
        return self.what, self.trouble.partition(":")[0], self.place


class TooSlow(BaseException):
    """Not an Exception: nothing on the way may take it for an error of its own."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def little_memory() -> Iterator[None]:
    """MEMORY beyond what this process has: what reads a device without end must not take the machine along."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def judged(name: str, call: Callable[[], Any], seconds: float = SECONDS) -> tuple[str, Found | None]:
    """ "result", "refused", or what is wrong, and then the finding."""
    try:
        with limited(seconds):
            call()
    except MoEConformanceError as error:
        if len(str(error)) > LONGEST:
            return "endless", Found(name, "endless", f"{type(error).__name__}: {str(error)[:200]}", _place(error))
        return "refused", None
    except TooSlow as error:
        return "slow", Found(name, "slow", f"over {seconds} s", _place(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return "raw", Found(name, "raw", f"{type(error).__name__}: {_message(error)}", _place(error))
    return "result", None


def _message(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except ValueError:
        return "a message that cannot be written"


def _place(error: BaseException) -> str:
    """The innermost line of this project's own."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
    own = [frame for frame in own if not frame.filename.endswith(("hostile_inputs.py", "fuzz.py"))] or own
    return f"{Path(own[-1].filename).name}:{own[-1].name}"


# Bases ------------------------------------------------------------------------------------------------------------


@functools.cache
def configs() -> dict[str, dict[str, Any]]:
    """Valid configs of every family: with every knob turned, in every way of its method, nested, and as on the hub."""
    found = {slug: family.config for slug, family in blocks.FAMILIES.items()}
    for record in RECORDS.values():
        own = {"model_type": record.model_type}
        found.setdefault(record.slug, own | flat_keys(record))
        for number, way in enumerate(record.ways):
            found[f"{record.slug}/{number}"] = own | layer_keys(record, way)
        if record.wrapper:
            outer = {"model_type": record.model_type.removesuffix("_text")}
            found[f"{record.slug}/nested"] = nested(record, own | flat_keys(record)) | outer
    for case in described.CASES:
        if "class" not in case.recipe:
            found[case.id] = case["keys"]
    return found


# Those of one file each family; a config that Places refuses has no checkpoint.
@functools.cache
def checkpoints() -> tuple[str, ...]:
    return tuple(blocks.FAMILIES)


@functools.cache
def keys() -> tuple[str, ...]:
    """Every key that some base or some table of families has."""
    found: set[str] = {"per_layer_config", "quantization_config", "num_nextn_predict_layers", "transformers_version"}
    for config in configs().values():
        found |= _keys_below(config)
    for record in RECORDS.values():
        found.update(name for names in record.method_keys for name in names)
    return tuple(sorted(found | {*NESTED, *NESTED_LAST}))


@functools.cache
def values_of(key: str) -> tuple[Any, ...]:
    """What the bases say under a key."""
    found: list[Any] = []
    for config in configs().values():
        found += [_at(config, path) for path in _paths(config) if path[-1] == key]
    return tuple(found)


def _keys_below(config: dict[str, Any]) -> set[str]:
    below = [_keys_below(value) for value in config.values() if isinstance(value, dict)]
    return set(config).union(*below)


# Values -----------------------------------------------------------------------------------------------------------

NUMBERS = (0, -1, 1, 2, 3, 7, 12, 97, 10**4, 10**5, 10**7, 10**9, 2**31, 2**63, 2**64, 10**30, -(10**30))
FRACTIONS = (0.5, 2.0, -2.5, 1e-320, 1e308, 1e30, math.nan, math.inf, -math.inf)
WORDS = ("", "0", "11", "sparse", "moe", "dense", "1,2", "1,,2", "a,b", "٣", "\0", "silu", "9" * 40)
LISTS: tuple[Any, ...] = ([], [None], [True, False], [0], [-1, 1], [2.5, "x"], [[1], [2]], ["dense", "sparse"], [{}])
MAPS: tuple[Any, ...] = ({}, {"0": 0}, {"1": {"num_experts_per_tok": 2}}, {"x": {}}, {"0": []}, {"-1": {"a": None}})
LARGE: tuple[Any, ...] = (
    {"$": ["text", "x", 20_000]},
    {"$": ["text", "9", 5000]},
    {"$": ["text", "7,", 10**6]},
    {"$": ["repeat", 1, 10**5]},
    {"$": ["repeat", "sparse", 10**5]},
    {"$": ["repeat", [], 10**4]},
    {"$": ["keys", 10**5]},
    {"$": ["power", 10, 400]},
)
# What no config.json can hold, but a dict can.
PYTHON: tuple[Any, ...] = (
    {"$": ["power", 10, 5000]},
    {"$": ["deep", "list", 10**5]},
    {"$": ["deep", "map", 10**5]},
    {"$": ["tuple", [1, 2]]},
    {"$": ["bytes"]},
    {"$": ["set"]},
    {"$": ["object"]},
    {"$": ["self"]},
    {"$": ["broken object"]},
    {"$": ["number keys"]},
)


def decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [decoded(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if "$" not in value:
        return {key: decoded(entry) for key, entry in value.items()}
    match value["$"]:
        case ["repeat", entry, count]:
            return [decoded(entry)] * count
        case ["text", letters, count]:
            return letters * count
        case ["keys", count]:
            return {str(number): number for number in range(count)}
        case ["power", base, exponent]:
            return base**exponent
        case ["deep", kind, depth]:
            found: Any = 1
            for _ in range(depth):
                found = [found] if kind == "list" else {"text_config": found}
            return found
        case ["tuple", entries]:
            return tuple(entries)
        case ["bytes"]:
            return b"sparse"
        case ["set"]:
            return {1, 2}
        case ["object"]:
            return object()
        case ["broken object"]:
            return SimpleNamespace(to_dict=lambda: ["no", "map"])
        case ["self"]:
            own: dict[str, Any] = {}
            own |= {"text_config": own, "llm_config": own}
            return own
        case ["number keys"]:
            return {1: {"num_experts_per_tok": 2}, None: 1, 2.5: 2, (1,): 3}
    raise ValueError(f"value: got {value!r}, want a word of hostile_inputs.decoded")


def _value(rng: random.Random, python: bool) -> Any:
    kinds = [NUMBERS, NUMBERS, FRACTIONS, WORDS, LISTS, MAPS, LARGE, (None, True, False)] + [PYTHON] * python
    return rng.choice(rng.choice(kinds))


# Edits of a map ---------------------------------------------------------------------------------------------------


def edited(config: Any, edit: list[Any]) -> Any:
    """A map after one edit: ["set", path, value], ["drop", path], ["wrap", keys]. A path that is not there changes
    nothing."""
    match edit:
        case ["set", path, value]:
            parent = _at(config, path[:-1], make=True)
            if isinstance(parent, dict) or (isinstance(parent, list) and _is_index(path[-1], parent)):
                parent[path[-1]] = decoded(value)
        case ["drop", path]:
            parent = _at(config, path[:-1])
            if (isinstance(parent, dict) and path[-1] in parent) or (
                isinstance(parent, list) and _is_index(path[-1], parent)
            ):
                del parent[path[-1]]
        case ["wrap", names]:
            own = config.get("model_type") if isinstance(config, dict) else None
            for name in names:
                config = {name: config}
            if own is not None:
                config["model_type"] = own
        case ["whole", value]:
            return decoded(value)
        case _:
            raise ValueError(f"edit: got {edit!r}, want set, drop, wrap or whole")
    return config


def _is_index(key: Any, parent: list[Any]) -> bool:
    return isinstance(key, int) and -len(parent) <= key < len(parent)


def _at(config: Any, path: list[Any], make: bool = False) -> Any:
    for key in path:
        if isinstance(config, dict):
            if make and not isinstance(config.get(key), dict | list):
                config[key] = {}
            config = config.get(key)
        elif isinstance(config, list) and _is_index(key, config):
            config = config[key]
        else:
            return None
    return config


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[list[Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield [*path, key]
        yield from _paths(entry, (*path, key))


def _config_edit(rng: random.Random, config: dict[str, Any], python: bool = True) -> list[Any]:
    paths = list(_paths(config))
    match rng.randrange(14):
        case 0:
            return ["drop", rng.choice(paths)]
        case 12 | 13:  # what another family says: valid there
            key = rng.choice((rng.choice(keys()), rng.choice(paths)[-1]))
            return ["set", [*rng.choice(paths)[:-1], key], rng.choice(values_of(key) or (None,))]
        case 1:
            return ["set", ["model_type"], rng.choice([rng.choice(sorted(RECORDS)), _value(rng, python)])]
        case 2:
            return ["wrap", rng.choices((*NESTED, *NESTED_LAST), k=rng.choice((1, 1, 2, 3, 300)))]
        case 3:
            path = rng.choice(paths)
            below = [path[:-1]] if rng.random() < 0.5 else [[]]
            return ["set", [*below[0], rng.choice((*NESTED, *NESTED_LAST))], _value(rng, python)]
        case 4:
            own = {rng.choice(("0", "1", "01", "x", "-1", "9" * 5000, "")): {rng.choice(keys()): _value(rng, python)}}
            return ["set", ["per_layer_config"], rng.choice((own, _value(rng, python)))]
        case 5 | 6:
            return ["set", [rng.choice(keys())], _value(rng, python)]
        case 7 if python and rng.random() < 0.2:
            return ["whole", _value(rng, python)]
        case 7:
            path = rng.choice(paths)
            value = _at(config, path)
            return ["set", path, value * rng.choice((2, 3)) if isinstance(value, list) else _value(rng, python)]
        case _:
            return ["set", rng.choice(paths), _value(rng, python)]


# Checkpoints ------------------------------------------------------------------------------------------------------

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "X9", "")
SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
SPECIAL = ("fifo", "zero", "random", "full", "folder", "socket", "loop", "dangling", "memory", "unreadable")


@dataclass
class Shard:
    """tensors: name -> dtype, shape. header: edits of it as JSON, that nothing else is made to fit."""

    tensors: dict[str, tuple[str, list[int]]]
    header: list[list[Any]]


@functools.cache
def _written(slug: str) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """Name and header of each shard of the family's checkpoint, as `save` writes it."""
    config = blocks.FAMILIES[slug].config
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder, config, _canonical(slug), shards=2)
        return {file.name: _header(file) for file in sorted(folder.glob("*.safetensors"))}


def _header(file: Path) -> dict[str, tuple[str, list[int]]]:
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


@functools.cache
def _canonical(slug: str) -> dict[str, torch.Tensor]:
    wanted = Places(blocks.FAMILIES[slug].config).wanted
    dtypes = {name: torch.int64 if name.endswith("router.table") else torch.bfloat16 for name in wanted}
    return {name: torch.zeros(shape, dtype=dtypes[name]) for name, shape in wanted.items()}


def _bytes(shard: Shard) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in shard.tensors.items():
        size = math.prod(shape) * SIZES.get(dtype, 1)
        size = size if end + size < 2**24 else 0  # more is not written: the header lies
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    for edit in shard.header:
        header = edited(header, edit)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(end)


def write(folder: Path, slug: str, edits: Edits) -> dict[str, Any]:
    """The checkpoint after the edits, in a folder that is empty. returns its config, where that is a map."""
    config: Any = copy.deepcopy(blocks.FAMILIES[slug].config)
    shards = {file: Shard(dict(tensors), []) for file, tensors in _written(slug).items()}
    index: Any = None
    later: Edits = []
    for edit in edits:
        match edit:
            case ["config", inner]:
                config = edited(config, inner)
            case ["header", file, inner]:
                if file in shards:
                    shards[file].header.append(inner)
            case ["rename", old, new]:
                for shard in shards.values():
                    if old in shard.tensors:
                        shard.tensors[new] = shard.tensors.pop(old)
            case ["retensor", name, dtype, shape]:
                for shard in shards.values():
                    if name in shard.tensors:
                        shard.tensors[name] = (dtype or shard.tensors[name][0], shape)
            case ["add", pattern, dtype, shape, count]:
                first = next(iter(shards.values()))
                first.tensors |= {pattern.replace("{n}", str(n)): (dtype, shape) for n in range(count)}
            case ["remove", pattern]:
                for shard in shards.values():
                    shard.tensors = {name: t for name, t in shard.tensors.items() if not re.search(pattern, name)}
            case ["quantise", dtype, suffixes]:
                config = edited(config, ["set", ["quantization_config"], {"quant_method": "any"}])
                for shard in shards.values():
                    experts = [name for name in shard.tensors if "experts" in name]
                    for name in experts:
                        old, shape = shard.tensors.pop(name)
                        stem = name.removesuffix(".weight")
                        for suffix in suffixes:
                            carries = suffix in ("weight", "qweight", "weight_packed")
                            shard.tensors[f"{stem}.{suffix}"] = (dtype if carries else "F32", shape if carries else [1])
            case ["one file"]:
                tensors = {name: tensor for shard in shards.values() for name, tensor in shard.tensors.items()}
                shards = {SINGLE: Shard(tensors, [])}
            case _:
                later.append(edit)
    (folder / CONFIG).write_bytes(json.dumps(config).encode("utf-8", "surrogatepass"))
    for file, shard in shards.items():
        (folder / file).write_bytes(_bytes(shard))
    if SINGLE not in shards:
        index = {"metadata": {}, "weight_map": {name: file for file, shard in shards.items() for name in shard.tensors}}
        for edit in later:
            if edit[0] == "index":
                index = edited(index, edit[1])
        (folder / INDEX).write_bytes(json.dumps(index).encode("utf-8", "surrogatepass"))
    for edit in later:
        if edit[0] != "index":
            _spoil(folder, edit)
    return config if isinstance(config, dict) else {}


def _spoil(folder: Path, edit: list[Any]) -> None:
    """Edits of the bytes of a file, and of what a file is."""
    what, name, *rest = edit
    file = folder / name
    if file.is_symlink() or (file.exists() and not file.is_file()):
        return  # an earlier edit made it something else
    data = bytearray(file.read_bytes()) if file.exists() and file.stat().st_size < 2**24 else bytearray()
    match what, rest:
        case "text", [text]:
            file.write_bytes(decoded_text(text).encode("utf-8", "surrogatepass"))
        case "twice", [count, different]:
            pairs = ",".join(f'"{n if different else "k"}": 0,"{n if different else "k"}": 1' for n in range(count))
            if name.endswith(".json"):
                file.write_text("{" + pairs + "}")
            else:
                one = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
                header = (
                    "{" + ",".join(f'"{n // 2 if different else "k"}":{one}' for n in range(count)) + "}"
                ).encode()
                file.write_bytes(len(header).to_bytes(8, "little") + header)
        case "bytes", [offset, hexed]:
            data[offset : offset + len(hexed) // 2] = bytes.fromhex(hexed)
            file.write_bytes(data)
        case "cut", [length]:
            file.write_bytes(data[:length])
        case "size", [size]:
            file.write_bytes(size.to_bytes(8, "little") + data[8:])
        case "sparse", [size]:
            with file.open("r+b" if file.is_file() else "wb") as stream:
                stream.truncate(size)
        case "special", [kind]:
            if file.is_file():
                file.unlink()
            _special(file, kind)
        case "gone", []:
            file.unlink(missing_ok=True)
        case "copy", [other]:
            if file.exists() and not os.path.lexists(folder / other):
                (folder / other).write_bytes(data)
                os.truncate(folder / other, file.stat().st_size)  # of a sparse one no byte is written
        case _:
            raise ValueError(f"edit: got {edit!r}, want one that hostile_inputs knows")


def decoded_text(text: Any) -> str:
    """A text, or how often one is repeated between two others: [before, text, count, after]."""
    if isinstance(text, str):
        return text
    before, again, count, after = text
    return str(before + again * count + after)


def _special(file: Path, kind: str) -> None:
    devices = {"zero": "/dev/zero", "random": "/dev/urandom", "full": "/dev/full", "memory": "/proc/self/mem"}
    match kind:
        case "fifo":
            os.mkfifo(file)
        case "folder":
            file.mkdir()
        case "socket":
            with socket.socket(socket.AF_UNIX) as made:
                here = Path.cwd()
                os.chdir(file.parent)  # a path of a socket has at most 107 bytes
                made.bind(file.name)
                os.chdir(here)
        case "loop":
            file.symlink_to(file)
        case "dangling":
            file.symlink_to("not-there")
        case "unreadable":
            file.write_bytes(b"{}")
            file.chmod(0)
        case _:
            file.symlink_to(devices[kind])


TEXTS: tuple[Any, ...] = (
    "",
    "null",
    "[]",
    "{",
    "\ud800",
    "\ufeff{}",
    '{"a": ' + "9" * 5000 + "}",
    '{"weight_map": {"a": 1e999}}',
    ["", "[", 10**5, ""],
    ["", '{"text_config":', 10**5, ""],
    ["", '{"text_config":', 400, "1" + "}" * 400],
    ["", " ", 2 * 10**7, "{}"],
    ['{"a": [', "0,", 3 * 10**6, "0]}"],
)


def _name(rng: random.Random, names: list[str]) -> str:
    """A tensor's name, or one that is nearly one."""
    name = rng.choice(names)
    match rng.randrange(8):
        case 0:
            number = rng.choice(("0", "1", "00", "-1", "٣", "999999", "1000000", "9" * 5000, "x", ""))
            parts = name.split(".")
            numbered = [i for i, part in enumerate(parts) if part.isdigit()]
            if numbered:
                parts[rng.choice(numbered)] = number
            return ".".join(parts)
        case 1:
            return f"{name.removesuffix('.weight')}.{rng.choice(SUFFIXES)}"
        case 2:
            return name.replace("experts", rng.choice(("experts.experts", "moe.experts", "expert", "")))
        case 3:
            return rng.choice(("model.", "language_model.", "model.language_model.", "x.")) + name
        case 4:
            return name + rng.choice(("\n", "\0", ".", ".weight", "." * 1000, "\ud83d"))
        case 5:
            parts = name.split(".")
            rng.shuffle(parts)
            return ".".join(parts)
        case 6:
            return re.sub(r"(experts[._a-z]*)\d+", r"\g<1>{n}", name)
        case _:
            return name


def _shape(rng: random.Random) -> list[int]:
    sizes = (0, 1, 1, 2, 3, 12, 24, 40, 2**16, 2**31, 2**62, 2**63, 2**64)
    return [rng.choice(sizes) for _ in range(rng.choice((0, 1, 2, 3, 3, 4, 5, 100)))]


def _checkpoint_edit(rng: random.Random, slug: str) -> list[Any]:
    written = _written(slug)
    names = [name for tensors in written.values() for name in tensors]
    shapes = {name: list(shape) for tensors in written.values() for name, (_, shape) in tensors.items()}
    files = list(written)
    anything = [CONFIG, INDEX, *files, SINGLE]
    name = rng.choice(names)
    match rng.randrange(20):
        case 0 | 1 | 2 | 3:
            return ["config", _config_edit(rng, blocks.FAMILIES[slug].config, python=False)]
        case 4:
            path = rng.choice((["weight_map"], ["weight_map", name], ["weight_map", "ghost"], ["metadata"]))
            value = rng.choice((*files, "../x.safetensors", ".safetensors", "a\0.safetensors", _value(rng, False)))
            return ["index", rng.choice((["set", path, value], ["drop", path]))]
        case 5 | 6:
            file = rng.choice(files)
            if not written[file]:
                return ["one file"]
            path = [rng.choice(list(written[file])), *rng.choice(([], ["dtype"], ["shape"], ["data_offsets"], ["x"]))]
            value = rng.choice((_shape(rng), rng.choice(DTYPES), _value(rng, False)))
            return ["header", file, rng.choice((["set", path, value], ["set", path, value], ["drop", path]))]
        case 7 | 8:
            return ["rename", name, _name(rng, names)]
        case 9:
            return ["retensor", name, rng.choice(DTYPES), rng.choice((_shape(rng), shapes[name][::-1], shapes[name]))]
        case 10:
            count = rng.choice((1, 2, 13, 1000, 20_000))
            return ["add", _name(rng, names), rng.choice(DTYPES), rng.choice(([0], _shape(rng))), count]
        case 11:
            return ["remove", re.escape(rng.choice((name, name.rpartition(".")[0], ".", "experts"))) + "$" * 0]
        case 12:
            carrier = rng.choice(("weight", "qweight", "weight_packed"))
            return ["quantise", rng.choice(DTYPES), [carrier, *rng.sample(SUFFIXES, rng.randrange(4))]]
        case 13:
            return ["one file"]
        case 14:
            return ["text", rng.choice((CONFIG, INDEX)), rng.choice(TEXTS)]
        case 15:
            return ["twice", rng.choice(anything), rng.choice((1, 2, 1000, 30_000)), rng.random() < 0.5]
        case 16:
            return ["bytes", rng.choice(anything), rng.randrange(400), rng.randbytes(rng.choice((1, 2, 8))).hex()]
        case 17:
            sizes = (0, 1, 7, 8, 100, 2**20, 2**27, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
            return rng.choice(
                (["cut", rng.choice(anything), rng.randrange(3000)], ["size", files[0], rng.choice(sizes)])
            )
        case 18:
            return rng.choice(
                (
                    ["sparse", rng.choice(anything), rng.choice((0, 2**20, 2**28, 2**33))],
                    ["gone", rng.choice(anything)],
                    ["copy", files[0], SINGLE],
                )
            )
        case _:
            return ["special", rng.choice(anything), rng.choice(SPECIAL)]


# What a user gives to `save` beside a config.
def _save_edit(rng: random.Random, slug: str) -> list[Any]:
    name = rng.choice(list(_canonical(slug)))
    what = rng.choice(
        ("gone", "none", "list", "number", "meta", "sparse", "int8", "complex", "empty", "turned", "shared")
    )
    return rng.choice((["give", name, what], ["shards", rng.choice((0, 1, 2, 100, -1, 2.5, "x", None, 10**9))]))


def given(slug: str, edits: Edits) -> tuple[dict[str, Any], Any]:
    """Tensors and number of shards for `save`."""
    tensors: dict[str, Any] = dict(_canonical(slug))
    shards: Any = 1
    for edit in edits:
        match edit:
            case ["shards", number]:
                shards = number
            case ["give", name, what]:
                tensor = _canonical(slug)[name]
                if what == "gone":
                    tensors.pop(name, None)
                else:
                    tensors[name] = _given(what, tensor, next(iter(tensors.values()), None))
    return tensors, shards


def _given(what: str, tensor: torch.Tensor, first: Any) -> Any:
    match what:
        case "none":
            return None
        case "list":
            return tensor.tolist()
        case "number":
            return 1.0
        case "meta":
            return tensor.to("meta")
        case "sparse":
            return tensor.float().to_sparse()
        case "int8":
            return tensor.to(torch.int8)
        case "complex":
            return tensor.to(torch.complex64)
        case "empty":
            return tensor[:0]
        case "turned":
            return tensor.movedim(-1, 0)
        case _:
            return first


# Stored weights ---------------------------------------------------------------------------------------------------

E, ROWS, COLS = 3, 64, 64


def _stored() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    def t(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.ones(shape).to(dtype)

    f8, i32, u8, f16, f32 = torch.float8_e4m3fn, torch.int32, torch.uint8, torch.float16, torch.float32
    return {
        "fp8": (fp8.dequantise_fp8, {"weight": t(f8, E, ROWS, COLS), "scale": t(f32, E, 2, 1), "tile": PER_TENSOR,
                                     "stacked": 2}),
        "fp8-block": (fp8.dequantise_fp8, {"weight": t(f8, E, ROWS, COLS), "scale": t(f32, E, 1, 1),
                                           "tile": BLOCK_128}),
        "int8": (integers.dequantise_int8, {"weight": t(torch.int8, E, ROWS, COLS), "scale": t(f32, E, ROWS, 1),
                                            "tile": PER_CHANNEL}),
        "mxfp4": (fp4.dequantise_mxfp4, {"blocks": t(u8, E, ROWS, 2, 16), "scales": t(u8, E, ROWS, 2)}),
        "nvfp4": (fp4.dequantise_nvfp4, {"packed": t(u8, E, ROWS, COLS // 2), "scale": t(f8, E, ROWS, COLS // 16),
                                         "weight_scale_2": t(f32, E, 2)}),
        "packed": (integers.dequantise_packed, {"weight_packed": t(i32, E, ROWS, COLS // 8),
                                                "weight_scale": t(f16, E, ROWS, 2), "weight_shape": (ROWS, COLS),
                                                "weight_zero_point": t(i32, E, ROWS // 8, 2), "group": 32, "bits": 4,
                                                "stacked": 2}),
        "gptq": (gptq.dequantise_gptq, {"qweight": t(i32, E, COLS // 8, ROWS), "scales": t(f16, E, 2, ROWS),
                                        "qzeros": t(i32, E, 2, ROWS // 8), "group": 32, "bits": 4,
                                        "g_idx": t(i32, E, COLS), "checkpoint_format": "gptq"}),
        "awq": (gptq.dequantise_awq, {"qweight": t(i32, E, COLS, ROWS // 8), "scales": t(f16, E, 2, ROWS),
                                      "qzeros": t(i32, E, 2, ROWS // 8), "group": 32}),
    }  # fmt: skip


STORED = _stored()
TORCH_DTYPES = (
    "float32",
    "float16",
    "bfloat16",
    "int32",
    "int64",
    "uint8",
    "int8",
    "bool",
    "float8_e4m3fn",
    "complex64",
)


def _stored_edit(rng: random.Random, base: str) -> list[Any]:
    arguments = STORED[base][1]
    name = rng.choice(list(arguments))
    if isinstance(arguments[name], torch.Tensor):
        shape = list(arguments[name].shape)
        for _ in range(rng.choice((0, 1, 1, 2))):
            shape = rng.choice((shape[1:], [*shape, 1], [0, *shape[1:]], [*shape[:-1], rng.choice((0, 1, 7, 2, 128))]))
        return ["tensor", name, rng.choice(TORCH_DTYPES) if rng.random() < 0.3 else None, shape]
    values = (0, -1, 1, 2, 3, 4, 5, 8, 16, 32, 64, 10**30, 2.5, "x", [0, 0], [1, 32], [-1, 0], [64, 64], [1], [0, 1, 2])
    return ["argument", name, rng.choice(values)]


# Whole inputs and their calls -------------------------------------------------------------------------------------


def generated(kind: Kind, rng: random.Random) -> Hostile:
    count = rng.choice((1, 1, 2, 3))
    if kind == "config":
        base = rng.choice(list(configs()))
        return Hostile(kind, base, [_config_edit(rng, configs()[base]) for _ in range(count)])
    if kind == "checkpoint":
        base = rng.choice(checkpoints())
        edits = [_checkpoint_edit(rng, base) for _ in range(count)]
        return Hostile(kind, base, edits if rng.random() < 0.8 else [*edits, _save_edit(rng, base)])
    if kind == "record":
        base = rng.choice(records.BASES)
        return Hostile(kind, base, [records.edit(rng, base) for _ in range(count)])
    base = rng.choice(list(STORED))
    return Hostile(kind, base, [_stored_edit(rng, base) for _ in range(count)])


SAVES = ("give", "shards")


@contextmanager
def tries(hostile: Hostile) -> Iterator[list[tuple[str, Callable[[], Any]]]]:
    """The calls that a user makes with the input."""
    with tempfile.TemporaryDirectory() as name:
        if hostile.kind == "config":
            config: Any = copy.deepcopy(configs()[hostile.base])
            for edit in hostile.edits:
                config = edited(config, edit)
            yield [*_config_tries(config), *_save_tries(config, Path(name) / "saved")]
        elif hostile.kind == "checkpoint":
            folder = Path(name) / "checkpoint"
            folder.mkdir()
            files = [edit for edit in hostile.edits if edit[0] not in SAVES]
            saves = [edit for edit in hostile.edits if edit[0] in SAVES]
            config = write(folder, hostile.base, files)
            names = _names(folder)
            calls: list[tuple[str, Callable[[], Any]]] = [
                ("load", lambda: Reference().load(folder)),
                ("remap", lambda: Reference().remap(config, names)),
                ("headers", lambda: text(judged_folder(folder))),
                ("values", lambda: text(judged_folder(folder, values=True))),
            ]
            if saves:
                tensors, shards = given(hostile.base, saves)
                calls.append(("save", lambda: save(Path(name) / "saved", config, tensors, shards)))
            yield calls
        elif hostile.kind == "record":
            folder = Path(name)
            records.write(folder, hostile.base)
            for change in hostile.edits:
                if not records.spoil(folder, change):
                    _spoil(folder, change)
            tokens = folder / records.TOKENS if hostile.base.endswith(".npy") else None
            yield [("read_record", lambda: read_record(folder / hostile.base, tokens))]
        else:
            call, arguments = STORED[hostile.base]
            arguments = dict(arguments)
            for what, argument, *values in hostile.edits:
                if what == "tensor":
                    old = arguments[argument]
                    if isinstance(old, torch.Tensor):
                        dtype = getattr(torch, values[0]) if values[0] else old.dtype
                        arguments[argument] = torch.ones(values[1]).to(dtype)
                else:
                    value = values[0]
                    arguments[argument] = tuple(value) if isinstance(value, list) else value
            yield [("dequantise", lambda: call(**arguments))]


def _config_tries(config: Any) -> list[tuple[str, Callable[[], Any]]]:
    def every_layer() -> None:
        spec = describe(config)
        indices = (spec.moe_layers or spec.encoder_moe_layers)[:2]
        for index in indices:
            layer_of(config, index).tensors()
        for layer in dict.fromkeys(spec.layers):
            layer.tensors()

    names = [f"model.layers.{layer}.{rest}" for layer in (0, 1, 2) for rest in NAMES]
    return [
        ("describe", lambda: Reference().describe(config)),
        ("capture_shape", lambda: Reference().capture_shape(config, "worker")),
        ("layers", every_layer),
        ("remap", lambda: Reference().remap(config, [CheckpointName(name) for name in names])),
    ]


NAMES = ("experts.gate_up_proj", "experts.down_proj", "experts.1.up_proj.weight", "router.scale", "mlp.up_proj.weight")


def _save_tries(config: Any, folder: Path) -> list[tuple[str, Callable[[], Any]]]:
    """Without tensors: every one is missing, or the config is refused."""
    return [("save", lambda: save(folder, config, {}))]


def _names(folder: Path) -> list[CheckpointName]:
    """Of the shards that can be read."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        if file.is_file() and file.stat().st_size < 2**26:
            try:
                found += [CheckpointName(name, tuple(shape)) for name, (_, shape) in _header(file).items()]
            except (ValueError, TypeError, KeyError, AttributeError, MemoryError, OSError, OverflowError):
                continue
    return found


def kept(file: Path) -> Hostile:
    content = json.loads(file.read_text(encoding="utf-8"))
    return Hostile(content["kind"], content["base"], content["edits"])
