"""from_pretrained on a checkpoint folder, and the tensors that the modules then hold."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from moe_conformance.engines.transformers.block import model_types
from moe_conformance.engines.transformers.describe import decoders, is_moe, layer_lists
from moe_conformance.engines.transformers.filling import canonical, is_made
from moe_conformance.engines.transformers.stored import formats, loaded_as_numbers
from moe_conformance.errors import CheckpointError


def styles() -> frozenset[str]:
    """Each family's own checkpoints, Gemma 4's naming styles that its classes have, and stored formats."""
    gemma4 = {"packed", "multimodal"} if "gemma4_text" in model_types() else set()
    return frozenset(model_types() | gemma4 | formats())


def load(folder: Path) -> Mapping[str, Tensor]:
    """The model's MoE layers by canonical name, as loaded, in the checkpoint's dtype.

    Raises CheckpointError where transformers reports a parameter of them left unwritten, a key unused or a shape that
    differs (it initialises or ignores those, and only warns); whatever else from_pretrained raises comes out as it is.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]  # it would write to the standard error of the suite's user
    answer: Any = class_of_folder(folder).from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True, **loaded_as_numbers(folder)
    )
    model, report = answer
    found: dict[str, Tensor] = {}
    roots: list[str] = []
    for block in blocks(model):
        every = {**dict(block.root.named_parameters()), **dict(block.root.named_buffers())}
        named = {name: tensor.detach() for name, tensor in every.items() if is_made(block.moe, name)}
        own = canonical(block.moe, named)
        found |= {block.prefix + name: tensor for name, tensor in own.items()}
        roots += [f"{block.path}.{name}" for name in named]
    # Tensors outside the MoE layers need not be in the folder.
    report["missing_keys"] = set(report["missing_keys"]) & set(roots)
    report["unexpected_keys"] = {key for key in report["unexpected_keys"] if not _is_draft(key, model.config)}
    faults = [f"{kind}: {', '.join(sorted(map(str, keys)))}" for kind, keys in report.items() if keys]
    if faults:
        raise CheckpointError(f"{folder.name}: transformers loaded it in part; {'; '.join(faults)}")
    return found


def _is_draft(name: str, config: Any) -> bool:
    """Whether it is of a layer for multi-token prediction that the config counts; transformers has no such layers."""
    text = config.get_text_config()
    own, drafts = text.num_hidden_layers, getattr(text, "num_nextn_predict_layers", None) or 0
    found = re.match(r"(?:\w+\.)*?layers\.([0-9]{1,6})\.", name)
    return found is not None and own <= int(found[1]) < own + drafts


def class_of_folder(folder: Path) -> Any:
    """The class that config.json names, or the one that generates text."""
    names = json.loads((folder / "config.json").read_text()).get("architectures") or ()
    return class_of(names, lambda: AutoConfig.from_pretrained(folder))


def class_of(names: Sequence[str], config: Callable[[], Any]) -> Any:
    """The first of these classes that transformers has, by itself or in the module of the config's model."""
    for name in names:
        if found := getattr(transformers, name, None):
            return found
        module = type(config()).__module__.replace("configuration_", "modeling_")
        if found := getattr(importlib.import_module(module), name, None):
            return found
    return AutoModelForCausalLM


class LoadedBlock(NamedTuple):
    """prefix: of its canonical names. path: of `root`, which has all its parameters, in the model."""

    prefix: str
    path: str
    root: nn.Module
    moe: nn.Module


def blocks(model: nn.Module) -> Iterator[LoadedBlock]:
    """Every MoE block of a whole model, including encoder and decoder, and second sets of experts for images."""
    stacks = dict(layer_lists(model))
    two = {name for name in stacks if re.search(r"(^|\.)encoder\.", name)} if _has_decoder(stacks) else set()
    seen: set[int] = set()
    for stack in sorted(stacks, key=lambda name: name in two):
        for index, layer in enumerate(stacks[stack]):
            for path, moe in layer.named_modules():
                if "attention" in path or not is_moe(moe):
                    continue
                held = set(map(id, moe.parameters()))
                if held & seen:  # an encoder that shares the decoder's parameters
                    continue
                seen |= held
                prefix = f"{'encoder.' * (stack in two)}layers.{index}."
                where, root = _root(f"{stack}.{index}", layer, path, moe)
                if not path.endswith("vision_moe"):
                    yield LoadedBlock(prefix, where, root, moe)
                else:
                    yield LoadedBlock(f"{prefix}vision.", f"{stack}.{index}.{path}", moe, moe)


def _has_decoder(stacks: Mapping[str, Any]) -> bool:
    return decoders([name.removeprefix("model.") for name in stacks]) != [
        name.removeprefix("model.") for name in stacks
    ]


def _root(where: str, layer: nn.Module, path: str, moe: nn.Module) -> tuple[str, nn.Module]:
    """The module that has the whole block: the layer itself if parts of it are outside the experts' module."""
    if moe is layer or isinstance(getattr(layer, "shared_mlp", None), nn.Module):
        return where, layer
    if path.endswith(".text_moe"):
        path = path.rpartition(".")[0]
    return f"{where}.{path}", layer.get_submodule(path)
