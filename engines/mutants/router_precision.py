"""Routers that compute logits, scores or weights in fewer bits than the model does, on some of their ways."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moe_conformance.engine import RouteInputs, RouterHandle, RouterSpec, Routing
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.engines.mutants.routing_semantics import ROUTER, _but
from moe_conformance.reference_impl.router import Router, build_router

if TYPE_CHECKING:
    from torch import Tensor

BITS = "scores_keep_their_bits"


class ScoresInLogitsDtype(Faulty):
    """vLLM's torch routing of Gemma 4, where there is no Triton, has softmax in the dtype of the logits."""

    def route(self, inputs: RouteInputs) -> Routing:
        ids, weights = super().route(inputs)
        if not inputs.routing.per_expert_scale:
            return Routing(ids, weights)
        named = ids.clamp(min=0)  # -1 in padding rows
        weights = inputs.logits.softmax(-1).gather(-1, named)
        weights = weights / weights.sum(-1, keepdim=True) * inputs.tensors["router.per_expert_scale"][named]
        return Routing(ids, weights.float())


class SigmoidInLogitsDtype(Faulty):
    def route(self, inputs: RouteInputs) -> Routing:
        narrow = inputs.routing.score == "sigmoid" and inputs.routing.select_on == "scores"
        ids, weights = super().route(_but(inputs, score_dtype="input") if narrow else inputs)
        return Routing(ids, weights.float() if narrow else weights)


class LogitsInInputPrecision(Faulty):
    """The projection runs in bfloat16 where the model computes it in float32."""

    def router_module(self, spec: RouterSpec) -> RouterHandle:
        return super().router_module(replace(spec, logits=replace(spec.logits, dtype="input")))


class ScoresOfTheModelsDtype(Faulty):
    """Logits in float32 are handed to the routing function in the model's dtype."""

    def router_module(self, spec: RouterSpec) -> RouterHandle:
        handle = build_router(spec)
        handle.module.__class__ = _NarrowLogits
        assert isinstance(handle.module, _NarrowLogits)
        handle.module.experts.routing_function = handle.module.select
        return handle


class _NarrowLogits(Router):
    def select(self, logits: Tensor, **batch: Any) -> Routing:
        return super().select(logits.to(self.spec.dtype).to(logits.dtype), **batch)


class OneTokenInLogitsDtype(Faulty):
    """The kernel for decoding has its softmax in the dtype of the logits."""

    def route(self, inputs: RouteInputs) -> Routing:
        spec = inputs.routing
        if len(inputs.logits) != 1 or spec.score != "softmax" or spec.selector != "topk" or spec.capacity:
            return super().route(inputs)
        ids, weights = super().route(_but(inputs, score_dtype="input"))
        return Routing(ids, weights.float())


class BiasStoredNarrow(Faulty):
    """The selection bias takes the dtype of the logits, as `model.to(dtype)` makes it."""

    def route(self, inputs: RouteInputs) -> Routing:
        bias = inputs.tensors.get("router.selection_bias")
        if bias is None or inputs.logits.itemsize == 4:
            return super().route(inputs)
        narrow = bias.to(inputs.logits.dtype).float()
        return super().route(replace(inputs, tensors={**inputs.tensors, "router.selection_bias": narrow}))


class ManyTokensInHalf(Faulty):
    """Beyond 64 tokens float32 logits pass through float16."""

    def route(self, inputs: RouteInputs) -> Routing:
        if len(inputs.logits) <= 64 or inputs.logits.abs().max() > 60000 or inputs.routing.selection_bias:
            return super().route(inputs)
        return super().route(replace(inputs, logits=inputs.logits.half().to(inputs.logits.dtype)))


class ScoresStoredForSelection(Faulty):
    """Weights are float32; what experts are chosen by is stored in two bytes, where there are no groups."""

    def route(self, inputs: RouteInputs) -> Routing:
        spec = inputs.routing
        if spec.selector != "topk" or spec.groups > 1 or spec.capacity or spec.select_on != "scores":
            return super().route(inputs)
        if inputs.logits.itemsize == 4 or spec.score_dtype == "input" or not spec.selection_bias:
            return super().route(inputs)
        bias = inputs.tensors["router.selection_bias"]
        chosen = (inputs.logits.float().sigmoid() + bias).to(inputs.logits.dtype).topk(spec.top_k).indices
        ids, weights = super().route(inputs)
        if spec.score != "sigmoid" or ids.shape[1] != spec.top_k:
            return Routing(ids, weights)
        given = inputs.logits.float().sigmoid().gather(1, chosen)
        return Routing(chosen, given / (given.sum(-1, keepdim=True) + spec.epsilon) * spec.scale)


class OneTokenProjectedNarrow(Faulty):
    """With one token the projection is a product of the model's dtype, for which there is a faster kernel."""

    def router_module(self, spec: RouterSpec) -> RouterHandle:
        handle = build_router(spec)
        handle.module.__class__ = _NarrowForOne
        return handle


class _NarrowForOne(Router):
    def forward(self, hidden: Tensor, *, state: Tensor | None = None, **batch: Any) -> tuple[Tensor, Tensor]:
        weights, ids = super().forward(hidden, state=state, **batch)
        if len(hidden) != 1 or self.spec.logits.dtype != "float32":
            return weights, ids
        narrow = Router(replace(self.spec, logits=replace(self.spec.logits, dtype="input"))).to(hidden.device)
        narrow.load_state_dict(self.state_dict())
        found: tuple[Tensor, Tensor] = narrow(hidden, state=state, **batch)
        return found


# Narrow scores are wrong weights wherever logits are narrow.
_ALSO = frozenset({"routing-semantics", "dtype-stride-arguments", "shared-experts"})

MUTANTS = tuple(
    Mutant(engine, "router-precision", fault, (case, check), _ALSO | frozenset(also))
    for engine, fault, case, check, also in (
        (ScoresInLogitsDtype, "softmax runs in bfloat16", "route-gemma4-e128-k8-t1-bf16-close", BITS, ()),
        (SigmoidInLogitsDtype, "sigmoids run in bfloat16", "route-biased-e256-k8-t9-bf16-normal-sliced", BITS, ()),
        (OneTokenInLogitsDtype, "one token's softmax is narrow", "route-plain-e128-k8-t1-bf16-close", BITS, ()),
        (BiasStoredNarrow, "the selection bias is narrow", "route-deepseek-v3-e256-k8-t1-bf16-close", BITS, ()),
        (ManyTokensInHalf, "many tokens' logits pass through float16", "route-renorm-e128-k8-t65-fp32-close", BITS, ()),
        (ScoresStoredForSelection, "selection is narrow", "route-biased-e128-k8-t1-bf16-close", BITS, ()),
        (
            LogitsInInputPrecision,
            "logits are computed in bfloat16",
            "router-biased-e256-k8-bf16",
            ROUTER,
            ("closure-capture",),
        ),
        (
            ScoresOfTheModelsDtype,
            "logits are rounded to bfloat16",
            "router-deepseek-v3-e256-k8-bf16",
            ROUTER,
            ("closure-capture",),
        ),
        (
            OneTokenProjectedNarrow,
            "one token's logits are computed narrow",
            "router-deepseek-v3-e128-k8-one-token-bf16",
            ROUTER,
            (),
        ),
    )
)
