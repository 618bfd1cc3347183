"""From a config to the real transformers model of its language part, on the meta device."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from moe_conformance.errors import Absent, ConfigError, Unsupported


def as_config(config: Any) -> Any:
    """A transformers config object; a plain dict goes through AutoConfig by its model_type.

    Raises Absent for a model type that the installed transformers does not have.
    """
    if isinstance(config, Mapping):
        if "model_type" not in config:
            raise ConfigError(
                f"config: a dict needs the key 'model_type' to name its family; got keys {', '.join(sorted(config))}"
            )
        if config["model_type"] not in CONFIG_MAPPING:  # for instance of a family newer than this release
            raise Absent(f"transformers {transformers.__version__} has no model type {config['model_type']!r}")
        return AutoConfig.for_model(**copy.deepcopy(dict(config)))
    if not hasattr(config, "get_text_config"):
        raise ConfigError(f"config: got {type(config).__name__}, want a transformers config or its dict")
    return copy.deepcopy(config)  # building a model writes to its config


def language_part(config: Any) -> Any:
    """The part of a composite config that generates text; a flat config is its own."""
    part = getattr(config, "thinker_config", config)  # omni models: the talker only voices what the thinker wrote
    text = part.get_text_config(decoder=True)
    # An encoder-decoder returns a copy of itself without the encoder.
    return part if type(text) is type(part) else text


def model_class(config_class: Any) -> Any:
    """The bare model (no head) that transformers builds from this config class.

    Parts of composite models are in no mapping: then it is the class of their modeling module that declares the config.
    """
    if config_class in MODEL_MAPPING:
        return MODEL_MAPPING[config_class]
    module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    for candidate in vars(module).values():
        if not (inspect.isclass(candidate) and issubclass(candidate, PreTrainedModel) and "forward" in vars(candidate)):
            continue
        if config_class in (vars(candidate).get("config_class"), _annotated_config(candidate)):
            return candidate
    raise Unsupported(f"describe: {module.__name__} has no model for {config_class.__name__}")


def _annotated_config(candidate: type) -> Any:
    annotation = inspect.get_annotations(candidate).get("config")
    return getattr(inspect.getmodule(candidate), annotation, None) if isinstance(annotation, str) else annotation


def build(config: Any) -> Any:
    """The bare model in eval mode: real classes, real shapes, no memory."""
    with torch.device("meta"), no_init_weights():
        return model_class(type(config))(config).eval()
