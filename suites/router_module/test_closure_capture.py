"""A router's routing function must not keep what its module held when it was built (vllm#42250)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import RouterHandle, RouterSpec
from moe_conformance.errors import Unsupported
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import normal
from moe_conformance.oracle.tolerance import Bound, softmax_weights, unit_roundoff
from moe_conformance.suites.router_module.cases import CLOSURE_CASES

TOKENS, HIDDEN, EXPERTS, TOP_K, EPS = 5, 24, 7, 3, 1e-6

Tensors = dict[str, Tensor]


def values(method: str, version: str) -> Tensors:
    """Canonical tensors of a router, another set for each version; scales of both signs and none of them 1."""
    tensors = {"proj": normal((EXPERTS, HIDDEN), f"closure-proj-{version}", std=0.5)}
    if method == "gemma4":
        tensors["scale"] = normal((HIDDEN,), f"closure-scale-{version}") + 4
        tensors["per_expert_scale"] = normal((EXPERTS,), f"closure-expert-{version}") + 0.5
    return tensors


def logits_of(method: str, tensors: Tensors, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Router logits [T, E] in float64, and a bound on their error in a float32 module."""
    x = hidden.double()
    if method == "gemma4":
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * tensors["scale"].double() * HIDDEN**-0.5
    logits, magnitude = (
        nn.functional.linear(x, tensors["proj"].double()),
        nn.functional.linear(x.abs(), tensors["proj"].double().abs()),
    )
    # The dot product's H roundings, and H + 6 for the mean of squares, root, quotient and two scalings of each x.
    return logits, magnitude * (2 * HIDDEN + 6) * unit_roundoff(torch.float32)


def judge(what: str, method: str, answer: Any, hidden: Tensor, tensors: Tensors) -> list[str]:
    """The answer must be what these values give; returns the chosen experts of each row, as "1 4 6"."""
    weights, ids = answer
    compare.shape_and_type(f"{what}: ids", ids, (TOKENS, TOP_K), integer=True)
    compare.shape_and_type(f"{what}: weights", weights, (TOKENS, TOP_K), integer=False)
    logits, error = logits_of(method, tensors, hidden)
    compare.chosen(f"{what}: ids", ids, logits, error.amax(-1, keepdim=True))
    ids = ids.detach().cpu().long()
    want = logits.softmax(-1).gather(-1, ids)
    if method != "softmax_topk":
        want = want / want.sum(-1, keepdim=True)
    if method == "gemma4":
        want = want * tensors["per_expert_scale"].double()[ids]
    roundings = softmax_weights(logits, TOP_K) * unit_roundoff(torch.float32)
    # d log w = dl - sum of w dl: an error e in every logit changes a weight by at most a factor exp(2 e), twice where
    # a second normalisation follows.
    limit = want.abs() * (roundings + 4 * error.amax(-1, keepdim=True)) + torch.finfo(torch.float32).tiny
    compare.close(
        f"{what}: weights", weights, want, Bound(limit, "softmax roundings in float32 plus the logits' error")
    )
    return [" ".join(map(str, row)) for row in ids.sort(-1).values.tolist()]


class Subject:
    """A built router with its values set, and x as this engine's router takes it."""

    def __init__(self, engine: Any, case: Case) -> None:
        self.method, tensor = case["method"], case["tensor"]
        spec = RouterSpec(self.method, EXPERTS, TOP_K, HIDDEN, torch.float32, EPS)
        self.build: Callable[[], RouterHandle] = lambda: engine.router_module(spec)
        self.handle = self.build()
        if tensor not in self.handle.tensors:
            raise Unsupported(f"this router takes {self.handle.takes} and has no tensor {tensor}")
        self.device = torch.device(engine.info.device)
        self.module = self.handle.module.requires_grad_(False)
        self.hidden = normal((TOKENS, HIDDEN), "closure-hidden")
        self.old = values(self.method, "old")
        self.new = {**self.old, tensor: values(self.method, "new")[tensor]}
        self.name, self.value = self.handle.tensors[tensor], self.new[tensor].to(self.device)
        for canonical, name in self.handle.tensors.items():
            self.module.get_parameter(name).copy_(self.old[canonical])
        self.module.eval()  # as for inference: what a module folds then must not stay either

    def x(self, tensors: Tensors) -> Tensor:
        """Hidden states, or the logits that these values make of them."""
        if self.handle.takes == "hidden":
            return self.hidden.to(self.device)
        return logits_of(self.method, tensors, self.hidden)[0].float().to(self.device)

    def state(self) -> Tensors:
        return {**self.module.state_dict(), self.name: self.value.clone()}


def functional_call(s: Subject, x: Tensor) -> Any:
    return torch.func.functional_call(s.module, {s.name: s.value}, (x,))


