"""Before an engine is judged: three trivial cases, and capability honesty."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from moe_conformance.engine import (
    STAGES,
    CaptureSpec,
    Engine,
    LayerInputs,
    Method,
    RouteInputs,
    RouterSpec,
    Rows,
)
from moe_conformance.errors import Unsupported
from moe_conformance.judging.inputs import normal

Capabilities = Mapping[str, frozenset[str]]
_SIMPLEST_FIRST: tuple[Method, ...] = ("softmax_topk_renorm", "softmax_topk", "gemma4")


class ProbeFailure(Exception):
    """The adapter is not what it declares to be."""


def probe(engine: Engine, capabilities: Capabilities) -> None:
    """Raise ProbeFailure unless declared stages answer in the right form and all others raise Unsupported.

    Only form is looked at: a wrong value is for the cases to find.
    """
    unknown = capabilities.keys() - set(STAGES)
    if unknown:
        raise ProbeFailure(f"capabilities: got {', '.join(sorted(unknown))}, want stages out of {', '.join(STAGES)}")
    for stage in STAGES:
        if stage not in capabilities:
            _must_refuse(engine, stage)
        elif stage in _TRIVIAL:
            _TRIVIAL[stage](engine, _simplest(capabilities[stage]))


def _simplest(features: frozenset[str]) -> Method:
    return next((method for method in _SIMPLEST_FIRST if method in features), "gemma4")


def _route(engine: Engine, method: Method) -> None:
    ids, weights = engine.route(_route_inputs(method))
    if tuple(ids.shape) != (3, 2) or tuple(weights.shape) != (3, 2) or ids.is_floating_point():
        raise ProbeFailure("route: want (integer ids [3, 2], weights [3, 2]) for three tokens and two experts each")


def _layer(engine: Engine, method: Method) -> None:
    output = engine.layer(_layer_inputs(method))
    if tuple(output.shape) != (3, 32):
        raise ProbeFailure(f"layer: got {list(output.shape)}, want [3, 32]")


def _capture(engine: Engine, _: Method) -> None:
    session = engine.capture_session(_CAPTURE)
    try:
        session.capture(0, torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), Rows("local", (2,)))
        got = session.read(2)
    finally:
        session.close()
    if tuple(got.shape) != (2, 2, 2):
        raise ProbeFailure(f"capture_session: read gave {list(got.shape)}, want [tokens 2, layers 2, top-k 2]")


_TRIVIAL: dict[str, Callable[[Engine, Method], None]] = {"route": _route, "layer": _layer, "capture_session": _capture}
_CAPTURE = CaptureSpec(max_tokens=4, layers=2, top_k=2, experts=4)


def _scale(method: Method) -> torch.Tensor | None:
    return torch.ones(4) if method == "gemma4" else None


def _route_inputs(method: Method) -> RouteInputs:
    return RouteInputs(normal((3, 4), "probe-logits"), 2, method, _scale(method))


def _layer_inputs(method: Method) -> LayerInputs:
    return LayerInputs(
        x=normal((3, 32), "probe-x"),
        logits=normal((3, 4), "probe-logits"),
        w13=normal((4, 64, 32), "probe-w13", std=0.125),
        w2=normal((4, 32, 32), "probe-w2", std=0.125),
        top_k=2,
        method=method,
        per_expert_scale=_scale(method),
    )


def _must_refuse(engine: Engine, stage: str) -> None:
    """A stage that is not declared must not answer."""
    arguments: dict[str, tuple[Any, ...]] = {
        "capture_shape": ({}, "worker"),
        "route": (_route_inputs("softmax_topk_renorm"),),
        "router_module": (RouterSpec("softmax_topk_renorm", 4, 2, 8, torch.float32),),
        "layer": (_layer_inputs("softmax_topk_renorm"),),
        "capture_session": (_CAPTURE,),
        "remap": ({}, ()),
    }
    try:
        getattr(engine, stage)(*arguments.get(stage, (None,)))
    except Unsupported:
        return
    except Exception as error:
        raise ProbeFailure(
            f"{stage}: not declared, so calling it must raise Unsupported; it raised {type(error).__name__}: {error}"
        ) from error
    raise ProbeFailure(f"{stage}: not declared in capabilities, yet it answers; declare it, so that it is judged")
