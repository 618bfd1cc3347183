"""What records use to say what a layer computes: fields of specs.py, and the keys that decide them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moe_conformance.model.families.bounds import LEAST_EPSILON, MOST_EXPERTS, MOST_LAYERS
from moe_conformance.model.families.keys import Key
from moe_conformance.model.families.scope import Scope

Fields = Mapping[str, Any]

# transformers' names (ACT2FN) of the activations that specs.py knows.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


def activation(name: str = "hidden_act", default: str = "silu") -> Fields:
    return {"activation": Key(name, default, ACTIVATIONS)}


def flag(name: str, default: bool, yes: Any = True, no: Any = False) -> Key:
    return Key(name, default, {True: yes, False: no})


def scale(default: float, *names: str) -> Fields:
    return {"scale": Key(names or "routed_scaling_factor", default)}


def output_scale(default: float, name: str = "routed_scaling_factor") -> Fields:
    return {"output_scale": Key(name, default)}


def norm(default: bool, *names: str) -> Fields:
    return {"renormalize": Key(names or "norm_topk_prob", default, {True: "sum", False: "no"})}


def groups(many: int | None = 1, top: int | None = 1, *names: str) -> Fields:
    """null means one group."""
    return {
        "groups": _groups(names or "n_group", many),
        "top_groups": _groups("topk_group", top),
    }


def _groups(name: str | tuple[str, ...], default: int | None) -> Key:
    return Key(name, default, lambda count: count or 1, least=0, most=MOST_EXPERTS, whole=True)


def count(name: str, default: int, least: int, most: int) -> Key:
    """A key whose value is an integer."""
    return Key(name, default, least=least, most=most, whole=True)


def epsilon(name: str, default: float) -> Key:
    return Key(name, default, least=LEAST_EPSILON, most=1.0)


def bias(name: str = "mlp_bias") -> Fields:
    return {"bias": flag(name, False)}


def norm_eps(default: float) -> Fields:
    return {"norm_eps": epsilon("rms_norm_eps", default)}


def clamped(limit: float) -> Fields:
    return {"clamp": "before", "limit": Key("swiglu_limit", limit, most=math.inf)}


def limits(name: str) -> Fields:
    """A limit for each layer; 0, null and infinity mean no limit."""
    return {
        "clamp": Key(name, None, lambda entry: "after" if entry else "no", per_layer=True, most=math.inf),
        "limit": Key(name, None, lambda entry: entry or math.inf, per_layer=True, most=math.inf),
    }


def score(default: str) -> Fields:
    return {"score": Key("scoring_func", default, {"sigmoid": "sigmoid", "sqrtsoftplus": "sqrt_softplus"})}


def dense_width(scope: Scope, layer: int) -> int:
    return scope.integer("dense width", ("intermediate_size",))


def gemma4_width(scope: Scope, layer: int) -> int:
    """Twice as wide in the last layers, which share keys and values with others, if the config says so."""
    sharing = scope.optional("layers that share keys and values", "num_kv_shared_layers", 0)
    last = layer >= scope.integer("layers", ("num_hidden_layers",), most=MOST_LAYERS) - sharing
    return dense_width(scope, layer) * (2 if last and scope.flag("dense width", "use_double_wide_mlp") else 1)


def top_k(scope: Scope, layer: int) -> int:
    return scope.integer("top-k", ("num_experts_per_tok",), most=MOST_EXPERTS)


def is_hashed(scope: Scope, layer: int) -> bool:
    """DeepSeek-V4: the first layers choose by token id."""
    types = scope.get("mlp_layer_types")
    if types is None:
        return layer < scope.optional("layers", "num_hash_layers", 3)
    total = scope.integer("layers", ("num_hidden_layers", "n_layers"), most=MOST_LAYERS)
    return bool(scope.for_each_layer("layers", "mlp_layer_types", types, total)[layer] == "hash_moe")


INPUT = {"score_dtype": "input"}
FLOAT32 = {"dtype": "float32"}
BIASED = {"selection_bias": True}
ALWAYS = {"renormalize": "sum"}
CHOSEN = {"select_on": "logits"}  # the best logits are chosen, and only they are scored
SIGMOID = {"score": "sigmoid", **BIASED, **ALWAYS}
SIGMOID_EPS = {**SIGMOID, "epsilon": 1e-20}
PAIRS = {"group_score": "top2_sum"}  # a group's two best
SOFTMAX_PAIRS = {**groups(), **PAIRS, "group_mask": 0.0, "epsilon": 1e-20, **scale(1.0)}
SWIGLU_OAI = {**clamped(7.0), "alpha": Key("swiglu_alpha", 1.702), "up_offset": 1.0}


def noaux(factor: float | None, many: int = 1, top: int = 1, normed: bool = True) -> Fields:
    """DeepSeek-V3: sigmoid, a selection bias, the best groups, renormalised by key, scaled unless factor is None."""
    scaled = {} if factor is None else scale(factor)
    return {**SIGMOID_EPS, **norm(normed), **groups(many, top), **PAIRS, **scaled}
