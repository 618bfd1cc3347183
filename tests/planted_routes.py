"""Records of routed experts, true ones and such as faulty capturers leave: plain NumPy, apart from the command."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

Array = Any


@dataclass(frozen=True)
class Record:
    """tokens: of each request, [S]. ids: [S - 1, layers, k]. experts, moe_layers: of the model. ranks: of requests."""

    tokens: tuple[Array, ...]
    ids: tuple[Array, ...]
    experts: int
    moe_layers: tuple[int, ...]
    ranks: tuple[int, ...] = ()

    def save(self, path: Path) -> Path:
        from safetensors.numpy import save_file

        parts = {f"tokens.{n}": np.asarray(tokens) for n, tokens in enumerate(self.tokens)}
        parts |= {f"routed_experts.{n}": np.ascontiguousarray(ids) for n, ids in enumerate(self.ids)}
        parts |= {f"rank.{n}": np.array([rank]) for n, rank in enumerate(self.ranks)}
        save_file(parts, path)
        return path


def each(change: Callable[[Array, Record], Array]) -> Callable[[Record], Record]:
    return lambda record: replace(record, ids=tuple(change(ids.copy(), record) for ids in record.ids))


def shifted(by: int) -> Callable[[Record], Record]:
    return each(lambda ids, _: np.roll(ids, by, axis=0))


def _rows_of_the_first(record: Record, ranks: tuple[int, ...] = ()) -> Record:
    """The fourth request has the first one's rows from its fifth on."""
    ids = [part.copy() for part in record.ids]
    ids[3][5:] = ids[0][5 : len(ids[3])]
    return replace(record, ids=tuple(ids), ranks=ranks)


def _filled(value: int) -> Callable[[Record], Record]:
    """The last eight rows of the first request."""

    def change(record: Record) -> Record:
        ids = [part.copy() for part in record.ids]
        ids[0][-8:] = value
        return replace(record, ids=tuple(ids))

    return change


def _last_layers(ids: Array, record: Record) -> Array:
    """A capturer that is bound to the last layer's router writes it under every layer."""
    ids[:, list(record.moe_layers)] = ids[:, record.moe_layers[-1]][:, None]
    return ids


def _one_layers(ids: Array, record: Record) -> Array:
    ids[:, record.moe_layers[0]] = ids[:, record.moe_layers[1]]
    return ids


def _physical(ids: Array, record: Record) -> Array:
    """Each expert has another place, in each layer."""
    for layer in record.moe_layers:
        ids[:, layer] = np.random.default_rng(layer).permutation(record.experts)[ids[:, layer]]
    return ids


def _replicas(ids: Array, record: Record) -> Array:
    """Of experts 0 to 3 there is a second copy behind all others, which takes every other token."""
    rows = np.arange(len(ids))[:, None, None] % 2
    return np.where((ids < 4) & (rows == 1), ids + record.experts, np.roll(np.arange(record.experts), 5)[ids])


def _local(ids: Array, record: Record) -> Array:
    return ids % (record.experts // 2)


def _end_row(record: Record) -> Record:
    """seq_len rows, where the last is what the buffer held before: the first row of another request."""
    return replace(
        record,
        ids=tuple(np.concatenate([ids, record.ids[n - 1][3:4]]) for n, ids in enumerate(record.ids)),
    )


def _short(record: Record) -> Record:
    return replace(record, ids=tuple(ids[:-1] for ids in record.ids))


def _compact(ids: Array, record: Record) -> Array:
    """MoE layers are counted from column 0, where every layer has a column."""
    found = np.zeros_like(ids)
    found[:, : len(record.moe_layers)] = ids[:, list(record.moe_layers)]
    return found


def _reversed_prefix(ids: Array, _: Record) -> Array:
    ids[:16] = ids[:16][::-1]
    return ids


def _chunked(ids: Array, _: Record) -> Array:
    """The second chunk of a prefill is written from the first row on, and then again where it belongs."""
    if len(ids) >= 20:
        ids[:10] = ids[10:20]
    return ids


# What is planted -> the plant, and the kind that must be named.
PLANTS: dict[str, tuple[Callable[[Record], Record], str]] = {
    "shifted-by-one": (shifted(1), "shifted"),
    "shifted-by-three": (shifted(-3), "shifted"),
    "chunk-at-the-start": (each(_chunked), "shifted"),
    "another-layers": (each(_one_layers), "another-layer"),
    "every-layer-the-last": (each(_last_layers), "another-layer"),
    "another-ranks": (functools.partial(_rows_of_the_first, ranks=(0, 0, 1, 1)), "another-rank"),
    "stale": (_rows_of_the_first, "stale"),
    "padded-zeros": (_filled(0), "padded"),
    "padded-minus-one": (_filled(-1), "padded"),
    "padded-255": (_filled(255), "padded"),
    "physical-ids": (each(_physical), "physical"),
    "physical-ids-of-replicas": (each(_replicas), "physical"),
    "local-ids": (each(_local), "local-ids"),
    "row-behind-the-end": (_end_row, "end-row"),
    "row-short-at-the-end": (_short, "end-row"),
    "dense-layers-counted": (each(_compact), "dense-counted"),
    "reversed-prefix": (each(_reversed_prefix), "reversed"),
}


def recorded(folder: Path, requests: list[list[int]], dtype: str = "float32") -> Record:
    """What transformers' own routers choose, the model loaded whole; dense layers have zeros, as engines leave them."""
    import torch

    from moe_conformance.engines.transformers.block_routing import Tap
    from moe_conformance.engines.transformers.loading import blocks, class_of_folder
    from moe_conformance.model.families.describe import describe

    model = class_of_folder(folder).from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, experts_implementation="eager"
    )
    every = {int(block.prefix.split(".")[1]): block for block in blocks(model)}
    spec = describe(json.loads((folder / "config.json").read_text()))
    layers = spec.num_layers
    found = []
    for tokens in requests:
        with ExitStack() as stack, torch.no_grad():
            taps = {layer: stack.enter_context(Tap(block.moe, None)) for layer, block in every.items()}
            model(torch.tensor([tokens]), use_cache=False)
        seen = {layer: tap.seen.ids[:-1].numpy() for layer, tap in taps.items() if tap.seen is not None}
        first = next(iter(seen.values()))
        ids = np.zeros((len(tokens) - 1, layers, first.shape[1]), np.int32)
        for layer, rows in seen.items():
            ids[:, layer] = rows
        found.append(ids)
    return Record(tuple(map(np.array, requests)), tuple(found), spec.max_experts, tuple(every))
