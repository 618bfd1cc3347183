"""Releases of a router that was wrong at first, and the adapter that asks whichever of them is installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from moe_conformance.engine import Engine, EngineInfo, RouteInputs, Routing, Unsupported

_ROUTE = """
def route(logits, top_k, renormalize):
    weights, ids = logits.float().softmax(-1).topk(top_k)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids
"""
_WRONG = _ROUTE.replace("if renormalize", "if True")
RELEASES = {"0.18.0": _ROUTE, "0.19.0": _WRONG, "0.19.1": _WRONG, "0.21.0": _WRONG, "0.22.0": _ROUTE, "0.22.1rc1": ""}


class Tiny(Engine):
    """Of vLLM's place."""

    name = "tiny"
    module = "vllm"
    info = EngineInfo("tiny", "1", "cpu")

    def capabilities(self) -> dict[str, set[str]]:  # type: ignore[override]
        return {"route": {"softmax", "renormalize", "not_renormalized"}}

    def route(self, inputs: RouteInputs) -> Routing:
        spec: Any = inputs.routing
        if spec.renormalize == "norm":
            raise Unsupported("no norms")
        weights, ids = import_module(self.module).route(inputs.logits, spec.top_k, spec.renormalize == "sum")
        return Routing(ids, weights)


class TinyOther(Tiny):
    """Of SGLang's place."""

    module = "sglang"
