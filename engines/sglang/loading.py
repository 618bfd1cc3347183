"""Loading of any family: SGLang's default loader into SGLang's own model, and what then lies in its MoE layers.

Of names, the parameter that each tensor ends up in, as a load of tensors that are told apart by their values shows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_conformance.engine import CheckpointName, Target, Unsupported
from moe_conformance.engines.sglang import models, runtime
from moe_conformance.engines.sglang.refusing import refusals
from moe_conformance.errors import CheckpointError

# By what follows the layer's number, the canonical tensor that a parameter outside the experts is.
CANONICAL: Mapping[str, str] = {
    r"(?:\w+\.)*(?:gate|router|(?:gate|router)\.(?:gate|wg|layer|proj|classifier))\.weight": "router.proj",
    r"(?:\w+\.)?(?:gate|router|router\.layer)\.bias": "router.bias",
    r".*(?:e_score_correction_bias|expert_bias|router_bias|correction_bias)": "router.selection_bias",
    r"router\.scale": "router.scale",
    r"(?:\w+\.)*per_expert_scale": "router.per_expert_scale",
    r"(?:\w+\.)*tid2eid": "router.table",
    r"(?:\w+\.)?(?:share[d]?_(?:experts?|mlp))\.(?:gate_up_proj|input_linear)\.weight": "shared.w13",
    r"(?:\w+\.)?(?:share[d]?_(?:experts?|mlp))\.(?:down_proj|output_linear)\.weight": "shared.w2",
    r"(?:\w+\.)?shared_expert_gate\.weight": "shared.gate",
}
# Of layers whose experts stand beside a dense MLP.
BESIDE: Mapping[str, str] = {
    r"mlp\.gate_up_proj\.weight": "dense.w13",
    r"mlp\.down_proj\.weight": "dense.w2",
    r"pre_feedforward_layernorm\.weight": "dense.norm",
    r"post_feedforward_layernorm_1\.weight": "dense.sum_norm",
    r"pre_feedforward_layernorm_2\.weight": "experts.norm",
    r"post_feedforward_layernorm_2\.weight": "experts.sum_norm",
}
EXPERTS: Mapping[str, str] = {
    "w13_weight": "w13", "w2_weight": "w2", "w13_weight_bias": "b13", "w2_weight_bias": "b2",
}  # fmt: skip


@torch.no_grad()
def load(folder: Path) -> Mapping[str, Tensor]:
    """The folder's MoE layers by canonical name, after SGLang's default loader read it into a model full of NaN.

    Raises CheckpointError where a parameter of them stays unwritten; what SGLang raises passes through.
    """
    from sglang.srt.configs.load_config import LoadConfig, LoadFormat
    from sglang.srt.model_loader.loader import DefaultModelLoader

    _, values = models.as_published(json.loads((folder / "config.json").read_text()))
    built = _built(values)
    named = dict(_of_layers(built))
    loader = DefaultModelLoader(LoadConfig(load_format=LoadFormat.SAFETENSORS))
    source = DefaultModelLoader.Source(model_or_path=str(folder), revision=None)
    with runtime.building(torch.float32), refusals():
        built.model.load_weights(loader._get_weights_iterator(source))
    parameters = dict(built.model.named_parameters(remove_duplicate=False))
    if left := [name for name in named if models.unwritten(parameters[name]).any()]:
        raise CheckpointError(f"load: got NaN in {', '.join(left)}, want every parameter written")
    return {key: _canonical(parameters[name], built, name).detach().clone() for name, key in named.items()}


def _built(values: dict[str, Any]) -> models.Built:
    with models.folder_of(values) as folder:
        built = models.build(folder, torch.float32)
    if not any(True for _ in built.moe_layers()):
        raise Unsupported(f"SGLang's {type(built.model).__name__} has no FusedMoE, but experts of its own")
    return built


def _of_layers(built: models.Built) -> Iterator[tuple[str, str]]:
    """The parameters of the MoE layers: name, and canonical name."""
    for layer in built.moe_layers():
        whole = built.model.get_submodule(layer.path)
        table = {**CANONICAL, **(BESIDE if hasattr(whole, "pre_feedforward_layernorm_2") else {})}
        for name, parameter in whole.named_parameters(remove_duplicate=False):
            end = name.rpartition(".")[2]
            if name.startswith(f"{layer.inner}.") and end in EXPERTS:
                gated = end.startswith("w2") or _config(layer.experts).is_gated
                found = EXPERTS[end] if gated else EXPERTS[end].replace("13", "1")
                yield f"{layer.path}.{name}", f"layers.{layer.number}.experts.{found}"
                continue
            key = next((key for pattern, key in table.items() if re.fullmatch(pattern, name)), None)
            if key is not None and not _is_alias(name, parameter, whole):
                yield f"{layer.path}.{name}", f"layers.{layer.number}.{key}"


def _config(experts: Any) -> Any:
    return experts.moe_runner_config


def _is_alias(name: str, parameter: Tensor, whole: nn.Module) -> bool:
    """Whether this is a second name of a parameter that the layer has under another one already."""
    first = next(other for other, found in whole.named_parameters(remove_duplicate=False) if found is parameter)
    return first != name


def _canonical(parameter: Tensor, built: models.Built, name: str) -> Tensor:
    """Gate above up, in the width of the model: only gpt-oss's parameters have their rows in turns."""
    end = name.rpartition(".")[2]
    if end.startswith("w13"):
        layer = next(layer for layer in built.moe_layers() if name.startswith(f"{layer.path}.{layer.inner}."))
        config = _config(layer.experts)
        if config.gemm1_alpha is not None and config.activation == "silu" and config.gate_up_interleaved:
            return torch.cat((parameter[:, 0::2], parameter[:, 1::2]), dim=1)
    if end == "e_score_correction_bias":
        return parameter.flatten()
    return parameter


@torch.no_grad()
def remap(config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str | Target, ...]]:
    """The parameter that SGLang's loader writes each tensor to, and which expert and part of it.

    Every tensor has a value of its own throughout; where it lies afterwards is its target.
    """
    _, values = models.as_published(config)
    built = _built(values)
    tensors = {entry.name: torch.full(entry.shape, float(value)) for value, entry in enumerate(names, 1)}
    with runtime.building(torch.float32), refusals():
        built.model.load_weights(iter(tensors.items()))
    held: dict[int, list[str | Target]] = {}
    for name, parameter in built.model.named_parameters():
        for value in parameter.unique().tolist():
            if value == value and value > 0:
                held.setdefault(int(value), []).append(place(name, parameter == value))
    if lost := [entry.name for value, entry in enumerate(names, 1) if value not in held]:
        raise CheckpointError(f"{', '.join(lost)}: got no parameter that it was loaded into, want one")
    return {entry.name: tuple(held[value]) for value, entry in enumerate(names, 1)}


def place(name: str, mask: Tensor) -> str | Target:
    """The target of a tensor that lies where the mask is true in a parameter."""
    if bool(mask.all()):
        return name
    if mask.ndim == 0 or not re.search(r"\.w(13|2)_\w+$", name):
        return Target(name, None, int(mask.flatten(1).any(-1).nonzero()[0]) if mask.ndim > 1 else 0)
    experts = mask.flatten(1).any(1).nonzero().flatten().tolist()
    one = experts[0] if len(experts) < len(mask) or len(mask) == 1 else None
    rows = mask[experts[0]].flatten(1).any(1) if mask.ndim > 2 else mask[experts[0]]
    if bool(mask[experts[0]].all()):
        return Target(name, one, None)
    return Target(name, one, "w1" if int(rows.nonzero()[0]) < len(rows) // 2 else "w3")
