"""Before a stage is judged: one trivial call, and a check that undeclared stages refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import (
    CaptureSpec,
    Engine,
    ExpertsInputs,
    LayerInputs,
    LayerSpec,
    Limits,
    LogitsSpec,
    MLPSpec,
    RouteInputs,
    RouterSpec,
    RoutingSpec,
    RowKind,
    Rows,
)
from moe_conformance.errors import Unsupported
from moe_conformance.judging.inputs import distinct_logits, normal
from moe_conformance.protocol.features import of_routing

TOKENS, EXPERTS, WIDTH = 3, 4, 32


class ProbeFailure(Exception):
    """The adapter is not what it declares to be."""


def probe(engine: Engine, stage: str, declared: Set[str] | None, limits: Limits | None = None) -> None:
    """Raise ProbeFailure unless a declared stage answers in the right form, and any other raises Unsupported.

    declared: the features of the stage, None where it is not declared. Only the form is checked: wrong values are for
    the cases to find. What the engine itself raises is passed on.
    """
    if declared is None:
        _must_refuse(engine, stage)
    elif stage in _TRIVIAL:
        _TRIVIAL[stage](engine, declared, limits or Limits())


def _route(engine: Engine, declared: Set[str], limits: Limits) -> None:
    routing = next(_routings(declared, _top_k(limits)), None)
    if routing is None:
        return
    ids, weights = engine.route(_route_inputs(routing, limits))
    got, want = (tuple(ids.shape), tuple(weights.shape)), ((TOKENS, routing.top_k),) * 2
    if got != want or ids.is_floating_point():
        raise ProbeFailure(
            f"route: got ids {ids.dtype} {list(ids.shape)} and weights {list(weights.shape)}, want integer ids and "
            f"weights [{TOKENS}, {routing.top_k}] for {TOKENS} tokens; return them in this order"
        )


def _experts(engine: Engine, declared: Set[str], limits: Limits) -> None:
    inputs = _experts_inputs(limits)
    _has_shape("experts", engine.experts(inputs), inputs.x.shape)


def _layer(engine: Engine, declared: Set[str], limits: Limits) -> None:
    if routing := next(_routings(declared, _top_k(limits)), None):
        inputs = _layer_inputs(routing, limits)
        _has_shape("layer", engine.layer(inputs), inputs.x.shape)


def _capture(engine: Engine, declared: Set[str], limits: Limits) -> None:
    spec = replace(_CAPTURE, top_k=_top_k(limits))
    # With one rank every layout has the same rows.
    kind = next((kind for kind in _ROW_KINDS if kind in declared), None)
    if kind is None:
        return
    session = engine.capture_session(spec)
    try:
        ids = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)[:, : spec.top_k]
        session.capture(0, ids, Rows(kind, (2,), gather=lambda rows: rows))
        got = session.read(2)
    finally:
        session.close()
    _has_shape("capture_session: read", got, (2, spec.layers, spec.top_k))


def _has_shape(what: str, got: Any, want: tuple[int, ...]) -> None:
    is_tensor = issubclass(type(got), Tensor)  # isinstance would ask the answer itself
    if not is_tensor or tuple(got.shape) != tuple(want):
        shown = list(got.shape) if is_tensor else type(got).__name__
        raise ProbeFailure(f"{what}: got {shown}, want a tensor {list(want)}")


_TRIVIAL: dict[str, Callable[[Engine, Set[str], Limits], None]] = {
    "route": _route,
    "experts": _experts,
    "layer": _layer,
    "capture_session": _capture,
}
_ROW_KINDS: tuple[RowKind, ...] = ("local", "concatenated", "sequence_shard", "sequence_gathered")
_CAPTURE = CaptureSpec(max_tokens=4, layers=2, top_k=2, experts=EXPERTS)


def _routings(declared: Set[str], top_k: int) -> Iterator[RoutingSpec]:
    """Simple routing methods that take no feature but the declared ones, the most common first."""
    scores, renormalize = ("softmax", "sigmoid", "sqrt_softplus"), ("sum", "no", "norm")
    shapes = [{"select_on": "scores"}, {"select_on": "logits"}]
    shapes += [{"selector": name, "select_on": "logits"} for name in ("sparsemixer", "product_keys")]
    for shape, score, divided in product(shapes, scores, renormalize):
        routing = RoutingSpec(top_k, score=score, renormalize=divided, **shape)  # type: ignore[arg-type]
        if of_routing(routing) <= declared:
            yield routing


def _top_k(limits: Limits) -> int:
    return min(2, limits.top_k or 2)


def _dtype(limits: Limits) -> torch.dtype:
    """float32 where the stage takes it."""
    names = [name for name in ("float32", "bfloat16", "float16", "float64") if name in limits.dtypes]
    dtype: torch.dtype = getattr(torch, names[0]) if names else torch.float32
    return dtype


def _width(limits: Limits, *letters: str) -> int:
    """The first width from WIDTH up that is a multiple of what the stage takes for all of these letters."""
    numbers = [limits.multiples.get(letter, 1) for letter in letters]
    width = WIDTH
    while any(width % number for number in numbers):
        width += 1
    return width


def _tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: normal(shape, f"probe-{name}", dtype, std=0.125) for name, shape in shapes.items()}


def _route_inputs(routing: RoutingSpec, limits: Limits) -> RouteInputs:
    logits = distinct_logits(TOKENS, routing.classes(EXPERTS), "probe-logits", _dtype(limits))
    return RouteInputs(logits, routing)


def _experts_inputs(limits: Limits) -> ExpertsInputs:
    mlp, width, dtype = MLPSpec(_width(limits, "F")), _width(limits, "D", "H"), _dtype(limits)
    ids = torch.arange(TOKENS * 2).reshape(TOKENS, 2)[:, : _top_k(limits)] % EXPERTS
    return ExpertsInputs(
        x=normal((TOKENS, width), "probe-x", dtype),
        mlp=mlp,
        tensors=_tensors(mlp.tensors("experts", width, (EXPERTS,)), dtype),
        ids=ids,
        weights=torch.full(ids.shape, 0.5),
    )


def _layer_inputs(routing: RoutingSpec, limits: Limits) -> LayerInputs:
    hidden, dtype = _width(limits, "H", "D"), _dtype(limits)
    spec = LayerSpec(hidden, EXPERTS, LogitsSpec(), routing, MLPSpec(_width(limits, "F")))
    shapes = {name: shape for name, shape in spec.tensors().items() if name.startswith("experts.")}
    return LayerInputs(
        x=normal((TOKENS, hidden), "probe-x", dtype),
        logits=distinct_logits(TOKENS, spec.classes, "probe-logits", dtype),
        spec=spec,
        tensors=_tensors(shapes, dtype),
    )


def _must_refuse(engine: Engine, stage: str) -> None:
    """A stage that is not declared must not answer."""
    routing, limits = RoutingSpec(2, renormalize="sum"), Limits()
    arguments: dict[str, Callable[[], tuple[Any, ...]]] = {
        "capture_shape": lambda: ({}, "worker"),
        "route": lambda: (_route_inputs(routing, limits),),
        "router_module": lambda: (RouterSpec(LogitsSpec(), routing, EXPERTS, WIDTH, torch.float32),),
        "experts": lambda: (_experts_inputs(limits),),
        "layer": lambda: (_layer_inputs(routing, limits),),
        "capture_session": lambda: (_CAPTURE,),
        "remap": lambda: ({}, ()),
    }
    try:
        getattr(engine, stage)(*arguments.get(stage, lambda: (None,))())
    except Unsupported:
        return
    except Exception as error:
        raise ProbeFailure(
            f"{stage}: got {type(error).__name__} from a stage that is not declared, want Unsupported; declare the "
            f"stage or take the method out: {error}"
        ) from error
    raise ProbeFailure(
        f"{stage}: got an answer from a stage that is not declared, want Unsupported; declare the stage, so that it "
        "is judged, or take the method out"
    )
