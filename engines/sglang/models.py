"""SGLang's own model of a config, in small: its class, built by its own code on this machine.

The config goes through a config.json, as a published one does. Whatever the model is made of beside its MoE layers is
built as it comes, and nothing is put through it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_conformance.engine import RECORDS, Absent, Unsupported

# Keys and class names of published configs: what vLLM's adapter knows of them, and nothing of vLLM.
from moe_conformance.engines import published, servers
from moe_conformance.engines.servers import MoELayer
from moe_conformance.engines.sglang import runtime
from moe_conformance.engines.sglang.refusing import said

# By model type, the class of published checkpoints that SGLang has under another name than transformers.
CLASSES: Mapping[str, str] = {"gemma4_text": "Gemma4ForCausalLM"}
# SGLang's class around a model of transformers, by which it runs text models that it has no class for.
FALLBACK = "TransformersMoEForCausalLM"
# Families whose class in SGLang reads another config and other names than transformers has.
FORMATS: Mapping[str, str] = {
    "zaya": "Zyphra's own (model.layers.N.zaya_block.experts.local_experts.E.linear_fc1.weight)",
}
# Families that were published with their wrapper alone, whose loader SGLang's class of the text model has not.
WRAPPED = ("llama4_text",)


def _sparse(level: Mapping[str, Any]) -> list[int]:
    """The layers that have experts."""
    kinds = level.get("mlp_layer_types") or ["sparse"] * level["num_hidden_layers"]
    return [number for number, kind in enumerate(kinds) if kind != "dense"]


_YARN = {
    "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 10000.0,
}  # fmt: skip
_DEEPSEEK = {"rope_parameters": _YARN, "moe_layer_freq": 1}
# By model type, keys beside experts that published configs have and SGLang reads, with their value or how it follows.
KEYS: Mapping[str, Mapping[str, Any]] = {
    "bailing_hybrid": {
        "n_group": lambda level: level["num_expert_group"],
        "num_experts_per_tok": lambda level: level["num_experts_per_token"],
        "router_dtype": "fp32",
    },
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "deepseek_v4": {
        "num_key_value_heads": 1,
        # Of layers without compression, a CPU's rotary embedding asserts that they have a scaling.
        "compress_ratios": lambda level: [128] * level["num_hidden_layers"],
        "compress_rope_theta": 160000.0,
        "rope_parameters": _YARN,
    },
    "diffusion_gemma_text": {"allow_global_per_layer_attribute_access": True},
    "exaone_moe": {"is_moe_layer": lambda level: [kind == "sparse" for kind in level["mlp_layer_types"]]},
    "gemma4_text": {"allow_global_per_layer_attribute_access": True},
    "glm_moe_dsa": _DEEPSEEK,
    "granitemoehybrid": {"mamba_d_head": lambda level: 2 * level["hidden_size"] // level["mamba_n_heads"]},
    "hunyuan_v1_moe": {"moe_intermediate_size": lambda level: level["intermediate_size"], "num_shared_expert": 1},
    "hy_v4": _DEEPSEEK,
    "kimi_linear": {
        "linear_attn_config": lambda level: {
            "kda_layers": [], "full_attn_layers": list(range(1, level["num_hidden_layers"] + 1)), "head_dim": 8,
            "num_heads": level["num_attention_heads"], "short_conv_kernel_size": 4,
        },
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16, "head_dim": 16,
    },
    "longcat_flash": {
        key: {"rope_type": "default", "rope_theta": 1e7} for key in ("rope_parameters", "rope_scaling")
    },
    "mimo_v2_flash": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    "nemotron_h": {"n_groups": lambda level: level.get("mamba_n_groups", 1)},
    "qwen3_next": {
        "full_attention_interval": 4,
        "linear_num_key_heads_cpu": lambda level: level.get("linear_num_key_heads", 16),
        "linear_num_value_heads_cpu": lambda level: level.get("linear_num_value_heads", 32),
    },
    "sarvam_moe": {"router_dtype": "fp32"},
    "step3p5": {
        "layer_types": lambda level: level.get("layer_types") or ["full_attention"] * level["num_hidden_layers"],
        "moe_layers_enum": lambda level: ",".join(map(str, _sparse(level))),
        "rope_theta": lambda level: [1e4] * level["num_hidden_layers"],
        "use_head_wise_attn_gate": False,
        "partial_rotary_factors": lambda level: [1.0] * level["num_hidden_layers"],
    },
}  # fmt: skip

# The same for what is around the text model, by the key there; the whole config is what it follows from.
AROUND: Mapping[str, Mapping[str, Any]] = {
    # Two billion parameters, by default.
    "muse_spark_text": {
        "audio_config": lambda whole: {
            **whole["audio_config"], "out_hidden_size": whole["text_config"]["hidden_size"],
            "hidden_sizes": [8, 16, 32, 64],
        },
        "vision_config": lambda whole: {
            **whole["vision_config"], "num_hidden_layers": 1, "layer_types": ["full_attention"],
        },
    },
}  # fmt: skip


class Built(NamedTuple):
    """A model and its ModelConfig."""

    model: nn.Module
    config: Any

    def moe_layers(self) -> Iterator[MoELayer]:
        """Its decoder layers that have routed experts, in order."""
        for path, module in self.model.named_modules():
            if is_experts(module) and (match := re.match(r"(.*?\.(\d+))\.(.+)$", path)):
                yield MoELayer(int(match[2]), match[1], match[3], module)


def is_experts(module: nn.Module) -> bool:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    return isinstance(module, FusedMoE)


@functools.cache
def known() -> Mapping[str, str]:
    """Names of SGLang's model classes, and the module of each, read in its files: importing all takes half a minute."""
    import sglang.srt.models as package

    found: dict[str, str] = {}
    for folder in package.__path__:
        for file in sorted(Path(folder).glob("*.py")):
            entry = re.search(r"^EntryClass\s*=\s*(\[[^\]]*\]|\w+)", file.read_text(), re.MULTILINE)
            if entry:
                names = re.findall(r"\w+", re.sub(r"#.*", "", entry[1]))
                found |= dict.fromkeys(names, f"{package.__name__}.{file.stem}")
    return found


