"""Configs as engines get them, and errors that are meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from moe_conformance.catalogue.case import Case
from moe_conformance.errors import Broken, Nonconformance, Unsupported
from moe_conformance.judging.compare import refused


def config_of(case: Case) -> Any:
    """The config object of the recipe, or its plain dict."""
    keys = json.loads(json.dumps(case["keys"]))  # a copy that the engine may change
    name = case.recipe.get("class")
    if name is None:
        return keys
    try:
        import transformers

        config_class = getattr(transformers, name, None)
        if config_class is not None:
            return config_class(**keys)
    except Exception as error:
        raise Broken(f"transformers does not give a {name}: got {type(error).__name__}: {error}") from error
    raise Unsupported(f"transformers {transformers.__version__} has no {name}")


def refused_on_purpose(what: str, call: Callable[[], Any], case: Case) -> None:
    """An error on purpose with the names of the recipe; one that fell out of an attribute or key lookup says nothing.

    Keys are named as they are spelled, a dense model by its model type or its class (qwen3_moe, Qwen3MoeConfig).
    """
    by_name = case.clause == "config.refuse-dense" and case["names"]
    error = refused(what, call, () if by_name else case["names"])
    if isinstance(error, AttributeError | LookupError | TypeError):
        raise Nonconformance(f"{what}: stumbled over {type(error).__name__}, want an error that is meant: {error}")
    if by_name and _letters(case["names"][0]) not in _letters(str(error)):
        raise Nonconformance(f"{what}: {type(error).__name__} does not name {case['names'][0]}: {error}")


def _letters(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()
