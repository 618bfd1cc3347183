"""From a case to the inputs of a block: hashed values of a size at which no part of the layer hides."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import cache

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import BlockInputs, Routing
from moe_conformance.judging.draws import salt
from moe_conformance.judging.inputs import bits, integers, normal
from moe_conformance.judging.layouts import given_as
from moe_conformance.model.specs import LayerSpec, Shape
from moe_conformance.suites.block.configs import VARIANTS, spec_of

# Spread of a selection bias: about that of the scores it is added to.
BIAS_STD = {"softmax": 2.0**-4, "sigmoid": 2.0**-2, "sqrt_softplus": 2.0**-1}


def tensors_of(slug: str, version: str = "") -> dict[str, Tensor]:
    """Canonical tensors in float64, exact in every dtype; of one name, size and version the same in all families."""
    spec = spec_of(slug)
    found = {
        name: tensor(name, shape, spec.num_experts, bias_std(spec), version) for name, shape in spec.tensors().items()
    }
    if bias := VARIANTS[slug].block.bias:
        found["router.selection_bias"] = torch.tensor(bias, dtype=torch.float64)
    return found


def bias_std(spec: LayerSpec) -> float:
    return 0.5 if spec.routing.select_on == "logits" else BIAS_STD[spec.routing.score]


def tensor(name: str, shape: Shape, experts: int, selection_bias_std: float, version: str = "") -> Tensor:
    """Weights spread so that what they make is about 1.5 in size; norms and scales vary around one."""
    return _tensor(salt(), name, shape, experts, selection_bias_std, version)


@cache
def _tensor(salted: str, name: str, shape: Shape, experts: int, selection_bias_std: float, version: str) -> Tensor:
    seed, part = f"family-{name}{version}", name.rpartition(".")[2]
    if name == "router.table":
        return bits((*shape[:-1], experts), seed).argsort(dim=-1)[..., : shape[-1]]
    if name == "router.selection_bias":
        return normal(shape, seed, torch.float64, selection_bias_std)
    if name in ("latent.norm", "experts.output_norm"):  # added to 1 by the layer
        return normal(shape, seed, torch.float64, 0.25)
    if name == "router.scale":  # over sqrt(H) in the layer
        return normal(shape, seed, torch.float64, 8.0)
    if "norm" in part or "scale" in part:
        return 1.25 + normal(shape, seed, torch.float64, 0.25)
    if "bias" in part or part in ("b1", "b13", "b2"):
        return normal(shape, seed, torch.float64, 0.5)
    return normal(shape, seed, torch.float64, 2.0 ** round(math.log2(1.3 / math.sqrt(shape[-1]))))


def inputs_of(case: Case, given: Collection[str] | None = None) -> BlockInputs:
    """The case's inputs, in its dtype, on the CPU. given: as for experts (suites/experts/inputs.py)."""
    family, spec, dtype = VARIANTS[case["family"]], spec_of(case["family"]), getattr(torch, case["dtype"])
    kept = {"router.selection_bias": torch.float32, "router.table": torch.int64}
    state = spec.logits.takes_state and family.block.state
    tensors, x = tensors_of(case["family"]), normal((*case["shape"], spec.hidden_size), f"family-{case['x']}")
    x = x * case.recipe.get("times", 1.0)
    if case["sum"]:
        # A hidden dim that is 1 in all tokens, and the same in all rows of the projection, moves all logits alike.
        tensors, x = {**tensors, "router.proj": tensors["router.proj"].clone()}, x.clone()
        x[..., 0], tensors["router.proj"][:, 0] = 1.0, logit_of(case["sum"], spec)
    return BlockInputs(
        config=dict(family.config),
        layer=family.block.layer,
        tensors={name: t.to(kept.get(name, dtype)) for name, t in tensors.items()},
        x=given_as(case.recipe.get("arguments", {}), given, "x", x.to(dtype)),
        token_ids=integers(case["shape"], "family-tokens", spec.vocab_size) if family.block.token_ids else None,
        state=normal((*case["shape"], spec.logits.width), "family-state", dtype) if state else None,
        routing=routing_of(case, spec),
        implementation=case["implementation"],
        native_ids=case["native_ids"],
    )


def logit_of(score: float, spec: LayerSpec) -> float:
    """The logit, a whole number, whose score is about that small; sigmoid and softplus are exp there."""
    power = 2 if spec.routing.score == "sqrt_softplus" else 1
    return float(round(power * math.log(score) / spec.routing.logit_scale))


def routing_of(case: Case, spec: LayerSpec) -> Routing | None:
    """ids and weights, which are exact in bfloat16, differ, and sum to anything but 1.

    spread: K different experts a token, the fourth never; same: the same K for all; zero: no weight at all. A third of
    the pairs has the id -1: dropped, with weight 0; minus-one, with their weights; beyond, with them and the id E.
    """
    kind: str = case["routing"]
    if not kind:
        return None
    tokens, experts, top_k = math.prod(case["shape"]), spec.num_experts, spec.routing.top_k
    order = bits((tokens, experts), "family-ids").argsort(dim=-1)
    ids = order[order != 3].view(tokens, experts - 1)[:, :top_k]
    weights = integers((tokens, top_k), "family-weights", 16, low=1).float() / 8
    if kind == "same":
        ids = ids[:1].expand(tokens, top_k).contiguous()
    elif kind in ("dropped", "minus-one", "beyond"):
        gone = integers((tokens, top_k), "family-dropped", 3) == 0
        ids = ids.masked_fill(gone, experts + spec.routing.identity_experts if kind == "beyond" else -1)
        weights = weights.masked_fill(gone, 0.0) if kind == "dropped" else weights
    elif kind == "zero":
        weights = weights * 0
    elif spec.routing.identity_experts:
        ids = torch.where(ids == 5, experts + 1, ids)  # an identity expert among the others
    return Routing(ids, weights)