def register(architecture: str) -> None:
    """Put a model class into SGLang's registry, as its own start does with all. Raises Unsupported with the reason."""
    from sglang.srt.models.registry import ModelRegistry

    if architecture in ModelRegistry.models:
        return
    try:
        module = import_module(known()[architecture])
    except Exception as error:
        raise Unsupported(f"SGLang cannot import {architecture} here: {type(error).__name__}: {said(error)}") from error
    entry = module.EntryClass
    for found in entry if isinstance(entry, list) else [entry]:
        ModelRegistry.models.setdefault(found.__name__, found)


def architectures(record: Any, flat: bool) -> list[str]:
    """Class names of checkpoints with such a config, best first: of the text model alone, then of the whole."""
    from transformers.models.auto import modeling_auto

    text = [
        CLASSES.get(record.model_type, ""),
        record.tiny.text_class,
        published.TEXT_CLASSES.get(record.model_type, ""),
        str(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(record.model_type, "")),
    ]
    whole = [published.CLASSES.get(record.tiny.model_class, ""), record.tiny.model_class]
    if (own := published.OWN_CLASSES.get(record.model_type)) is not None:
        return [own]
    flat = flat and record.model_type not in WRAPPED
    return [name for name in dict.fromkeys([*text, *whole] if flat else whole) if name]


def architecture(record: Any, flat: bool = True) -> str | None:
    return next((name for name in architectures(record, flat) if name in known()), None)


def model_types() -> frozenset[str]:
    """Of the families with a record, those whose model SGLang has, by the name of its class."""
    return frozenset(model_type for model_type in RECORDS if has(RECORDS[model_type]))


def has(record: Any) -> bool:
    """Whether SGLang has a class of its own for this family."""
    return architecture(record) is not None


def falls_back(model_type: str) -> bool:
    """Whether SGLang runs such a model by transformers' own, with its expert layer inside."""
    record = RECORDS[model_type]
    return FALLBACK in known() and record.wrapper is None and architecture(record) is None


def is_text(model_type: str) -> bool:
    """Whether the class for a config of the text model alone is not that of a wrapper around it."""
    record = RECORDS[model_type]
    whole = (record.tiny.model_class, published.CLASSES.get(record.tiny.model_class))
    return record.wrapper is None or architecture(record) not in whole


def as_published(config: Mapping[str, Any], falls: bool = False) -> tuple[Any, dict[str, Any]]:
    """The record of a config, and the config.json of a checkpoint. Raises Absent where SGLang has no class.

    falls: the class around a model of transformers is one, too.
    """
    record = published.record_of(config)
    if record is None:
        raise Unsupported(f"SGLang: no family is known of model type {config.get('model_type')!r}")
    if (form := FORMATS.get(record.model_type)) is not None:
        raise Unsupported(f"SGLang's {architecture(record)} reads checkpoints of another form: {form}")
    config = published.leveled(record, config)
    flat = published.is_flat(record, config)
    name = architecture(record, flat)
    if falls and falls_back(record.model_type):
        name = FALLBACK
    if name is None:
        raise Absent(f"SGLang has no {' or '.join(architectures(record, flat))}")
    register(name)
    values = published.config(record, name, copy.deepcopy(config))
    level = values
    if not published.is_flat(record, values):
        for key in record.wrapper.path:
            level = level[key]
        for key, value in AROUND.get(record.model_type, {}).items():
            values[key] = value(values) if callable(value) else value
    for key, value in KEYS.get(record.model_type, {}).items():
        level[key] = value(level) if callable(value) else value
    return record, {**values, "architectures": [name]}


@contextlib.contextmanager
def folder_of(config: Mapping[str, Any]) -> Iterator[Path]:
    """A folder with that config.json."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield Path(folder)


def model_config(folder: Path, dtype: torch.dtype | str = torch.float32) -> Any:
    """SGLang's real ModelConfig of a folder. Raises Unsupported, with its words, where it makes none.

    dtype: also "auto", as config.json says.
    """
    from sglang.srt.configs.model_config import ModelConfig

    runtime.start()
    try:
        return ModelConfig(str(folder), dtype=str(dtype).removeprefix("torch."))
    except Exception as error:
        raise Unsupported(f"SGLang makes no ModelConfig of this: {type(error).__name__}: {said(error)}") from error


def build(folder: Path, dtype: torch.dtype, where: str | None = None) -> Built:
    """The model of a folder's config.json, every parameter NaN. Raises Unsupported where SGLang cannot here.

    where: the device of its parameters, where it is another than the one that it computes on: "meta", without memory.
    """
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader import loader

    config = model_config(folder, dtype)
    with runtime.building(dtype), torch.device(where) if where else contextlib.nullcontext():
        try:
            model = loader._initialize_model(config, LoadConfig())
        except Exception as error:
            raise Unsupported(
                f"SGLang does not build this model here: {type(error).__name__}: {said(error)}"
            ) from error
    servers.clear(model)
    return Built(model.eval(), config)
