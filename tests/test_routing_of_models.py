"""The router of every method as transformers has it, against route_logits and router_logits on the same tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_conformance.judging.inputs import normal
from moe_conformance.model.specs import Capacity, LogitsSpec, RoutingSpec
from moe_conformance.reference_impl.router import router_logits
from moe_conformance.reference_impl.routing import Routed, route_logits

pytest.importorskip("transformers", minversion="5.24", reason="the families here are those of transformers 5.24")

BATCH, LENGTH, HIDDEN, EXPERTS, TOP_K, VOCABULARY = 3, 7, 8, 12, 3, 11

# What the routers read from their configs. No value is one at which ignoring the key would not show.
CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts"), TOP_K),
    **dict.fromkeys(("routed_scaling_factor", "route_scale", "router_scaling_factor"), 2.5),
    "norm_topk_prob": True,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "expert_selection_fn": "sigmoid",
    "scoring_func": "sqrtsoftplus",
    "output_multiplier": 0.7,
    "moe_norm_min": 0.9,
    "moe_router_logit_softcapping": 1.5,
    "moe_normalize_expert_weights": 2.0,
    "router_jitter_noise": 0.2,
    "input_jitter_noise": 0.1,
    "moe_jitter_eps": 0.1,
    "use_expert_bias": True,
    "n_shared_experts": 2,
    "rms_norm_eps": 0.1,
    "router_hidden_size": 6,
    "vocab_size": VOCABULARY,
    "router_bias": True,
    "router_dtype": "float32",
    "router_ignore_padding_tokens": False,
    "expert_capacity": 2,
    "second_expert_policy": "all",
    "normalize_router_prob_before_dropping": False,
    "batch_prioritized_routing": False,
    "moe_eval_capacity_token_fraction": -1.0,
}

# Names of parameters and buffers -> canonical names; what is not here has its canonical name.
NAMES = {
    "gate.weight": "proj",
    "layer.weight": "proj",
    "router.layer.weight": "proj",
    "wg.weight": "proj",
    "classifier.weight": "proj",
    "proj.weight": "proj",
    "router_gate.weight": "proj",
    "router_mlp.out_proj.weight": "proj",
    "weight": "proj",
    "classifier.bias": "bias",
    "e_score_correction_bias": "selection_bias",
    "moe_statics.e_score_correction_bias": "selection_bias",
    "balancing_biases": "selection_bias",
    "tid2eid": "table",
    "down_proj.weight": "down.weight",
    "down_proj.bias": "down.bias",
    "router_states_scale": "state_scale",
    "router_mlp.norm.weight": "norm",
    **{f"router_mlp.{name}": name for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")},
}

Given = dict[str, Tensor]
# Module, x [B, S, H] and what else it takes -> ids, weights and shared weights, or [T, E] weights of all experts.
Call = Callable[[Any, Tensor, Given], Routed | Tensor]


def in_order(module: Any, x: Tensor, given: Given) -> Routed:
    """Most routers return logits, weights, ids, and what else there is."""
    _, weights, ids, *others = module(x.flatten(0, 1))
    return Routed(ids, weights, others[0] if others else None)


def with_bias(module: Any, x: Tensor, given: Given) -> Routed:
    _, weights, ids = module(x.flatten(0, 1), given["router.selection_bias"])
    return Routed(ids, weights, None)


def with_bias_and_sequences(module: Any, x: Tensor, given: Given) -> Routed:
    _, weights, ids = module(x, given["router.selection_bias"])
    return Routed(ids, weights, None)


def with_token_ids(module: Any, x: Tensor, given: Given) -> Routed:
    _, weights, ids = module(x, given["token_ids"])
    return Routed(ids, weights, None)


def with_state(module: Any, x: Tensor, given: Given) -> Routed:
    module.balancing_biases[-1] = 0.25  # otherwise no token would choose the class without an expert
    _, weights, ids, state = module(x, given["state"].unflatten(0, x.shape[:2]) if "state" in given else None)
    given["next_state"] = state.flatten(0, 1)
    return Routed(ids, weights, None)


def llama4(module: Any, x: Tensor, given: Given) -> Tensor:
    return module(x.flatten(0, 1))[0]


def dbrx(module: Any, x: Tensor, given: Given) -> Routed:
    weights, ids = module.route_tokens_to_experts(module.router(x))
    return Routed(ids, weights, None)


def jetmoe(module: Any, x: Tensor, given: Given) -> Tensor:
    """Its pairs are sorted by expert."""
    _, token, weights, tokens_per_expert, _ = module(x.flatten(0, 1))
    expert = torch.arange(EXPERTS).repeat_interleave(torch.tensor(tokens_per_expert))
    return torch.zeros(x.shape[0] * x.shape[1], EXPERTS).index_put((token, expert), weights)


def switch(module: Any, x: Tensor, given: Given) -> Tensor:
    one_hot, weight, _ = module(x)
    return (one_hot * weight).flatten(0, 1)


def nllb(module: Any, x: Tensor, given: Given) -> Tensor:
    return module(x.flatten(0, 1))[1]


def doge(module: Any, x: Tensor, given: Given) -> Tensor:
    """Its routing stands inside its experts: expert e is made to give 1 in column e of the output."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name != "router_gate.weight":
                parameter.zero_()
        module.down_embed.weight[:, -1] = 1.0
        module.up_embed.weight.fill_diagonal_(1.0)
    module.act_fn = nn.Identity()
    x[..., -1] = 1.0
    return module(x)[0].flatten(0, 1)


