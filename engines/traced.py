"""Which parameters of a server's own model its loader fills from which names of a checkpoint; no value is read.

The model is on the meta device, and so are the tensors that its loader is given: what it copies is followed, not done.
`python -m moe_conformance.engines.traced ENGINE FOLDER FILE` writes what it found to the file, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_conformance.errors import MoEConformanceError

# torch's, by safetensors' words; it has none for packed ones, which no server's loader takes.
DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16,
    "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32, "U64": torch.uint64,
    "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
# How many names a loader may raise at before it is given up.
MOST_RAISED = 8


class Server(NamedTuple):
    """An engine's model of a folder. inside: what its loader runs in. words: of an error, in a line.

    absent: modules, by the last part of their names, that were left out, as those for images.
    """

    model: nn.Module
    inside: Callable[[], AbstractContextManager[Any]]
    words: Callable[[Exception], str]
    absent: frozenset[str] = frozenset()
    release: str = ""


@dataclass
class Traced:
    """unmapped: names that went nowhere. unfilled, partial: parameters that nothing, or less than all, was written to.

    raised: names, and the loader's words. why: it was not followed to its end. release: of the engine.
    """

    unmapped: list[str] = field(default_factory=list)
    unfilled: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    raised: list[tuple[str, str]] = field(default_factory=list)
    why: str = ""
    release: str = ""


class _Trace(TorchDispatchMode):
    """Follows tensors by their storages. sources: names that came into each. written: how many elements, to each."""

    def __init__(self, targets: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.targets, self.written = targets, Counter[int]()
        self.sources: dict[int, frozenset[str]] = {}
        self.used: set[str] = set()
        self.kept: list[Any] = []  # a storage that is freed gives its number to another
        self.read: frozenset[str] = frozenset()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        names = frozenset().union(*(self.sources.get(_storage(value), ()) for value in given))
        if func is torch.ops.aten._local_scalar_dense.default and given[0].is_meta:
            self.read = names
            return 1.0 if given[0].is_floating_point() else 1
        if func is torch.ops.aten.equal.default and any(value.is_meta for value in given):
            return True
        if "device" in kwargs and any(value.is_meta for value in given):
            kwargs["device"] = torch.device("meta")
        is_written = func._schema.is_mutable and bool(given) and _storage(given[0]) in self.targets
        if is_written and not given[0].is_meta and any(value.is_meta for value in given):
            out = given[0]  # one that the model's class keeps elsewhere: no value is there to be copied
        else:
            out = func(*args, **kwargs)
        if is_written:
            self.written[_storage(given[0])] += given[0].numel()
            self.used |= names | self.read
            self.read = frozenset()
            return out
        for value in torch.utils._pytree.tree_leaves(out):
            if isinstance(value, Tensor) and names:
                self.sources[_storage(value)] = names | self.sources.get(_storage(value), frozenset())
                self.kept.append(value.untyped_storage())
        return out

    def named(self, name: str, tensor: Tensor) -> Tensor:
        self.sources[_storage(tensor)] = frozenset((name,))
        self.kept.append(tensor.untyped_storage())
        return tensor


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Stream:
    """The tensors of a checkpoint without values. at: the name that was given last; "" at the end."""

    def __init__(self, stored: Mapping[str, Any], left_out: Container[str], trace: _Trace) -> None:
        self.stored, self.left_out, self.trace = stored, left_out, trace
        self.at = ""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, entry in self.stored.items():
            if name not in self.left_out:
                self.at = name
                tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
                yield name, self.trace.named(name, tensor)
        self.at = ""


def traced(server: Server, stored: Mapping[str, Any]) -> Traced:
    """stored: by name, with dtype and shape. A name at which the loader raises is taken out, and the rest loaded."""
    found, model = Traced(release=server.release), server.model
    parameters = dict(model.named_parameters())
    targets = {_storage(tensor) for tensor in (*parameters.values(), *model.buffers())}
    left_out = {name for name, entry in stored.items() if entry.dtype not in DTYPES}
    while True:
        trace = _Trace(targets)
        stream = _Stream(stored, left_out, trace)
        try:
            with server.inside(), torch.no_grad(), trace:
                model.load_weights(iter(stream))  # type: ignore[operator]
            break
        except Exception as error:
            words = f"{type(error).__name__}: {server.words(error)}"
            if not stream.at or len(found.raised) == MOST_RAISED:
                found.why = words
                return found
            found.raised.append((stream.at, words))
            left_out.add(stream.at)
    unused = (name for name in stored if name not in trace.used and name not in left_out)
    found.unmapped = [name for name in unused if server.absent.isdisjoint(name.split("."))]
    for name, tensor in parameters.items():
        written = trace.written[_storage(tensor)]
        if written < max(tensor.numel(), 1):
            (found.partial if written else found.unfilled).append(name)
    return found


def main(engine: str, folder: str, file: str) -> None:
    from moe_conformance.checkpoints.findings import Findings
    from moe_conformance.checkpoints.folder import read_folder

    held = read_folder(Path(folder), Findings())
    try:
        server = import_module(f"moe_conformance.engines.{engine}.tracing").built(Path(folder), held.config)
        found = traced(server, held.tensors)
    except MoEConformanceError as error:
        found = Traced(why=str(error))
    Path(file).write_text(json.dumps(asdict(found)))


if __name__ == "__main__":
    main(*sys.argv[1:])
