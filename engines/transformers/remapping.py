"""The parameter that transformers loads each checkpoint tensor into, by its own conversion rules."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from moe_conformance.engine import CheckpointName
from moe_conformance.engines.transformers.loading import class_of
from moe_conformance.errors import CheckpointError, Unsupported


def remap(config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str, ...]]:
    """For each name, the one parameter that the tensor is loaded into, whole or as a part.

    Raises CheckpointError for a name that leads to no parameter, and Unsupported if a conversion produces several
    parameters at once: it does not say which tensor goes into which.
    """
    with tempfile.TemporaryDirectory() as folder:  # read like a config.json, which has its own spelling of infinity
        (Path(folder) / "config.json").write_text(json.dumps(dict(config)))
        cls = class_of(config.get("architectures") or (), lambda: AutoConfig.from_pretrained(folder))
        read = getattr(cls, "config_class", None) or AutoConfig
        with torch.device("meta"):
            model = cls(read.from_pretrained(folder))
    parameters: dict[str, Any] = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    several = {source for entry in converters if len(entry.target_patterns) > 1 for source in entry.source_patterns}
    found = {}
    # In the loader's order, because some renamings depend on it.
    for name in sorted((entry.name for entry in names), key=dot_natural_key):
        target, source = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if source in several:
            raise Unsupported(f"remap: transformers makes several parameters of {name} and others at once")
        if target not in parameters and name in parameters:
            target, _ = rename_source_key(name, [], [], model.base_model_prefix, parameters)
        if target not in parameters:
            raise CheckpointError(f"{name}: got {target}, which is no parameter of {cls.__name__}, want one that is")
        found[name] = (target,)
    return found
