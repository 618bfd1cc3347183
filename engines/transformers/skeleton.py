"""The model of a folder without memory for its parameters, and where transformers puts the names of a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.initialization import no_init_weights
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from moe_conformance.engines.transformers import OLDEST
from moe_conformance.engines.transformers.loading import class_of
from moe_conformance.errors import CheckpointError, Unsupported


def built(folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Raises Unsupported where the installed transformers cannot say, and CheckpointError where it builds no model."""
    if Version(transformers.__version__) < OLDEST:
        raise Unsupported(f"got transformers {transformers.__version__}, want {OLDEST} or newer; upgrade it")
    if config.get("model_type") not in CONFIG_MAPPING:
        name, held = config.get("model_type"), transformers.__version__
        raise Unsupported(f"transformers {held} has no model type {name!r}; code in the folder is never run")
    disable_progress_bar()  # type: ignore[no-untyped-call]
    set_verbosity_error()  # type: ignore[no-untyped-call]  # which kernels it lacks is of no concern here
    try:
        made = AutoConfig.from_pretrained(folder, local_files_only=True)
        cls = class_of(_names(config), lambda: made)
        with _without_memory(), no_init_weights():
            model = cls._from_config(made, dtype=dtype, experts_implementation="eager")
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder}: transformers builds no model of config.json ({type(error).__name__}: {words}); see what "
            "`moe-conformance checkpoint` says of it"
        ) from error
    return model.eval()


def _names(config: Mapping[str, Any]) -> list[str]:
    found = config.get("architectures")
    return [name for name in found if isinstance(name, str) and name.isidentifier()] if isinstance(found, list) else []


@contextlib.contextmanager
def _without_memory() -> Iterator[None]:
    """Parameters made inside are on the meta device; buffers, which no checkpoint has, are as the model makes them."""
    real = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        real(module, name, parameter)

    with patch.object(nn.Module, "register_parameter", register):
        yield


def rules(model: Any) -> list[Any]:
    """How the model's class renames and converts what it loads; anew for each load, for a rule remembers its use."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)


def sources(model: Any, names: Iterable[str]) -> dict[str, list[str]]:
    """The names of a checkpoint by the tensor of the model that each is put into, or by what it is called otherwise."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping, state, prefix = rules(model), model.state_dict(), model.base_model_prefix
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    several = {source: rule.target_patterns for rule in converters for source in rule.source_patterns}
    found: dict[str, list[str]] = {}
    for name in names:
        target, source = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, source = name, None
        first, *others = several.get(source, ("",)) if source else ("",)
        for filled in (target, *(target.replace(first, other) for other in others)):
            found.setdefault(filled, []).append(name)
    return found
