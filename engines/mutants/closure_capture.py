"""Routers that keep something from when they were built or first used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_conformance.engine import RouteInputs, RouterHandle, RouterSpec, Routing
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.reference_impl.router import Router, build_router
from moe_conformance.reference_impl.routing import route as reference_route


def _rewired(spec: RouterSpec, rewire: Callable[[Router], Callable[[Tensor], Routing]]) -> RouterHandle:
    """The reference's Gemma 4 router whose experts are handed another routing function."""
    handle = build_router(spec)
    assert isinstance(handle.module, Router)
    if spec.routing.per_expert_scale:
        handle.module.experts.routing_function = rewire(handle.module)
    return handle


def _scale(router: Router) -> Tensor:
    """The parameter as the module has it now."""
    return router.get_parameter("per_expert_scale")


def _gemma4(spec: RouterSpec, logits: Tensor, per_expert_scale: Tensor) -> Routing:
    return reference_route(RouteInputs(logits, spec.routing, {"router.per_expert_scale": per_expert_scale}))


class ClosureKeepsParameter(Faulty):
    def router_module(self, spec: RouterSpec) -> RouterHandle:
        def rewire(router: Router) -> Callable[[Tensor], Routing]:
            per_expert_scale = _scale(router)
            return lambda logits: _gemma4(spec, logits, per_expert_scale)

        return _rewired(spec, rewire)


class ClosureKeepsModule(Faulty):
    def router_module(self, spec: RouterSpec) -> RouterHandle:
        return _rewired(spec, lambda router: lambda logits: _gemma4(spec, logits, _scale(router)))


class FirstCallIsCached(Faulty):
    def router_module(self, spec: RouterSpec) -> RouterHandle:
        def rewire(router: Router) -> Callable[[Tensor], Routing]:
            kept: list[Tensor] = []

            def route(logits: Tensor) -> Routing:
                if not kept:
                    kept.append(_scale(router).float().clone())
                return _gemma4(spec, logits, kept[0])

            return route

        return _rewired(spec, rewire)


class CachedUntilVersionChanges(Faulty):
    """Weight loaders write through `.data`, which neither moves the tensor nor counts up its version."""

    def router_module(self, spec: RouterSpec) -> RouterHandle:
        def rewire(router: Router) -> Callable[[Tensor], Routing]:
            kept: dict[object, Tensor] = {}

            def route(logits: Tensor) -> Routing:
                scale = _scale(router)
                if torch.compiler.is_compiling():
                    return _gemma4(spec, logits, scale)
                key = (scale.data_ptr(), scale._version, scale.dtype)
                if key not in kept:
                    kept.clear()
                    kept[key] = scale.double().clone()
                return _gemma4(spec, logits, kept[key])

            return route

        return _rewired(spec, rewire)


class NewestRouterAnswers(Faulty):
    """Functions made in a loop over layers all reach for the loop's variable: its last value."""

    def __init__(self) -> None:
        self.newest: Router | None = None

    def router_module(self, spec: RouterSpec) -> RouterHandle:
        def rewire(router: Router) -> Callable[[Tensor], Routing]:
            self.newest = router

            def route(logits: Tensor) -> Routing:
                assert self.newest is not None
                return _gemma4(spec, logits, _scale(self.newest))

            return route

        return _rewired(spec, rewire)


class _Keeps(Faulty):
    """The fault one tensor further: every tensor but one is read when called."""

    name_kept = ""

    def router_module(self, spec: RouterSpec) -> RouterHandle:
        handle = build_router(spec)
        handle.module.__class__ = _KeepsOne
        assert isinstance(handle.module, _KeepsOne)
        present = {self.name_kept} & spec.tensors().keys()
        handle.module.kept = [{name: handle.module.tensors()[name] for name in present}]
        return handle


class _KeepsOne(Router):
    kept: list[dict[str, Tensor]]  # a list hides it from named_parameters

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | (self.kept[0] if "kept" in vars(self) else {})


class ProjectionKeepsTensor(_Keeps):
    name_kept = "router.proj"


class BiasKeepsTensor(_Keeps):
    name_kept = "router.selection_bias"


class KeepsWhatItWasCalledWith(Faulty):
    """Each call leaves its scale in the module, and torch.func.functional_call's with it."""

    def router_module(self, spec: RouterSpec) -> RouterHandle:
        def rewire(router: Router) -> Callable[[Tensor], Routing]:
            handed: list[Tensor] = []

            def route(logits: Tensor) -> Routing:
                now, own = _scale(router), vars(router)["_parameters"].get("per_expert_scale")
                swapped = bool(handed) and now.data_ptr() != handed[0].data_ptr()
                if not handed:
                    handed.append(now)
                answer = _gemma4(spec, logits, now)
                if swapped and isinstance(own, Tensor):
                    handed[0].data.copy_(now)
                return answer

            return route

        return _rewired(spec, rewire)


_CHECK = "routing_uses_the_values_at_call_time"

MUTANTS = (
    Mutant(
        ClosureKeepsParameter,
        "closure-capture",
        "the routing closure captured the Parameter (vllm#42250)",
        ("closure-gemma4-per-expert-scale-functional-call", _CHECK),
    ),
    Mutant(
        ClosureKeepsModule,
        "closure-capture",
        "the routing closure captured the module, so a deepcopy routes with the original's values",
        ("closure-gemma4-per-expert-scale-deepcopy", _CHECK),
    ),
    Mutant(
        FirstCallIsCached,
        "closure-capture",
        "the scale is converted at the first call and kept",
        ("closure-gemma4-per-expert-scale-load-state-dict", _CHECK),
    ),
    Mutant(
        CachedUntilVersionChanges,
        "closure-capture",
        "the scale is converted again only when its address or its version counter changes",
        ("closure-gemma4-per-expert-scale-data-copy", _CHECK),
    ),
    Mutant(
        NewestRouterAnswers,
        "closure-capture",
        "every routing closure reads the router that was built last",
        ("closure-gemma4-per-expert-scale-another-router", _CHECK),
    ),
    Mutant(
        ProjectionKeepsTensor,
        "closure-capture",
        "the projection weight was captured, all else is read when called",
        ("closure-softmax-topk-proj-replaced-parameter", _CHECK),
    ),
    Mutant(
        BiasKeepsTensor,
        "closure-capture",
        "the selection bias was captured, all else is read when called",
        ("closure-deepseek-v3-selection-bias-replaced-parameter", _CHECK),
    ),
    Mutant(
        KeepsWhatItWasCalledWith,
        "closure-capture",
        "a functional call's values stay in the module",
        ("closure-gemma4-per-expert-scale-functional-call", "a_functional_call_leaves_the_module_as_it_was"),
    ),
)
