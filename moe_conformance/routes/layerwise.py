"""A model's own forward with one decoder layer's weights in memory at a time.

The model is built without memory for its parameters. What stands around the layers is loaded when it is
first called, but for the language model's head, which is never. Of each layer the weights are read from the shards by
transformers' own rules of names, the layer runs for every request, and they are dropped.

All requests pass a layer while it is there: each has a thread of its own, which waits before each layer. One runs at a
time. So the model's own forward makes masks, positions and whatever layers hand to each other, of any family.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_conformance.checkpoints.headers import Stored
from moe_conformance.engines.transformers.block_routing import Tap
from moe_conformance.engines.transformers.describe import layer_lists
from moe_conformance.engines.transformers.filling import canonical, is_made
from moe_conformance.engines.transformers.loading import LoadedBlock, blocks
from moe_conformance.engines.transformers.skeleton import built, rules, sources
from moe_conformance.errors import CheckpointError, MoEConformanceError, Unsupported
from moe_conformance.oracle.precision import wide
from moe_conformance.quote import few
from moe_conformance.routes.weights import Files, parts

ROUTER = "router."


class Observed(NamedTuple):
    """What one MoE layer's router did with all requests, one after the other.

    x: [T, H], what it read. ids: [T, K], what it answered. tensors: its own, by canonical name, in float32 or wider.
    """

    layer: int
    x: Tensor
    ids: Tensor
    tensors: Mapping[str, Tensor]


class Model:
    """A folder's model, whose weights are rounded to `dtype`, computing in `compute`."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], stored: Mapping[str, Stored], dtype: torch.dtype, wider: bool
    ) -> None:
        self.dtype, self.compute = dtype, _wider(dtype) if wider else dtype
        self.shelf = _Shelf(folder, config, stored, built(folder, config, self.compute), dtype)
        self.model = self.shelf.model
        self.blocks: dict[int, LoadedBlock] = {}
        every = [block for block in blocks(self.model) if ".vision." not in block.prefix]
        if encoder := [block for block in every if block.prefix.startswith("encoder.")]:
            raise Unsupported(f"routes: {encoder[0].path} is of an encoder; no engine returns routes of those")
        for block in every:
            self.blocks.setdefault(int(block.prefix.split(".")[1]), block)
        first = next(iter(self.blocks.values()), None)
        stacks = [(name, stack) for name, stack in layer_lists(self.model) if first and first.path.startswith(name)]
        if not stacks or first is None:
            raise Unsupported(f"routes: {type(self.model).__name__} has no layers with routed experts")
        self.stack_name, self.stack = stacks[0]
        for block in self.blocks.values():
            if type(block.moe).__name__.startswith("Doge"):
                raise Unsupported(f"routes: {type(block.moe).__name__} shows no ids of experts")

    def run(self, requests: Sequence[Sequence[int]]) -> Iterator[Observed]:
        """Every MoE layer's routing of these requests' tokens, in the order in which the layers run."""
        walks = _Walks(self, requests)
        try:
            yield from walks.through()
        finally:
            walks.end()


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if wide(dtype) == dtype else wide(dtype)


class _Shelf:
    """Loads and drops parts of a model."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], stored: Mapping[str, Stored], model: Any, dtype: torch.dtype
    ) -> None:
        self.folder, self.model, self.dtype = folder, model, dtype
        self.empty = dict(model.named_parameters())
        self.plan = model._get_dtype_plan(dtype)
        self.parts = parts(folder, config, stored, model)
        self.sources = sources(model, self.parts)

    def load(self, prefix: str, deep: bool = True) -> None:
        """The tensors of the module of this name. deep: of those inside it, too."""
        from safetensors import safe_open
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        lead = f"{prefix}." if prefix else ""
        wanted = [
            name
            for target, names in self.sources.items()
            if target.startswith(lead) and (deep or "." not in target.removeprefix(lead))
            for name in names
        ]
        with contextlib.ExitStack() as stack:
            files = functools.cache(lambda file: stack.enter_context(safe_open(self.folder / file, "pt")))
            slices = {name: self._slice(files, name) for name in wanted}
            how = LoadStateDictConfig(
                device_map={"": "cpu"}, dtype=self.dtype, dtype_plan=self.plan, weight_mapping=rules(self.model)
            )
            try:
                report, _ = convert_and_load_state_dict_in_model(self.model, slices, how)
            except Exception as error:
                words = " ".join(str(error).split())[:300]
                raise CheckpointError(f"{self.folder}: {prefix}: transformers does not load it ({words})") from error
        module = self.model.get_submodule(prefix)
        lacking = [f"{lead}{name}" for name, tensor in module.named_parameters(recurse=deep) if tensor.is_meta]
        if lacking or report.mismatched_keys or report.conversion_errors:
            faults = lacking or sorted(map(str, report.mismatched_keys)) or sorted(report.conversion_errors)
            raise CheckpointError(
                f"{self.folder}: transformers finds no whole {few(faults)}; see what `moe-conformance checkpoint` says"
            )

    def _slice(self, files: Files, name: str) -> Any:
        return _Rounded(self.parts[name].open(files), None if self._is_kept(name) else self.dtype)

    def _is_kept(self, name: str) -> bool:
        return any(part in name for part in self.plan)

    def drop(self, prefix: str) -> None:
        for name, module in self.model.get_submodule(prefix).named_modules():
            where = ".".join(part for part in (prefix, name) if part)
            for own in module._parameters:
                if module._parameters[own] is not None:
                    module._parameters[own] = self.empty.get(f"{where}.{own}", module._parameters[own])


class _Rounded:
    """A tensor of a file, which is read when it is asked for, and rounded to the precision that it is served in."""

    def __init__(self, part: Any, dtype: torch.dtype | None) -> None:
        self.part, self.dtype = part, dtype

    def __getitem__(self, index: Any) -> Tensor:
        found: Tensor = self.part[index]
        return found.to(self.dtype) if self.dtype is not None and found.is_floating_point() else found

    def get_shape(self) -> Any:
        return self.part.get_shape()

    def get_dtype(self) -> Any:
        return self.part.get_dtype()


class _Ended(BaseException):
    """Leaves the forward of a request, of which nothing more is asked."""


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    raise _Ended


class _Walk(threading.Thread):
    """One request's forward. layer: before which it waits, or None when it has ended."""

    def __init__(self, model: Any, tokens: Sequence[int]) -> None:
        super().__init__(daemon=True)
        self.model, self.tokens = model, tokens
        self.layer: int | None = None
        self.may_go, self.has_come = threading.Semaphore(0), threading.Semaphore(0)
        self.is_over = False
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with torch.no_grad():
                self.model(input_ids=torch.tensor([self.tokens]), use_cache=False)
        except _Ended:
            pass
        except BaseException as error:
            self.error = error
        self.layer = None
        self.has_come.release()

    def wait_before(self, layer: int) -> None:
        self.layer = layer
        self.has_come.release()
        self.may_go.acquire()
        if self.is_over:
            raise _Ended

    def step(self) -> None:
        """Go on to the next layer."""
        self.may_go.release()
        self.arrive()

    def arrive(self) -> None:
        """Wait until it stands before a layer, or has ended."""
        self.has_come.acquire()
        if isinstance(self.error, Exception) and not isinstance(self.error, MoEConformanceError):
            words = " ".join(str(self.error).split())[:300]
            raise Unsupported(
                f"routes: {type(self.model).__name__} does not run on token ids alone ({type(self.error).__name__}: "
                f"{words}); such models are not judged"
            ) from self.error
        if self.error is not None:
            raise self.error