@dataclass(frozen=True)
class Model:
    """A router class of transformers, and the specs that say the same."""

    router: str
    routing: RoutingSpec
    logits: LogitsSpec = field(default_factory=LogitsSpec)
    config: dict[str, Any] = field(default_factory=dict)
    call: Call = in_order
    arguments: tuple[Any, ...] = ()
    state: bool = False

    @property
    def name(self) -> str:
        return "-".join([self.router.partition(":")[0], *(f"{key}={value}" for key, value in self.config.items())])


FLOAT32 = LogitsSpec(dtype="float32")
SOFTMAX = RoutingSpec(TOP_K)
SUM = RoutingSpec(TOP_K, renormalize="sum")
CHOSEN = RoutingSpec(TOP_K, select_on="logits")
SIGMOID = RoutingSpec(TOP_K, score="sigmoid", renormalize="sum")
BIASED = replace(SIGMOID, selection_bias=True)
SCALED = replace(BIASED, epsilon=1e-20, scale=2.5)
GROUPED = replace(SCALED, groups=4, top_groups=2, group_score="top2_sum")
MISTRAL = RoutingSpec(
    TOP_K, groups=4, top_groups=2, group_score="top2_sum", group_mask=0.0, renormalize="sum", epsilon=1e-20, scale=2.5
)
TWO = RoutingSpec(2, renormalize="sum", floor=torch.finfo(torch.float32).eps)


def nllb_with(tokens: int | None, fraction: float, before: bool, by_weight: bool) -> Model:
    config = {
        "expert_capacity": tokens,
        "moe_eval_capacity_token_fraction": fraction,
        "normalize_router_prob_before_dropping": before,
        "batch_prioritized_routing": by_weight,
    }
    capacity = Capacity(tokens, fraction, "batch", before, by_weight)
    logits = LogitsSpec(bias=True, dtype="float32")
    return Model("nllb_moe:NllbMoeTop2Router", replace(TWO, capacity=capacity), logits, config, nllb)


