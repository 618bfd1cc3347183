"""From a case to a router's spec, values and hidden states, and the judgement of its answer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import RouteInputs, RouterHandle, RouterSpec, Routing
from moe_conformance.judging import compare
from moe_conformance.judging.answers import assert_pair
from moe_conformance.judging.inputs import normal
from moe_conformance.judging.layouts import given_as
from moe_conformance.oracle.logits import logits_value
from moe_conformance.oracle.routing import judge_routing
from moe_conformance.protocol.moving import to_device
from moe_conformance.suites.route.inputs import fine

Tensors = dict[str, Tensor]
# As models keep it: a bias that balances experts needs the bits that their scores have.
KEPT_WIDE = ("router.selection_bias",)
Takes = Literal["logits", "hidden"]


class Router:
    """A router to build, hidden states [T, H] for it, and values of its tensors, another set for each version."""

    def __init__(self, spec: RouterSpec, hidden: Tensor) -> None:
        self.spec, self.hidden = spec, hidden

    def values(self, version: str) -> Tensors:
        """Canonical tensors; scales of both signs and none of them 1."""
        return {
            name: value_of(name, shape, version).to(torch.float32 if name in KEPT_WIDE else self.spec.dtype)
            for name, shape in self.spec.tensors().items()
        }

    def x(self, takes: Takes, tensors: Tensors) -> Tensor:
        """Hidden states, or the logits that these values make of them."""
        if takes == "hidden":
            return self.hidden
        return logits_value(self.hidden, self.spec.logits, tensors).exact.to(self.hidden.dtype)

    def judge(self, what: str, answer: Any, takes: Takes, tensors: Tensors) -> Tensor:
        """The answer must be what these values give; returns its ids [T, K]."""
        assert_pair(what, answer)
        weights, ids = answer
        shape = (len(self.hidden), self.spec.routing.top_k)
        ids = compare.numbers(f"{what}: ids", ids, shape, integer=True)
        weights = compare.numbers(f"{what}: weights", weights, shape, integer=False)
        answered = Routing(ids.long(), weights)
        logits = logits_value(self.hidden, self.spec.logits, tensors)
        inputs = RouteInputs(logits.exact.to(self.hidden.dtype), self.spec.routing, tensors)
        judge_routing(what, answered, inputs, logits if takes == "hidden" else None)
        return answered.ids


def value_of(name: str, shape: tuple[int, ...], version: str) -> Tensor:
    """Of one name and shape the same in all routers."""
    seed = f"closure-{name.removeprefix('router.').replace('per_expert_scale', 'expert')}-{version}"
    match name:
        case "router.proj":
            return normal(shape, seed, std=0.5)
        case "router.scale":
            return normal(shape, seed) + 4
        case "router.per_expert_scale":
            return normal(shape, seed) + 0.5
    return normal(shape, seed, std=0.25)


def router_of(case: Case, tokens: int) -> Router:
    """A small router whose values change, in float32 where the case names no dtype."""
    dtype = getattr(torch, case.recipe.get("dtype", "float32"))
    return Router(spec_of(case, dtype), normal((tokens, case["hidden"]), "closure-hidden", dtype))


def spec_of(case: Case, dtype: torch.dtype) -> RouterSpec:
    return RouterSpec(case["logits"], case["routing"], case["experts"], case["hidden"], dtype)


class RealRouter(Router):
    """A router of a model's size, whose values have all the bits of its dtype."""

    def __init__(self, case: Case, given: Collection[str] | None = None) -> None:
        """given: as for experts (suites/experts/inputs.py)."""
        dtype = getattr(torch, case["dtype"])
        hidden = fine((case["tokens"], case["hidden"]), f"{case.id}-hidden", 1.0).to(dtype)
        hidden = given_as(case.recipe.get("arguments", {}), given, "x", hidden)
        super().__init__(spec_of(case, dtype), hidden)
        self.seed = case.id

    def values(self, version: str) -> Tensors:
        found = {}
        for name, shape in self.spec.tensors().items():
            std = {"router.proj": 0.25, "router.scale": 1.0, "router.bias": 1.0}.get(name, 0.25)
            value = fine(shape, f"{self.seed}-{name}-{version}", std)
            # A constant in all selection biases changes nothing, but for a bias that loses its bits.
            value = value + {"router.scale": 8.0, "router.per_expert_scale": 1.5, "router.selection_bias": 8.0}.get(
                name, 0.0
            )
            found[name] = value.to(torch.float32 if name in KEPT_WIDE else self.spec.dtype)
        return found


def tensor_in(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name."""
    path, _, attribute = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(path), attribute)
    return found


def fill(handle: RouterHandle, values: Tensors) -> None:
    """Copy canonical values into the module; under no_grad."""
    for canonical, name in handle.tensors.items():
        tensor_in(handle.module, name).copy_(values[canonical])


def judge_router(engine: Any, router: Router) -> None:
    """Build it, fill it, and judge what it answers for its hidden states."""
    values = router.values("only")
    handle = engine.router_module(router.spec)
    fill(handle, values)
    module = handle.module.requires_grad_(False).eval()
    x = router.x(handle.takes, values)
    router.judge("router", module(to_device(x, engine.info.device)), handle.takes, values)