class _Walks:
    """Requests on their way through the layers, side by side."""

    def __init__(self, model: Model, requests: Sequence[Sequence[int]]) -> None:
        self.model, self.shelf = model, model.shelf
        self.walks = [_Walk(model.model, tokens) for tokens in requests]
        self.handles: list[Any] = []
        self.ready: set[str] = set()
        self.x: Tensor | None = None

    def through(self) -> Iterator[Observed]:
        self._hook()
        for walk in self.walks:
            walk.start()
            walk.arrive()
        while (layer := self.walks[0].layer) is not None:
            name, block = f"{self.model.stack_name}.{layer}", self.model.blocks.get(layer)
            self.shelf.load(name)
            if block is None:
                for walk in self.walks:
                    walk.step()
                found = None
            else:
                found = self._observed(layer, block)
            self.shelf.drop(name)
            if found is not None:
                yield found

    def _observed(self, layer: int, block: LoadedBlock) -> Observed:
        inputs, ids = [], []
        gated = block.moe.router if block.moe is self.model.stack[layer] else block.moe  # gemma4: beside a dense MLP
        handle = gated.register_forward_pre_hook(self._note, with_kwargs=True)  # type: ignore[union-attr]
        try:
            for walk in self.walks:
                with Tap(block.moe, None) as tap:
                    walk.step()
                if tap.seen is None or self.x is None:
                    raise Unsupported(f"routes: {type(block.moe).__name__} does not show what its router chose")
                inputs.append(self.x)
                ids.append(tap.seen.ids.reshape(len(walk.tokens), -1).long())
                self.x = None
        finally:
            handle.remove()
        every = {**dict(block.root.named_parameters()), **dict(block.root.named_buffers())}
        named = {name: tensor.detach() for name, tensor in every.items() if is_made(block.moe, name)}
        router = {name: tensor for name, tensor in _of_router(block, named).items() if name.startswith(ROUTER)}
        return Observed(layer, torch.cat(inputs), torch.cat(ids), router)

    def _note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.x = x.detach().flatten(0, -2)

    def _hook(self) -> None:
        for index, layer in enumerate(self.model.stack):
            self.handles.append(layer.register_forward_pre_hook(self._before(index)))
        self.handles.append(self.model.stack[max(self.model.blocks)].register_forward_hook(_leave))
        inside = f"{self.model.stack_name}."
        embeddings = self.model.model.get_input_embeddings()
        for name, module in self.model.model.named_modules():
            if module is embeddings:  # before they are called, a model may ask where they are (Llama 4)
                self._load(name)
            if not name.startswith(inside) and any(part is not None for part in module._parameters.values()):
                self.handles.append(module.register_forward_pre_hook(self._around(name)))

    def _before(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            walk = threading.current_thread()
            assert isinstance(walk, _Walk)
            walk.wait_before(index)

        return hook

    def _around(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if any(isinstance(value, Tensor) and value.is_meta for value in args):
                raise Unsupported(f"routes: {type(self.model.model).__name__} sends what {name} reads to its weights")
            self._load(name)

        return hook

    def _load(self, name: str) -> None:
        if name not in self.ready:
            self.shelf.load(name, deep=False)
            self.ready.add(name)

    def end(self) -> None:
        for handle in self.handles:
            handle.remove()
        for walk in self.walks:
            walk.is_over = True
            walk.may_go.release()
        for walk in self.walks:
            if walk.ident is not None:
                walk.join()


def _of_router(block: LoadedBlock, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return canonical(block.moe, {name: tensor for name, tensor in named.items() if "experts." not in name})