MODELS = (
    Model("mixtral:MixtralTopKRouter", SUM),
    Model("qwen3_moe:Qwen3MoeTopKRouter", SUM),
    Model("lara_mini:LaraMiniTopKRouter", SUM, FLOAT32),
    Model("qwen3_moe:Qwen3MoeTopKRouter", SOFTMAX, config={"norm_topk_prob": False}),
    Model("jamba:JambaTopKRouter", SOFTMAX),
    Model("hunyuan_v1_moe:HunYuanMoEV1Gate", SUM, FLOAT32),
    Model("dbrx:DbrxFFN", replace(SUM, renormalize="norm", norm_order=2.0), call=dbrx),
    Model("gpt_oss:GptOssTopKRouter", CHOSEN, LogitsSpec(bias=True)),
    Model(
        "openai_privacy_filter:OpenAIPrivacyFilterTopKRouter",
        replace(CHOSEN, scale=1 / TOP_K),
        LogitsSpec(bias=True, dtype="float32"),
    ),
    Model("aria:AriaTextTopKRouter", CHOSEN),
    Model("granitemoe:GraniteMoeTopKRouter", CHOSEN),
    Model("jetmoe:JetMoeTopKGating", CHOSEN, call=jetmoe, arguments=(HIDDEN, EXPERTS, TOP_K)),
    Model("cohere2_moe:Cohere2MoeTopKRouter", CHOSEN, config={"expert_selection_fn": "softmax"}),
    Model("cohere2_moe:Cohere2MoeTopKRouter", replace(SIGMOID, select_on="logits")),
    Model("llama4:Llama4Router", replace(CHOSEN, score="sigmoid"), call=llama4),
    Model("flint:FlintTopKRouter", SIGMOID, FLOAT32),
    Model("kolibri1:Kolibri1TopKRouter", replace(BIASED, select_on="logits"), FLOAT32),
    Model("minimax_m2:MiniMaxM2TopKRouter", BIASED, call=with_bias),
    Model("laguna:LagunaTopKRouter", replace(BIASED, logit_softcap=1.5)),
    Model("lfm2_moe:Lfm2MoeTopKRouter", replace(BIASED, epsilon=1e-6, scale=2.5), call=with_bias),
    Model("afmoe:AfmoeTokenChoiceRouter", SCALED, call=with_bias_and_sequences),
    Model("hy_v3:HYV3TopKRouter", SCALED, FLOAT32, call=with_bias),
    Model("muse_spark:MuseSparkTopkRouter", replace(SCALED, epsilon=1e-15, logit_scale=0.7), FLOAT32),
    Model("inkling2:Inkling2TopKRouter", SCALED, FLOAT32, {"scoring_func": "sigmoid"}),
    Model("ernie4_5_moe:Ernie4_5_MoeTopKRouter", replace(SUM, selection_bias=True, floor=0.9), FLOAT32),
    Model("deepseek_v2:DeepseekV2TopkRouter", replace(SOFTMAX, scale=2.5), FLOAT32, {"topk_method": "greedy"}),
    Model(
        "deepseek_v2:DeepseekV2TopkRouter",
        replace(SOFTMAX, groups=4, top_groups=2, group_mask=0.0, scale=2.5),
        FLOAT32,
    ),
    Model("deepseek_v3:DeepseekV3TopkRouter", GROUPED, FLOAT32),
    Model(
        "deepseek_v3:DeepseekV3TopkRouter",
        replace(GROUPED, renormalize="no", groups=1, top_groups=1),
        FLOAT32,
        {"norm_topk_prob": False, "n_group": 1, "topk_group": 1},
    ),
    Model("axk2:AXK2TopkRouter", replace(GROUPED, group_mask=0.0), FLOAT32),
    Model("axk2:AXK2TopkRouter", SCALED, FLOAT32, {"n_group": None}),
    Model("mistral4:Mistral4TopkRouter", replace(MISTRAL, score_dtype="input")),
    Model("mistral_large4:MistralLarge4TextTopkRouter", MISTRAL, FLOAT32),
    Model(
        "deepseek_v4:DeepseekV4TopKRouter",
        replace(SCALED, score="sqrt_softplus", score_dtype="input"),
    ),
    Model(
        "deepseek_v4:DeepseekV4HashRouter",
        replace(SCALED, score="sqrt_softplus", score_dtype="input", selector="table", selection_bias=False),
        call=with_token_ids,
    ),
    Model(
        "longcat_flash:LongcatFlashTopkRouter",
        RoutingSpec(TOP_K, selection_bias=True, scale=2.5, identity_experts=4),
        FLOAT32,
        {"n_routed_experts": EXPERTS - 4, "zero_expert_num": 4},
    ),
    Model(
        "zaya:ZayaRouter",
        RoutingSpec(TOP_K, selection_bias=True, skip_expert=True, score_dtype="input"),
        LogitsSpec("zaya", norm_eps=0.1, width=6),
        {"num_experts": EXPERTS - 1},
        with_state,
        (0,),
    ),
    Model(
        "zaya:ZayaRouter",
        RoutingSpec(TOP_K, selection_bias=True, skip_expert=True, score_dtype="input"),
        LogitsSpec("zaya", norm_eps=0.1, width=6, takes_state=True),
        {"num_experts": EXPERTS - 1, "layer": 1},
        with_state,
        (1,),
        state=True,
    ),
    Model("gemma4:Gemma4TextRouter", replace(SUM, per_expert_scale=True), LogitsSpec("gemma4", norm_eps=0.1)),
    Model(
        "phimoe:PhimoeTopKRouter",
        RoutingSpec(2, selector="sparsemixer", select_on="logits", jitter=0.2, score_dtype="input"),
        config={"num_experts_per_tok": 2},
    ),
    Model(
        "inkling:InklingTopkRouter",
        RoutingSpec(TOP_K, score="sigmoid", selection_bias=True, shared_classes=2, global_scale=True, scale=2.5),
        FLOAT32,
    ),
    Model(
        "doge:DogeCDMoE",
        RoutingSpec(TOP_K, selector="product_keys", select_on="logits", score_dtype="input", renormalize="sum"),
        config={"hidden_size": 9, "num_experts": 9, "intermediate_size": 5, "hidden_act": "silu", "mlp_bias": False},
        call=doge,
    ),
    Model(
        "switch_transformers:SwitchTransformersTop1Router",
        RoutingSpec(1, capacity=Capacity(2)),
        LogitsSpec(bias=True, dtype="float32"),
        call=switch,
    ),
    nllb_with(3, -1.0, before=False, by_weight=False),
    nllb_with(3, 0.0, before=True, by_weight=False),
    nllb_with(3, 0.1, before=False, by_weight=True),
    nllb_with(None, 0.0, before=True, by_weight=True),
    nllb_with(3, 1.0, before=False, by_weight=False),
)


