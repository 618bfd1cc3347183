"""What vLLM's model registry has of the families with a record, and what those alone do that it has no model of."""

from __future__ import annotations

import importlib.util
import traceback
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moe_conformance.engine import RECORDS, RoutingSpec, inverse
from moe_conformance.engines import published, servers
from moe_conformance.engines.vllm import runtime

# Of a layer that is asked for by its routing alone.
_WIDTH = 32


def model_types() -> frozenset[str]:
    """Families that vLLM has a model of its own for."""
    return frozenset(name for name in RECORDS if own(RECORDS[name]))


def architecture(record: Any, flat: bool = True) -> str | None:
    """The class of a family's checkpoints that vLLM takes; None without. flat: of its text model alone."""
    names = published.architectures(record, flat)
    return own(record, flat) or next(filter(_has_backend, names), None)


def own(record: Any, flat: bool = True) -> str | None:
    """The class that vLLM has a model of its own for."""
    known = runtime._known_architectures()
    return next((name for name in published.architectures(record, flat) if name in known), None)


def lacking(record: Any, flat: bool = True) -> str:
    return f"vLLM has no {' or '.join(published.architectures(record, flat))}"


def reads(record: Any, key: str) -> bool:
    """Whether the file or package of vLLM's own model of a family names this key of a config."""
    from vllm.model_executor.models import ModelRegistry

    name = own(record)
    module = getattr(ModelRegistry.models[name], "module_name", None) if name else None
    found = importlib.util.find_spec(module) if module else None
    if found is None or found.origin is None:
        return True
    file = Path(found.origin)
    files = file.parent.rglob("*.py") if file.name == "__init__.py" else [file]
    return any(key in each.read_text(encoding="utf-8") for each in files)


@cache
def _has_backend(name: str) -> bool:
    """Whether vLLM's own resolution hands this class, for which it has no model, to its backend."""
    from vllm.model_executor.models import ModelRegistry

    asked = SimpleNamespace(hf_config=None, model_impl="auto", _get_transformers_backend_cls=lambda: name)
    resolve = getattr(ModelRegistry, "_try_resolve_transformers", None)
    return resolve is not None and resolve(name, asked) is not None


def is_backend(model: type) -> bool:
    """Whether this class is the backend's for models with experts."""
    return model.__module__.startswith("vllm.model_executor.models.transformers") and "MoE" in model.__name__


def refuses(error: Exception) -> bool:
    """Whether the backend itself said this of a model, rather than what the backend builds it from."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    of_vllm = [file for file in files if {"vllm", "model_executor"} <= {*file.parts}]
    return isinstance(error, ValueError) and bool(of_vllm) and of_vllm[-1].parent.name == "transformers"


def only_elsewhere(offered: frozenset[str]) -> dict[str, str]:
    """The other features of routing that no family takes which vLLM has a model of its own for.

    Its backend for transformers' models leaves such routing to transformers.
    """
    return servers.only_elsewhere("vLLM", offered, lambda record: own(record) is not None)


def routes(spec: RoutingSpec, experts: int) -> bool:
    """Whether a family that vLLM has a model of its own for routes so, by its record."""
    for name in RECORDS:
        for setting in inverse.settings(name) if own(RECORDS[name]) else ():
            layer = inverse.small(setting.spec, spec, experts, _WIDTH)
            if inverse.expressed(setting, layer, ("routing", "num_experts"), narrow=False) is not None:
                return True
    return False
