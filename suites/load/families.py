"""Writes the MoE layers of a tiny model of any family, as its published checkpoints have them, and no other tensor.

The folder has a config.json, that of the class that publishes them, and two shards. Every tensor is float32 with hashed
values: engines keep some routers in float32 whatever the model's dtype is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from moe_conformance.errors import Broken, Unsupported
from moe_conformance.judging.inputs import bits, normal
from moe_conformance.model.families.families import BY_SLUG
from moe_conformance.model.families.record import Record
from moe_conformance.model.families.tiny import tiny_config
from moe_conformance.oracle.naming import Form, Layer, entries, layers
from moe_conformance.oracle.stored import tensor_of
from moe_conformance.suites.load.checkpoint import save


def config_of(record: Record) -> dict[str, Any]:
    """The content of config.json."""
    try:
        import transformers

        if not hasattr(transformers, record.published_config_class):
            raise Unsupported(f"transformers {transformers.__version__} has no {record.published_config_class}")
        config = tiny_config(record)
        found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    except Unsupported:
        raise
    except Exception as error:
        raise Broken(f"{record.published_config_class}: got {type(error).__name__}: {error}") from error
    return {**found, "architectures": [record.tiny.model_class], "dtype": "float32"}


def canonical(record: Record, config: dict[str, Any], seed: str) -> dict[str, Tensor]:
    """What a load must give."""
    return {
        layer.prefix + name: _values(layer, name, shape, f"{seed} {layer.prefix}{name}")
        for layer in layers(record, config)
        for name, shape in layer.tensors.items()
    }


def _values(layer: Layer, name: str, shape: tuple[int, ...], seed: str) -> Tensor:
    if name == "router.table":  # K different experts for each token id
        return bits((shape[0], layer.spec.num_experts), seed).argsort(-1)[:, : shape[1]]
    found = normal(shape, seed, std=0.125)
    if name == "router.selection_bias" and layer.spec.routing.skip_expert:
        found[-1] = -1.0  # of the class that skips, as published
    return found


def write(
    folder: Path,
    slug: str,
    form: Form,
    seed: str = "checkpoint",
    missing: str = "",
    beside: str = "",
    unsaid: str = "",
) -> dict[str, Tensor]:
    """Write the folder, and return what a load of it must give.

    missing: what of every layer is left out. beside: a key of BESIDE. unsaid: a key that config.json lacks.
    """
    record = BY_SLUG[slug]
    config = config_of(record)
    want = canonical(record, config, seed)
    named = {
        entry.name: tensor_of(entry, want)
        for entry in entries(record, config, form)
        if not (missing and any(part.tensor.endswith(f".{missing}") for part in entry.parts))
    }
    if form == "published" and record.names is not None and record.names.once_transposed:
        config["transformers_version"] = "4.57.0"
        packed = [entry.name for entry in entries(record, config, form) if ".experts." in entry.parts[0].tensor]
        named |= {name: named[name].mT.contiguous() for name in packed}
    if beside:
        BESIDE[beside](folder, config, named)
    said = {key: value for key, value in config.items() if key != unsaid}
    (folder / "config.json").write_text(json.dumps(said, indent=2))
    save(folder, named, shards=2)
    return want


def _draft(config: dict[str, Any], named: dict[str, Tensor], before: str) -> None:
    """A layer for multi-token prediction like the last one, with other values."""
    last = f"model.layers.{config['num_hidden_layers'] - 1}."
    inside = {name.removeprefix(last): tensor for name, tensor in named.items() if name.startswith(last)}
    named |= {f"{before}{name}": -tensor for name, tensor in inside.items()}
    hidden = config["hidden_size"]
    named[f"{before}eh_proj.weight"] = normal((hidden, 2 * hidden), before, std=0.125)


def _draft_behind(folder: Path, config: dict[str, Any], named: dict[str, Tensor]) -> None:
    config["num_nextn_predict_layers"] = 1
    _draft(config, named, f"model.layers.{config['num_hidden_layers']}.")


def _draft_apart(folder: Path, config: dict[str, Any], named: dict[str, Tensor]) -> None:
    _draft(config, named, "mtp.layers.0.")


def _consolidated(folder: Path, config: dict[str, Any], named: dict[str, Tensor]) -> None:
    """Mistral's own file of the same model, which the index does not name; here with other values."""
    own = {
        name.removeprefix("model.").replace(".block_sparse_moe.", ".feed_forward."): -tensor
        for name, tensor in named.items()
    }
    save_file(own, folder / "consolidated.safetensors")


# What releases have beside the model's own tensors.
BESIDE: Mapping[str, Callable[[Path, dict[str, Any], dict[str, Tensor]], None]] = {
    "draft": _draft_behind,
    "draft-apart": _draft_apart,
    "consolidated": _consolidated,
}
