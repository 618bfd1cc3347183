"""What the adapters of vLLM and SGLang do alike with a server's own model: find its MoE layers, see what was written.

A model is full of NaN before it is loaded; a tensor is found again by its values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_conformance.engine import (
    RECORDS,
    CheckpointName,
    LayerSpec,
    RouterSpec,
    Target,
    UpdateInputs,
    checkpoint_of,
    inverse,
    normal,
)
from moe_conformance.protocol.features import of_routing

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
# Names of the modules with shared experts. Of the first, a module is several side by side; the others are one.
_SEVERAL = "shared_experts"
_SHARED = (_SEVERAL, "shared_expert", "shared_mlp", "share_expert")
_DOWN = ("down_proj", "output_linear")
# Of a setting of a router: what must be as asked, and the width of the experts behind it, which nobody looks at.
_PARTS = ("routing", "logits", "num_experts", "hidden_size")
_UNSEEN = 32


class MoELayer(NamedTuple):
    """One decoder layer. path: in the model. inner: of the expert layer in it."""

    number: int
    path: str
    inner: str
    experts: nn.Module


def one_or_each(values: list[int]) -> int | tuple[int, ...]:
    """What all layers have in common, or a number for each."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def shared_experts(layer: nn.Module, width: int) -> tuple[int, int | None]:
    """(how many always-on experts a decoder layer has, their summed width). width: of a routed expert."""
    for name, module in layer.named_modules():
        if (own := name.rpartition(".")[2]) in _SHARED and (summed := _down_width(module)):
            return (summed // width if own == _SEVERAL and summed % width == 0 else 1), summed
    return 0, None


def _down_width(module: nn.Module) -> int:
    parts: Iterator[tuple[str, Any]] = module.named_modules()
    return next((part.input_size for name, part in parts if name.rpartition(".")[2] in _DOWN), 0)


@torch.no_grad()
def clear(model: nn.Module) -> None:
    """Fill every parameter with what no checkpoint has."""
    for parameter in model.parameters():
        parameter.fill_(float("nan") if parameter.is_floating_point() else -1)


def unwritten(parameter: Tensor) -> Tensor:
    """Where no loader wrote to a parameter since it was cleared."""
    return parameter.isnan() if parameter.is_floating_point() else parameter == -1


def of_layers(
    model: nn.Module,
    layers: Iterable[MoELayer],
    table: Mapping[str, str],
    experts: Mapping[str, str],
    is_gated: Callable[[Any], bool],
) -> Iterator[tuple[str, str]]:
    """The parameters of the MoE layers: name, and canonical name.

    table: as CANONICAL, what comes to it. experts: by the end of a name, the matrix or bias of the experts.
    """
    for layer in layers:
        whole = model.get_submodule(layer.path)
        known = {**CANONICAL, **table, **(BESIDE if hasattr(whole, "pre_feedforward_layernorm_2") else {})}
        for name, parameter in whole.named_parameters(remove_duplicate=False):
            end = name.rpartition(".")[2]
            if name.startswith(f"{layer.inner}.") and end in experts:
                gated = end.startswith("w2") or is_gated(layer.experts)
                found = experts[end] if gated else experts[end].replace("13", "1")
                yield f"{layer.path}.{name}", f"layers.{layer.number}.experts.{found}"
                continue
            key = next((key for pattern, key in known.items() if re.fullmatch(pattern, name)), None)
            if key is not None and not _is_alias(name, parameter, whole):
                yield f"{layer.path}.{name}", f"layers.{layer.number}.{key}"


def _is_alias(name: str, parameter: Tensor, whole: nn.Module) -> bool:
    """Whether this is a second name of a parameter that the layer has under another one already."""
    first = next(other for other, found in whole.named_parameters(remove_duplicate=False) if found is parameter)
    return first != name


def told_apart(names: Sequence[CheckpointName]) -> dict[str, Tensor]:
    """A tensor for each name, with a value of its own throughout: its place among the names, from 1 on."""
    return {entry.name: torch.full(entry.shape, float(value)) for value, entry in enumerate(names, 1)}


def held(model: nn.Module) -> dict[int, list[str | Target]]:
    """By the values of `told_apart`, where in the model they lie."""
    found: dict[int, list[str | Target]] = {}
    for name, parameter in model.named_parameters():
        for value in parameter.unique().tolist():
            if value == value and value > 0:
                found.setdefault(int(value), []).append(place(name, parameter == value))
    return found


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


def pushed(
    record: Any, values: Mapping[str, Any], inputs: UpdateInputs, held: Mapping[str, Tensor], push: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint tensors that hold something of a push. held: what the block holds behind it."""
    marks = {name: torch.full(tensor.shape, int(name in push)) for name, tensor in held.items()}
    marked = dict(checkpoint_of(record, values, inputs.block.layer, marks))
    for name, tensor in checkpoint_of(record, values, inputs.block.layer, held):
        if (marked[name] == 1).any():
            yield name, tensor


def routers(
    spec: RouterSpec, model_types: Iterable[str]
) -> Iterator[tuple[inverse.Setting, LayerSpec, dict[str, Any]]]:
    """Settings of these families with that router; those in which "input" is the word for float32 come last."""
    types = list(model_types)
    for narrow in dict.fromkeys((True, spec.dtype != torch.float32)):
        for model_type in types:
            for setting in inverse.settings(model_type):
                small = inverse.small(
                    setting.spec, spec.routing, spec.num_experts, _UNSEEN, logits=spec.logits,
                    hidden_size=spec.hidden_size,
                )  # fmt: skip
                if (answer := inverse.expressed(setting, small, _PARTS, narrow)) is not None:
                    yield setting, answer[1].spec, answer[1].config


def gone(words: Mapping[str, Mapping[str, str]], offered: Mapping[str, frozenset[str]]) -> dict[str, Mapping[str, str]]:
    """Of what a server has nothing of, by stage and word with the reason, what this release does not offer either."""
    return {
        stage: {word: why for word, why in words[stage].items() if word not in offered[stage]}
        for stage in words.keys() & offered.keys()
    }


def only_elsewhere(server: str, offered: frozenset[str], owns: Callable[[Any], bool]) -> dict[str, str]:
    """The other features of routing that no family takes which a server has a model of, with the families that do.

    owns: whether it has one of the family with this record.
    """
    families: dict[str, set[str]] = {}
    for name in RECORDS:
        for setting in inverse.settings(name):
            for word in of_routing(setting.spec.routing) - offered:
                families.setdefault(word, set()).add(name)
    return {
        word: f"{server} has no model of its own that routes so; {', '.join(sorted(names))} do"
        for word, names in sorted(families.items())
        if not any(owns(RECORDS[name]) for name in names)
    }


def router_tensors(spec: RouterSpec, layer: LayerSpec, seed: str) -> dict[str, Tensor]:
    """Tensors of a block with that router: the router's all different, the others zero."""
    wanted = spec.tensors()
    tensors = {
        name: normal(shape, f"{seed}-router-{name}") if name in wanted else torch.zeros(shape)
        for name, shape in layer.tensors().items()
    }
    dtypes = {name: spec.dtype for name in tensors} | {"router.selection_bias": torch.float32}
    return {name: value.to(dtypes[name]) for name, value in tensors.items()}


def holder(module: nn.Module, value: Tensor) -> str | None:
    """The parameter or buffer that has these values."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return next((n for n, t in named if t.shape == value.shape and torch.equal(t, value.to(t.dtype))), None)
