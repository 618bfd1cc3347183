"""Reads and replaces a block's routing, between its router and its experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from moe_conformance.engine import Routing, called_by_engine
from moe_conformance.errors import Unsupported


class Tap:
    """Within this context the block's experts get `given`, if any, instead of their router's answer. `seen`: what they
    got.

    Most experts are called with ids and weights. The routers of four families answer in other forms and are tapped
    themselves. doge has no module in between. native: ids are passed on unchanged. stop: nothing runs after the tap.
    """

    def __init__(self, moe: Any, given: Routing | None, native: bool = False, stop: bool = False) -> None:
        self.moe, self.stop = moe, stop
        self.given = given if given is None or native else in_own_words(moe, given)
        self.seen: Routing | None = None
        self.handle: Any = None

    def __enter__(self) -> Tap:
        router, experts = getattr(self.moe, "router", None), getattr(self.moe, "experts", None)
        form = FORMS.get(type(router).__name__)
        if router is not None and form is not None:
            self.handle = router.register_forward_hook(partial(self._after_router, form))
        elif experts is not None:
            self.handle = experts.register_forward_pre_hook(self._before_experts)
            if self.given is not None:
                allow_no_expert(experts, self.given.ids)
        elif self.given is not None or self.stop:
            raise Unsupported(f"{type(self.moe).__name__} has no place where a routing can be seen or put in")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        if self.handle is not None:
            self.handle.remove()
        return kind is _Stopped

    @called_by_engine
    def _before_experts(self, module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, ids, weights = args
        if self.given is not None:
            ids, weights = self.given.ids, self.given.weights.to(weights.dtype)
        self._note(Routing(ids, weights))
        return hidden, ids, weights

    @called_by_engine
    def _after_router(self, form: type[Dense], module: Any, args: Any, output: Any) -> Any:
        answer = form(module, output)
        self._note(answer.read())
        return output if self.given is None else answer.written(self.given)

    def _note(self, seen: Routing) -> None:
        self.seen = seen
        if self.stop:
            raise _Stopped


class _Stopped(Exception):
    """Leaves the block once its routing is seen."""


def in_own_words(moe: Any, given: Routing) -> Routing:
    """The routing with "no expert" as transformers' parallel plans express it: the id E, weight 0."""
    owners = (getattr(moe, "experts", None), getattr(moe, "router", None), moe)
    counts = (getattr(owner, name, None) for name in ("total_experts", "num_experts") for owner in owners)
    count = next(count for count in counts if isinstance(count, int))
    none = given.ids < 0
    return Routing(given.ids.masked_fill(none, count), given.weights.masked_fill(none, 0.0))


def allow_no_expert(experts: Any, ids: Tensor) -> None:
    """Only parallel plans use the id E; experts that check for such a plan are told that there is one."""
    experts._is_expert_parallel = getattr(experts, "num_experts", None) in ids.unique().tolist()


class Dense:
    """llama4: (scores [T, E], logits), scores 0 where an expert is not chosen."""

    def __init__(self, router: Any, output: Any) -> None:
        self.router, self.output = router, output

    def read(self) -> Routing:
        weights, ids = self.output[0].topk(self.router.top_k, dim=-1)
        return Routing(ids, weights)

    def spread(self, given: Routing, like: Tensor) -> Tensor:
        """[T, E] of weights, each at its id; id E falls off."""
        room = like.new_zeros(like.shape[0], self.router.num_experts + 1)
        return room.scatter_(1, given.ids, given.weights.to(like.dtype))[:, :-1]

    def written(self, given: Routing) -> Any:
        return self.spread(given, self.output[0]), self.output[1]


class Switch(Dense):
    """switch_transformers: (one-hot ids [B, S, E], 0 where dropped; probability [B, S, 1]; logits)."""

    def read(self) -> Routing:
        hit, probability, _ = (tensor.flatten(0, 1) for tensor in self.output)
        return Routing(hit.argmax(-1, keepdim=True), probability * hit.sum(-1, keepdim=True))

    def written(self, given: Routing) -> Any:
        hit, probability, logits = self.output
        mask = one_hot(given.ids, self.router.num_experts + 1)[:, 0, :-1]
        return mask.view_as(hit), given.weights.to(probability.dtype).view_as(probability), logits


class Nllb(Dense):
    """nllb_moe: (one-hot first ids [T, E], weights [T, E], logits)."""

    def read(self) -> Routing:
        weights, ids = self.output[1].topk(2, dim=-1)
        return Routing(ids, weights)

    def written(self, given: Routing) -> Any:
        first, weights, logits = self.output
        mask = one_hot(given.ids[:, 0], self.router.num_experts + 1)[:, :-1]
        return mask.to(first.dtype), self.spread(given, weights), logits


class Sorted(Dense):
    """jetmoe: (pairs sorted by expert, their tokens, their weights, pairs of each expert, logits)."""

    def read(self) -> Routing:
        order, _, weights, counts, _ = self.output
        experts = torch.repeat_interleave(
            torch.arange(len(counts), device=order.device), torch.tensor(counts, device=order.device)
        )
        ids, unsorted = torch.empty_like(order), torch.empty_like(weights)
        ids[order], unsorted[order] = experts, weights
        return Routing(ids.view(-1, self.router.top_k), unsorted.view(-1, self.router.top_k))

    def written(self, given: Routing) -> Any:
        flat = given.ids.flatten()
        order = flat.argsort(stable=True)
        order = order[flat[order] < self.router.num_experts]
        counts = flat.bincount(minlength=self.router.num_experts)[: self.router.num_experts].tolist()
        weights = given.weights.to(self.output[2].dtype).flatten()
        return order, order // given.ids.shape[1], weights[order], counts, self.output[4]


FORMS: dict[str, type[Dense]] = {
    "Llama4Router": Dense,
    "SwitchTransformersTop1Router": Switch,
    "NllbMoeTop2Router": Nllb,
    "JetMoeTopKGating": Sorted,
}