def replaced_parameter(s: Subject, x: Tensor) -> Any:
    path, _, attribute = s.name.rpartition(".")
    setattr(s.module.get_submodule(path), attribute, nn.Parameter(s.value, requires_grad=False))
    return s.module(x)


def in_place_update(s: Subject, x: Tensor) -> Any:
    s.module.get_parameter(s.name).copy_(s.value)
    return s.module(x)


def data_swap(s: Subject, x: Tensor) -> Any:
    s.module.get_parameter(s.name).data = s.value
    return s.module(x)


def data_copy(s: Subject, x: Tensor) -> Any:
    """As weight loaders do: neither the Parameter nor its address nor its version counter changes."""
    s.module.get_parameter(s.name).data.copy_(s.value)
    return s.module(x)


def load_state_dict(s: Subject, x: Tensor) -> Any:
    s.module.load_state_dict(copy.deepcopy(s.module.state_dict()))  # a later load counts, too
    s.module(x)
    s.module.load_state_dict(s.state())
    s.module(x)
    s.module.load_state_dict(s.state())  # loading twice equals loading once
    return s.module(x)


def load_state_dict_assign(s: Subject, x: Tensor) -> Any:
    s.module.load_state_dict(s.state(), assign=True)
    return s.module(x)


def to_dtype(s: Subject, x: Tensor) -> Any:
    s.module.get_parameter(s.name).copy_(s.value)
    return s.module.to(torch.float64)(x.double())


def to_dtype_overwrite(s: Subject, x: Tensor) -> Any:
    """As `.to()` will behave: every Parameter becomes a new object."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        s.module.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    s.module.get_parameter(s.name).copy_(s.value)
    return s.module(x.double())


def deepcopy(s: Subject, x: Tensor) -> Any:
    """The copy answers with its own values, and the original keeps its own."""
    twin = copy.deepcopy(s.module)
    twin.get_parameter(s.name).copy_(s.value)
    answer = twin(x)
    judge("the original after its copy was changed", s.method, s.module(s.x(s.old)), s.hidden, s.old)
    return answer


def another_router(s: Subject, x: Tensor) -> Any:
    """A model has a router in every layer: each answers with its own values, whichever was built last."""
    other = s.build()
    module = other.module.requires_grad_(False)
    for canonical, name in other.tensors.items():
        module.get_parameter(name).copy_(s.new[canonical])
    answer = module.eval()(x)
    judge("the first router after another was built", s.method, s.module(s.x(s.old)), s.hidden, s.old)
    return answer


def from_meta(s: Subject, x: Tensor) -> Any:
    state = s.state()
    s.module.to("meta").to_empty(device=s.device)
    s.module.load_state_dict(state)
    return s.module(x)


def compiled(s: Subject, x: Tensor) -> Any:
    compiled_module: Callable[[Tensor], Any] = torch.compile(s.module, backend="aot_eager")
    judge("the compiled router before the change", s.method, compiled_module(s.x(s.old)), s.hidden, s.old)
    s.module.get_parameter(s.name).copy_(s.value)
    return compiled_module(x)


def compiled_functional_call(s: Subject, x: Tensor) -> Any:
    call = torch.compile(
        lambda value, y: torch.func.functional_call(s.module, {s.name: value}, (y,)), backend="aot_eager"
    )
    old = s.module.get_parameter(s.name).detach().clone()
    judge("the compiled call with the old value", s.method, call(old, s.x(s.old)), s.hidden, s.old)
    return call(s.value, x)


CHANGES: dict[str, Callable[[Subject, Tensor], Any]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        functional_call,
        replaced_parameter,
        in_place_update,
        data_swap,
        data_copy,
        load_state_dict,
        load_state_dict_assign,
        to_dtype,
        to_dtype_overwrite,
        deepcopy,
        another_router,
        from_meta,
        compiled,
        compiled_functional_call,
    )
}


@check(CLOSURE_CASES)
@torch.no_grad()
def test_routing_uses_the_values_at_call_time(engine: Any, case: Case) -> dict[str, list[str]]:
    """Build a router, use it, give one tensor new values in one way: the answer is what the new values give."""
    torch.compiler.reset()
    s = Subject(engine, case)
    judge("before the change", s.method, s.module(s.x(s.old)), s.hidden, s.old)
    answer = CHANGES[case["change"]](s, s.x(s.new))
    return {"experts": judge(f"after the {case['change']} of {case['tensor']}", s.method, answer, s.hidden, s.new)}


@check(case for case in CLOSURE_CASES if "functional-call" in case["change"])
@torch.no_grad()
def test_a_functional_call_leaves_the_module_as_it_was(engine: Any, case: Case) -> None:
    torch.compiler.reset()
    s = Subject(engine, case)
    CHANGES[case["change"]](s, s.x(s.new))
    judge("after the functional call", s.method, s.module(s.x(s.old)), s.hidden, s.old)
