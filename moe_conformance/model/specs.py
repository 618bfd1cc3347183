"""What one Mixture-of-Experts layer computes, as data: from router input to layer output, and the tensors it takes.

Letters as in engine.py: T tokens, E experts, K experts per token, H hidden, F expert intermediate, D the width the
experts work in. Formulas and their families: transformers 5.23. This module imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal

Precision = Literal["float32", "input"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class LogitsSpec:
    """How the router makes logits [T, classes] of its input [T, H].

    kind: "linear"; "gemma4", linear after rms_norm(x) * scale / sqrt(H); "zaya", an MLP of width `width` whose first
    projection is added to that of the previous MoE layer.
    bias: of the projection. dtype: in which the projection is computed, whatever the weights are stored in.
    """

    kind: Literal["linear", "gemma4", "zaya"] = "linear"
    bias: bool = False
    dtype: Precision = "input"
    norm_eps: float = 1e-6
    width: int = 0
    takes_state: bool = False


@dataclass(frozen=True)
class Capacity:
    """How many tokens one expert takes; later ones are dropped (weight 0).

    tokens: the number, or None for twice the even share, 2 ceil(T / E). fraction: of the tokens instead, where above
    0. per: the scope within which tokens compete. by_weight: tokens with the largest weights come first, instead of the
    earliest tokens. renormalize_before: weights are normalised before tokens are dropped. Sources: Switch Transformers,
    NLLB-MoE.
    """

    tokens: int | None = None
    fraction: float = 0.0
    per: Literal["sequence", "batch"] = "sequence"
    renormalize_before: bool = False
    by_weight: bool = False


@dataclass(frozen=True)
class RoutingSpec:
    """How logits [T, classes] become expert ids and weights [T, K]. Fields stand in the order in which they act.

    logit_scale, logit_softcap: l = cap tanh(l scale / cap), without a cap where it is 0.
    score, score_dtype: of all classes; for select_on="logits" of the chosen ones alone (softmax over K of them).
    selector: "topk"; "sparsemixer", K masked argmaxes of the logits in turn with threshold `jitter`; "table", ids by
    token id; "product_keys", the best sums of two halves of the logits (both are said with select_on="logits").
    select_on: what is compared, scores or logits; with selection_bias a bias [E] is added to it, which the weights
    never see.
    groups, top_groups, group_score, group_mask: only the experts of the best groups compete, the others count as
    group_mask. "top2_sum": of the two best compared values of a group, which has at least two.
    renormalize: "sum", divided by max(sum + epsilon, floor); "norm", divided by the norm of order norm_order.
    scale: then multiplied in. per_expert_scale: then each weight by its expert's own.
    identity_experts: that many last ids have no weights and pass x on. skip_expert: the last class means no expert,
    id -1 and weight 0. shared_classes: that many last logits belong to the shared experts: they are not chosen among,
    the sigmoid of theirs and of the chosen are divided by their sum, and their weights go to the shared experts.
    """

    top_k: int
    _: KW_ONLY
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    score_dtype: Precision = "float32"
    selector: Literal["topk", "sparsemixer", "table", "product_keys"] = "topk"
    select_on: Literal["scores", "logits"] = "scores"
    selection_bias: bool = False
    jitter: float = 0.0
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    group_mask: float = -math.inf
    renormalize: Literal["no", "sum", "norm"] = "no"
    epsilon: float = 0.0
    floor: float = 0.0
    norm_order: float = 1.0
    scale: float = 1.0
    per_expert_scale: bool = False
    global_scale: bool = False
    identity_experts: int = 0
    skip_expert: bool = False
    shared_classes: int = 0
    capacity: Capacity | None = None

    def classes(self, experts: int) -> int:
        """Columns of the logits of that many experts with weights."""
        if self.selector == "product_keys":
            return 2 * math.isqrt(experts)
        return experts + self.identity_experts + self.skip_expert + self.shared_classes

    def experts(self, classes: int) -> int:
        """Experts with weights of that many columns of logits."""
        if self.selector == "product_keys":
            return (classes // 2) ** 2
        return classes - self.identity_experts - self.skip_expert - self.shared_classes


@dataclass(frozen=True)
class MLPSpec:
    """One expert, or a shared or dense MLP: w2 (f(gate, up)), or w2 (act(w1 x)) without a gate.

    clamp and limit: "before", gate to at most limit and up to [-limit, limit], before the activation; "after", the
    activated gate to at most limit and up as before; "tanh", limit tanh(v / limit) of both, and the activation's own
    sigmoid on the raw gate. up_limit: up's own limit, where above 0 (inkling2). alpha: silu is g sigmoid(alpha g).
    up_offset: added to up. dtype: of the activation. bias: of both projections. weight_on: what the routing weight
    multiplies: the expert's output, its input, or what enters w2. output_norm: eps of an RMSNorm of
    (1 + experts.output_norm) * the expert's output, before the weight (muse_spark); 0 without.
    """

    width: int
    activation: Activation = "silu"
    gated: bool = True
    clamp: Literal["no", "before", "after", "tanh"] = "no"
    limit: float = math.inf
    alpha: float = 1.0
    up_offset: float = 0.0
    dtype: Precision = "input"
    bias: bool = False
    weight_on: Literal["output", "input", "w2_input"] = "output"
    output_norm: float = 0.0
    up_limit: float = 0.0

    def tensors(self, prefix: str, hidden: int, lead: Shape = ()) -> dict[str, Shape]:
        """Names and shapes of its tensors; lead is (E,) for experts side by side."""
        rows = 2 * self.width if self.gated else self.width
        first = "13" if self.gated else "1"
        found = {f"{prefix}.w{first}": (*lead, rows, hidden), f"{prefix}.w2": (*lead, hidden, self.width)}
        if self.bias:
            found |= {f"{prefix}.b{first}": (*lead, rows), f"{prefix}.b2": (*lead, hidden)}
        if self.output_norm:
            found[f"{prefix}.output_norm"] = (hidden,)
        return found


@dataclass(frozen=True)
class SharedSpec:
    """The always-on experts, computed as one MLP of their summed width (each is a slice of it).

    gate: its output times sigmoid(x @ gate^T), a projection [1, H]. weighted: each shared expert has a weight of its
    own from the router (RoutingSpec.shared_classes). combine: how it meets the routed sum.
    """

    mlp: MLPSpec
    count: int = 1
    gate: bool = False
    weighted: bool = False
    combine: Literal["sum", "average"] = "sum"


@dataclass(frozen=True)
class LatentSpec:
    """Experts work in width D: x -> latent.in -> (RMSNorm, where norm_eps > 0) -> experts -> latent.out.

    The RMSNorm multiplies by 1 + latent.norm (muse_spark). bias: of both projections (nemotron_h with mlp_bias).
    """

    width: int
    norm_eps: float = 0.0
    bias: bool = False


@dataclass(frozen=True)
class DenseSpec:
    """A dense MLP beside the experts, on the same input.

    norm_eps: above 0 for Gemma 4, where experts and dense MLP have each an RMSNorm before and after, and the router
    sees x itself: dense.norm, dense.sum_norm, experts.norm and experts.sum_norm [H]. Without norms their sum is plain.
    """

    mlp: MLPSpec
    norm_eps: float = 0.0


@dataclass(frozen=True)
class LayerSpec:
    """One MoE layer of a model. num_experts: those with weights.

    output_scale: multiplies the routed sum, where the model does not scale the weights. combine_dtype: in which
    routed and shared outputs are added. output_bias: [H], added at the end (jetmoe). output_norm: eps of an RMSNorm
    of the whole output (axk1), 0 without. vocab_size: rows of the table of a "table" selector.
    """

    hidden_size: int
    num_experts: int
    logits: LogitsSpec
    routing: RoutingSpec
    experts: MLPSpec
    shared: SharedSpec | None = None
    latent: LatentSpec | None = None
    dense: DenseSpec | None = None
    output_scale: float = 1.0
    combine_dtype: Precision = "input"
    output_bias: bool = False
    output_norm: float = 0.0
    vocab_size: int = 0

    @property
    def classes(self) -> int:
        """Columns of the logits."""
        return self.routing.classes(self.num_experts)

    def tensors(self) -> dict[str, Shape]:
        """Canonical name -> shape of every tensor of the layer.

        router.proj [classes, H], router.bias, router.selection_bias, router.scale [H], router.per_expert_scale,
        router.global_scale [1], router.table [V, K] integer; experts.w13 [E, 2F, D] with gate above up, or
        experts.w1 [E, F, D] without a gate; experts.w2 [E, D, F]; experts.b13, .b1, .b2, .output_norm [D];
        shared.w13, .w2, .gate [1, H]; latent.in [D, H], latent.out [H, D], latent.in_bias,
        latent.out_bias, latent.norm [D]; dense.w13, .w2;
        output.bias, output.norm [H]. For "zaya" the router's own: down.weight, down.bias, state_scale, norm,
        fc1.weight, fc1.bias, fc2.weight, fc2.bias, proj.
        """
        hidden, experts = self.hidden_size, self.num_experts
        found = router_tensors(self.logits, self.routing, hidden, experts, self.vocab_size)
        found |= self.experts.tensors("experts", self.latent.width if self.latent else hidden, (experts,))
        if self.shared is not None:
            found |= self.shared.mlp.tensors("shared", hidden)
            if self.shared.gate:
                found["shared.gate"] = (1, hidden)
        if self.latent is not None:
            found |= {"latent.in": (self.latent.width, hidden), "latent.out": (hidden, self.latent.width)}
            if self.latent.bias:
                found |= {"latent.in_bias": (self.latent.width,), "latent.out_bias": (hidden,)}
            if self.latent.norm_eps:
                found["latent.norm"] = (self.latent.width,)
        if self.dense is not None:
            found |= self.dense.mlp.tensors("dense", hidden)
            if self.dense.norm_eps:
                norms = ("dense.norm", "dense.sum_norm", "experts.norm", "experts.sum_norm")
                found |= dict.fromkeys(norms, (hidden,))
        if self.output_bias:
            found["output.bias"] = (hidden,)
        if self.output_norm:
            found["output.norm"] = (hidden,)
        return found


def router_tensors(
    logits: LogitsSpec, routing: RoutingSpec, hidden: int, experts: int, vocab_size: int = 0
) -> dict[str, Shape]:
    """Canonical name -> shape of every tensor of a router, as `LayerSpec.tensors` says."""
    classes = routing.classes(experts)
    found: dict[str, Shape] = {}
    if logits.kind == "zaya":
        width = logits.width
        found |= {"router.down.weight": (width, hidden), "router.down.bias": (width,), "router.norm": (width,)}
        found |= {f"router.{fc}.weight": (width, width) for fc in ("fc1", "fc2")}
        found |= {f"router.{fc}.bias": (width,) for fc in ("fc1", "fc2")}
        found["router.proj"] = (classes, width)
        if logits.takes_state:
            found["router.state_scale"] = (width,)
    else:
        found["router.proj"] = (classes, hidden)
    if logits.kind == "gemma4":
        found["router.scale"] = (hidden,)
    if logits.bias:
        found["router.bias"] = (classes,)
    if routing.selection_bias:
        found["router.selection_bias"] = (classes - routing.shared_classes,)
    if routing.per_expert_scale:
        found["router.per_expert_scale"] = (experts,)
    if routing.global_scale:
        found["router.global_scale"] = (1,)
    if routing.selector == "table":
        found["router.table"] = (vocab_size, routing.top_k)
    return found
