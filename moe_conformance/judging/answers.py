"""What a stage's answer is made of, looked at before a check takes it apart. Shapes and values are for the checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_conformance.engine import BlockOutput, CaptureShape, Exchanged, Generated, MoESpec, Replicated, RouterHandle
from moe_conformance.errors import Nonconformance
from moe_conformance.judging.memory import tensors_in


def assert_formed(stage: str, answer: Any) -> None:
    """Raise Nonconformance unless it is of the types that the protocol says for this stage, in every part."""
    if stage in _FORMS:
        want, is_formed = _FORMS[stage]
        if not is_formed(answer):
            raise Nonconformance(f"{stage}: got {_shown(answer)}, want {want}")
        for _, tensor in tensors_in(answer):
            if type(tensor) is Tensor and (tensor.is_meta or tensor.layout is not torch.strided):
                raise Nonconformance(f"{stage}: got a Tensor, {tensor.layout} on {tensor.device}, want numbers")


def assert_pair(what: str, answer: Any) -> None:
    """Raise Nonconformance unless it is two tensors."""
    if not _pair(answer):
        raise Nonconformance(f"{what}: got {_shown(answer)}, want two tensors")


# Types are asked of the class throughout: isinstance would ask the answer itself.
def _is(answer: Any, *kinds: type) -> bool:
    return issubclass(type(answer), kinds)


def _are(answer: Any, *kinds: type) -> bool:
    """Whether it is a list or tuple of these."""
    return _is(answer, list, tuple) and all(_is(part, *kinds) for part in answer)


def _pair(answer: Any) -> bool:
    return _are(answer, Tensor) and len(answer) == 2


def _methods(*names: str) -> Callable[[Any], bool]:
    return lambda answer: all(callable(getattr(answer, name, None)) for name in names)


def _is_spec(answer: Any) -> bool:
    return _is(answer, MoESpec) and all(
        _is(getattr(answer, name), tuple) for name in ("moe_layers", "encoder_moe_layers", "layer_runs", "layers")
    )


def _is_aligned(answer: Any) -> bool:
    return _is(answer, list, tuple) and len(answer) == 3 and _are(answer[:2], Tensor) and _is(answer[2], Tensor, int)


def _is_block(answer: Any) -> bool:
    return _is(answer, BlockOutput) and _is(answer.output, Tensor) and (answer.routing is None or _pair(answer.routing))


def _is_exchanged(answer: Any) -> bool:
    return _are(answer, Exchanged) and all(
        _is(one.output, Tensor) and (one.arrived is None or _pair(one.arrived)) for one in answer
    )


def _is_generated(answer: Any) -> bool:
    return (
        _is(answer, Generated)
        and _are(answer.tokens, list, tuple)
        and all(_are(tokens, int) for tokens in answer.tokens)
        and (answer.routed is None or _are(answer.routed, Tensor))
    )


def _is_tensor(answer: Any) -> bool:
    return _is(answer, Tensor)


def _is_mapping(answer: Any) -> bool:
    return _is(answer, Mapping) and all(_is(name, str) for name in answer)


_FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "describe": ("a MoESpec whose layers are tuples", _is_spec),
    "capture_shape": ("a CaptureShape", lambda answer: _is(answer, CaptureShape)),
    "route": ("a Routing of two tensors", _pair),
    "router_module": (
        "a RouterHandle of an nn.Module",
        lambda answer: _is(answer, RouterHandle) and _is(answer.module, nn.Module) and _is_mapping(answer.tensors),
    ),
    "align": ("an Aligned of two tensors and a count", _is_aligned),
    "experts": ("a tensor", _is_tensor),
    "layer": ("a tensor", _is_tensor),
    "block": ("a BlockOutput of a tensor, and of a Routing or None", _is_block),
    "capture_session": ("an object that can capture, read and close", _methods("capture", "read", "close")),
    "capture_store": ("an object that can write and close", _methods("write", "close")),
    "capture_reader": ("an object that can read and close", _methods("read", "close")),
    "expert_map": ("a tensor", _is_tensor),
    "replicate": ("a Replicated of two tensors", lambda answer: _is(answer, Replicated) and _pair(answer)),
    "shard": ("a tensor", _is_tensor),
    "exchange": ("a sequence of Exchanged, each of a tensor, and of an Arrived or None", _is_exchanged),
    "remap": ("a mapping from names", _is_mapping),
    "load": ("a mapping from names", _is_mapping),
    "update": ("a sequence of tensors", lambda answer: _are(answer, Tensor)),
    "generate": ("a Generated of lists of numbers, and of tensors or None", _is_generated),
}


def _shown(answer: Any) -> str:
    """Its type, and those of its parts where it has some."""
    name = type(answer).__name__
    if _is(answer, list, tuple) and 0 < len(answer) <= 8:
        return f"{name} of {', '.join(_shown(part) if _is(part, tuple) else type(part).__name__ for part in answer)}"
    return name