def build(model: Model) -> nn.Module:
    module, _, name = model.router.partition(":")
    config = SimpleNamespace(**{**CONFIG, **model.config})
    config.ffn_config = SimpleNamespace(**vars(config), ffn_hidden_size=5, ffn_act_fn={"name": "silu"})
    found = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    router: nn.Module = getattr(found, name)(*(model.arguments if "jetmoe" in module else (config, *model.arguments)))
    return router.eval()


def loaded(router: nn.Module) -> Given:
    """Fill its parameters and buffers with values whose sums do not tie, and return them by canonical name."""
    given = {"router.selection_bias": normal((EXPERTS,), "bias of the block", std=0.25)}
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        if tensor.dtype == torch.int64:
            start = torch.arange(VOCABULARY).unsqueeze(1) * 5
            tensor.copy_((start + torch.arange(TOP_K) * 4) % EXPERTS)
        else:
            tensor.data.copy_(normal(tensor.shape, name, std=0.25 if "bias" in name else 0.5).sin())
        given[f"router.{NAMES.get(name, name)}"] = tensor.data.squeeze() if "moe_statics" in name else tensor.data
    return given


# 60 below 0 a sigmoid is far below the epsilon it is divided with, and below the selection bias. There
# float32 logits are 60 * 2^-24 apart, and a difference of logarithms is as exact as that.
@pytest.mark.parametrize("depth", [0.0, 60.0])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_routes_as_the_model_does(model: Model, depth: float) -> None:
    router = build(model)
    given = loaded(router)
    given["router.proj"][:, -1] = 1.0
    exactness = max(1e-6, depth * 2**-23)
    given["token_ids"] = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) * 7 % VOCABULARY
    if model.state:
        given["state"] = normal((BATCH * LENGTH, 6), "state")
    x = normal((BATCH, LENGTH, model.config.get("hidden_size", HIDDEN)), "x").sin() * 2
    x[..., -1] = -depth

    with torch.no_grad():
        want = model.call(router, x, given)
    logits, state = router_logits(x.flatten(0, 1), model.logits, given, state=given.get("state"))
    got = route_logits(logits, model.routing, given, token_ids=given["token_ids"], sequences=BATCH)

    if isinstance(want, Routed):
        # A pair without an expert has any id there, and -1 here.
        named = want.ids.masked_fill(want.weights == 0, -1) if model.routing.skip_expert else want.ids
        assert torch.equal(got.ids.sort().values, named.sort().values)
        if want.shared is not None:
            torch.testing.assert_close(got.shared, want.shared, rtol=exactness, atol=0)
        want = dense(want, logits.shape[1])
    torch.testing.assert_close(dense(got, want.shape[1]), want, rtol=exactness, atol=0)
    assert 0 < want.count_nonzero() <= want.shape[0] * model.routing.top_k
    if "next_state" in given:
        torch.testing.assert_close(state, given["next_state"], rtol=exactness, atol=1e-6)


def dense(routed: Routed, experts: int) -> Tensor:
    """[T, E] weights of all experts; a pair without one has weight 0."""
    return routed.weights.new_zeros(len(routed.ids), experts).scatter_add(1, routed.ids.clamp(min=0), routed.weights)
