"""A router's routing function must not keep what its module held when it was built (vllm#42250)."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import RouterHandle
from moe_conformance.errors import Unsupported
from moe_conformance.suites.router_module.cases import CLOSURE_CASES
from moe_conformance.suites.router_module.routers import Router, Tensors, fill, router_of, tensor_in

TOKENS = 5


class Subject:
    """A built router with its values set, and x as this engine's router takes it."""

    def __init__(self, engine: Any, case: Case) -> None:
        self.router: Router = router_of(case, TOKENS)
        self.build: Callable[[], RouterHandle] = lambda: engine.router_module(self.router.spec)
        self.handle = self.build()
        if case["tensor"] not in self.handle.tensors:
            raise Unsupported(f"router_module: this router takes {self.handle.takes} and has no {case['tensor']}")
        self.device = torch.device(engine.info.device)
        self.module = self.handle.module.requires_grad_(False)
        self.old = self.router.values("old")
        self.new = {**self.old, case["tensor"]: self.router.values("new")[case["tensor"]]}
        self.name = self.handle.tensors[case["tensor"]]
        self.value = self.new[case["tensor"]].to(self.device)
        fill(self.handle, self.old)
        self.module.eval()  # as for inference: what a module folds then must not stay either

    @property
    def tensor(self) -> Tensor:
        """The parameter or buffer as the module has it now."""
        return tensor_in(self.module, self.name)

    def x(self, tensors: Tensors) -> Tensor:
        """Hidden states, or the logits that these values make of them."""
        return self.router.x(self.handle.takes, tensors).to(self.device)

    def state(self) -> Tensors:
        return {**self.module.state_dict(), self.name: self.value.clone()}

    def judge(self, what: str, answer: Any, tensors: Tensors) -> list[str]:
        """The answer must be what these values give; returns the chosen experts of each row, as "1 4 6"."""
        ids = self.router.judge(what, answer, self.handle.takes, tensors)
        return [" ".join(map(str, row)) for row in ids.sort(-1).values.tolist()]


def functional_call(s: Subject, x: Tensor) -> Any:
    return torch.func.functional_call(s.module, {s.name: s.value}, (x,))


def replaced_parameter(s: Subject, x: Tensor) -> Any:
    path, _, attribute = s.name.rpartition(".")
    is_parameter = isinstance(s.tensor, nn.Parameter)
    value = nn.Parameter(s.value, requires_grad=False) if is_parameter else s.value
    setattr(s.module.get_submodule(path), attribute, value)
    return s.module(x)


def in_place_update(s: Subject, x: Tensor) -> Any:
    s.tensor.copy_(s.value)
    return s.module(x)


def data_swap(s: Subject, x: Tensor) -> Any:
    s.tensor.data = s.value
    return s.module(x)


def data_copy(s: Subject, x: Tensor) -> Any:
    """As weight loaders do: neither the Parameter nor its address nor its version counter changes."""
    s.tensor.data.copy_(s.value)
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
    s.tensor.copy_(s.value)
    return s.module.to(torch.float64)(x.double())


def to_dtype_overwrite(s: Subject, x: Tensor) -> Any:
    """As `.to()` will behave: every Parameter becomes a new object."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        s.module.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    s.tensor.copy_(s.value)
    return s.module(x.double())


def deepcopy(s: Subject, x: Tensor) -> Any:
    """The copy answers with its own values, and the original keeps its own."""
    twin = copy.deepcopy(s.module)
    tensor_in(twin, s.name).copy_(s.value)
    answer = twin(x)
    s.judge("the original after its copy was changed", s.module(s.x(s.old)), s.old)
    return answer


def another_router(s: Subject, x: Tensor) -> Any:
    """A model has a router in every layer: each answers with its own values, whichever was built last."""
    other = s.build()
    module = other.module.requires_grad_(False)
    fill(other, s.new)
    answer = module.eval()(x)
    s.judge("the first router after another was built", s.module(s.x(s.old)), s.old)
    return answer


def from_meta(s: Subject, x: Tensor) -> Any:
    state = s.state()
    s.module.to("meta").to_empty(device=s.device)
    s.module.load_state_dict(state)
    return s.module(x)


def compiled(s: Subject, x: Tensor) -> Any:
    compiled_module: Callable[[Tensor], Any] = torch.compile(s.module, backend="aot_eager")
    s.judge("the compiled router before the change", compiled_module(s.x(s.old)), s.old)
    s.tensor.copy_(s.value)
    return compiled_module(x)


def compiled_functional_call(s: Subject, x: Tensor) -> Any:
    call = torch.compile(
        lambda value, y: torch.func.functional_call(s.module, {s.name: value}, (y,)), backend="aot_eager"
    )
    old = s.tensor.detach().clone()
    s.judge("the compiled call with the old value", call(old, s.x(s.old)), s.old)
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


def forget_compiled() -> None:
    """A call compiled for one case says nothing about the next. Dynamo, a second to import, is not loaded for it."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@check(CLOSURE_CASES)
@torch.no_grad()
def test_routing_uses_the_values_at_call_time(engine: Any, case: Case) -> dict[str, list[str]]:
    """Build a router, use it, give one tensor new values in one way: the answer is what the new values give."""
    forget_compiled()
    s = Subject(engine, case)
    s.judge("before the change", s.module(s.x(s.old)), s.old)
    answer = CHANGES[case["change"]](s, s.x(s.new))
    return {"experts": s.judge(f"after the {case['change']} of {case['tensor']}", answer, s.new)}


@check(case for case in CLOSURE_CASES if "functional-call" in case["change"])
@torch.no_grad()
def test_a_functional_call_leaves_the_module_as_it_was(engine: Any, case: Case) -> None:
    forget_compiled()
    s = Subject(engine, case)
    CHANGES[case["change"]](s, s.x(s.new))
    s.judge("after the functional call", s.module(s.x(s.old)), s.old)
