"""The transformers adapter itself: which classes it asks, what it reads, and that it costs nothing until used."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_conformance.engine import (
    BlockInputs,
    ExpertsInputs,
    LayerInputs,
    LayerSpec,
    LogitsSpec,
    MLPSpec,
    Precision,
    RouteInputs,
    RouterSpec,
    Routing,
    RoutingSpec,
    SharedSpec,
    Unsupported,
    distinct_logits,
    integers,
    normal,
    poisoned_allocations,
)
from moe_conformance.engines.reference import Reference
from moe_conformance.engines.transformers import Transformers, TransformersOnGPU
from moe_conformance.engines.transformers.block import block_of
from moe_conformance.engines.transformers.block_routing import Tap
from moe_conformance.engines.transformers.filling import fill
from moe_conformance.engines.transformers.matching import available, for_router, router_of, routes_alone
from moe_conformance.engines.transformers.routing import WeightsAndIds
from moe_conformance.errors import ConfigError, DenseModelError
from moe_conformance.judging import compare
from moe_conformance.model.families import inverse
from moe_conformance.model.families.configs import TO_COMPUTE, Size, filled
from moe_conformance.model.families.describe import describe
from moe_conformance.oracle.bounds import sums


def test_the_adapter_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; from moe_conformance.engines.transformers import Transformers as T; T.missing(); T().info;"
        "sys.exit(' '.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_release_that_the_adapter_misreads_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_conformance.engines.transformers.version", lambda name: "5.19.0")
    assert Transformers.missing() == "got transformers 5.19.0, want 5.20 or later: pip install 'transformers>=5.20'"
    monkeypatch.setattr("moe_conformance.engines.transformers.version", lambda name: "5.20.0")
    assert Transformers.missing() is None


def test_a_model_type_that_transformers_does_not_have_is_not_judged() -> None:
    with pytest.raises(Unsupported, match=r"transformers .* has no model type 'of-tomorrow'"):
        Transformers().describe({"model_type": "of-tomorrow"})


def test_top_k_is_what_the_forward_does_and_not_what_the_config_says() -> None:
    """PhiMoE's sparsemixer picks two experts whatever num_experts_per_tok is."""
    config = {"model_type": "phimoe", "num_hidden_layers": 2, "num_local_experts": 6, "num_experts_per_tok": 3}
    assert Transformers().describe(config).top_k == 2


def test_a_config_whose_model_cannot_run_is_refused() -> None:
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 4, "n_routed_experts": 11, "n_group": 8}
    with pytest.raises(ConfigError, match="DeepseekV3MoE of this config cannot run"):
        Transformers().describe(config)


def test_a_dense_model_is_refused_by_name() -> None:
    with pytest.raises(DenseModelError, match=r"gemma3_text.* has no routed experts"):
        Transformers().describe({"model_type": "gemma3", "text_config": {"num_hidden_layers": 2}})


def test_a_model_type_that_the_release_does_not_have_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="has no model type 'of_next_year'"):
        Transformers().describe({"model_type": "of_next_year", "num_experts": 8})


BY_FAMILY = {setting.record.slug: inverse.settings(setting.record.model_type) for setting in available()}


@pytest.mark.parametrize("slug", BY_FAMILY)
def test_a_router_is_asked_alone_where_it_routes_as_its_block_does(slug: str) -> None:
    said, found = set(), []
    for setting in BY_FAMILY[slug]:
        sizes = {**TO_COMPUTE, Size.HEADS: TO_COMPUTE[Size.HIDDEN] // 8}
        block = copy.deepcopy(block_of(json.dumps(filled(setting.keys, sizes)), setting.layer))
        tensors = {name: normal(shape, name) for name, shape in setting.spec.tensors().items()}
        if "router.table" in tensors:
            tensors["router.table"] = integers(tensors["router.table"].shape, "table", setting.spec.num_experts)
        fill(block, tensors)
        x = normal((1, 7, setting.spec.hidden_size), "x")
        state = torch.zeros(1, 7, setting.spec.logits.width) if setting.spec.logits.takes_state else None
        with Tap(block.moe, None, stop=True) as tap, torch.no_grad():
            block(x, torch.arange(7).view(1, 7), state)
        assert tap.seen is not None
        said.add((type(router_of(block.moe)), routes_alone(block.moe)))
        found.append((type(router_of(block.moe)), _answers(block.moe, setting, x.squeeze(0), tap.seen)))
    for router, alone in said:
        assert all(answers for asked, answers in found if asked is router) == alone


def _answers(moe: Any, setting: inverse.Setting, hidden: torch.Tensor, seen: Routing) -> bool:
    """Whether the router, called by itself, answers what the experts were handed."""
    try:
        weights, ids = WeightsAndIds(router_of(moe), setting.spec.logits.kind == "zaya")(hidden)
        return torch.equal(_by_expert(Routing(ids, weights)), _by_expert(seen))
    except (TypeError, ValueError, RuntimeError):
        return False


def _by_expert(routing: Routing) -> torch.Tensor:
    """[T, 1 + largest id] of weights."""
    return torch.zeros(len(routing.ids), 20).scatter(1, routing.ids.long(), routing.weights.float())


METHODS = {
    "softmax": RoutingSpec(6),
    "softmax-renormalised": RoutingSpec(6, renormalize="sum"),
    "gemma4": RoutingSpec(6, renormalize="sum", per_expert_scale=True),
    "deepseek-v3": RoutingSpec(6, score="sigmoid", selection_bias=True, renormalize="sum", epsilon=1e-20, scale=2.5),
    "chosen": RoutingSpec(6, select_on="logits"),
}


@pytest.mark.parametrize("name", METHODS)
def test_an_infinite_logit_touches_only_its_expert(name: str) -> None:
    """The given logits do not pass through a product with an identity, where 0 * inf would be NaN."""
    logits = distinct_logits(3, 7, "infinite")
    logits[:, 2] = -torch.inf
    tensors = {"router.per_expert_scale": torch.ones(7), "router.selection_bias": torch.zeros(7)}
    spec = METHODS[name]
    taken = {f"router.{word}" for word in ("per_expert_scale", "selection_bias") if getattr(spec, word)}
    answer = Transformers().route(RouteInputs(logits, spec, {key: tensors[key] for key in taken}))
    assert answer.ids.sort().values.tolist() == [[0, 1, 3, 4, 5, 6]] * 3
    assert answer.weights.isfinite().all() and answer.weights.dtype == torch.float32


def test_the_family_that_says_the_specs_own_word_is_asked_first() -> None:
    """In float32 gpt-oss and Granite route alike; each is asked for its own."""
    dtypes: tuple[Precision, ...] = ("input", "float32")
    asked = {
        dtype: for_router(RoutingSpec(4, select_on="logits", score_dtype=dtype), 8, 0, "float32").setting.spec
        for dtype in dtypes
    }
    assert {dtype: spec.routing.score_dtype for dtype, spec in asked.items()} == {dtype: dtype for dtype in asked}


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (RoutingSpec(4, score="sigmoid", groups=2), "float32"),  # a group's best
        (RoutingSpec(4, score="sigmoid", selection_bias=True, renormalize="sum", epsilon=1e-9), "float32"),
        (RoutingSpec(4, score="sqrt_softplus", score_dtype="input"), "bfloat16"),  # not renormalised
        (RoutingSpec(3, selector="sparsemixer", select_on="logits", jitter=0.1), "float32"),  # two experts, always
    ],
)
def test_a_router_that_no_class_is_is_refused_by_name(spec: RoutingSpec, dtype: str) -> None:
    logits = torch.zeros(2, 8, dtype=getattr(torch, dtype))
    with pytest.raises(Unsupported, match=rf"no router that computes RoutingSpec\(top_k={spec.top_k}, .*, in {dtype}"):
        Transformers().route(RouteInputs(logits, spec))


def test_a_selection_bias_that_the_spec_does_not_have_is_zero() -> None:
    spec = RoutingSpec(3, score="sigmoid", groups=4, top_groups=2, group_score="top2_sum", epsilon=1e-20)
    with poisoned_allocations():
        handle = Transformers().router_module(RouterSpec(LogitsSpec(dtype="float32"), spec, 8, 16, torch.float32))
    assert set(handle.tensors) == {"router.proj"}
    buffers = dict(handle.module.named_buffers())
    assert buffers and all(not buffer.any() for buffer in buffers.values())


LAYER = LayerSpec(
    hidden_size=16,
    num_experts=7,
    logits=LogitsSpec(),
    routing=RoutingSpec(3, renormalize="sum"),
    experts=MLPSpec(8, activation="gelu_tanh"),
    shared=SharedSpec(MLPSpec(32)),
    output_scale=2.5,
)


def _tensors(spec: LayerSpec) -> dict[str, torch.Tensor]:
    wanted = {name: shape for name, shape in spec.tensors().items() if name != "router.proj"}
    return {name: normal(shape, name, std=0.25) for name, shape in wanted.items()}


def _close(got: torch.Tensor, want: torch.Tensor, roundings: int) -> None:
    bound = sums(want.abs().amax().expand(want.shape), roundings, torch.float32, "both sides in float32")
    compare.close("output", got, want, bound)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("renormalize", ["no", "sum"])
def test_every_experts_implementation_computes_the_layer(implementation: str, renormalize: Any) -> None:
    spec = replace(LAYER, routing=replace(LAYER.routing, renormalize=renormalize))
    tokens = 63
    inputs = LayerInputs(
        normal((tokens, spec.hidden_size), "x"), distinct_logits(tokens, 7, "logits"), spec, _tensors(spec)
    )
    engine = Transformers()
    engine.experts_implementation = implementation
    _close(engine.layer(inputs), Reference().layer(inputs), 3 * 16 * 8)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_a_pair_without_an_expert_adds_nothing_whatever_its_weight(implementation: str) -> None:
    mlp, tokens = MLPSpec(8), 33
    tensors = {name: normal(shape, name, std=0.25) for name, shape in mlp.tensors("experts", 16, (7,)).items()}
    ids = normal((tokens, 7), "order").argsort(-1)[:, :3]
    inputs = ExpertsInputs(normal((tokens, 16), "x"), mlp, tensors, ids, normal((tokens, 3), "weights"))
    none = integers((tokens, 3), "none", 3) == 0
    engine = Transformers()
    engine.experts_implementation = implementation
    got = engine.experts(replace(inputs, ids=ids.masked_fill(none, -1)))
    want = engine.experts(replace(inputs, weights=inputs.weights.masked_fill(none, 0.0)))
    assert none.any() and not none.all()
    _close(got, want, 3 * 16 * 8)


def test_on_a_gpu_its_router_is_there_and_without_one_it_says_so() -> None:
    class OnMeta(TransformersOnGPU):
        device = "meta"

    spec = RouterSpec(LogitsSpec(dtype="float32"), RoutingSpec(3, renormalize="sum"), 16, 8, torch.float32)
    handle = OnMeta().router_module(spec)
    assert {parameter.device.type for parameter in handle.module.parameters()} == {"meta"}
    assert TransformersOnGPU().info.device == "cuda"
    assert TransformersOnGPU.missing() == (None if torch.cuda.is_available() else "there is no GPU")


def test_grouped_mm_says_which_widths_it_takes() -> None:
    engine = Transformers()
    assert not engine.limits()
    engine.experts_implementation = "grouped_mm"
    assert engine.limits()["experts"].exceeded({"D": 20, "F": 8}) == "D: got 20, want a multiple of 8"


def _block(native_ids: bool) -> Any:
    config = {"model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 8}
    config |= {"num_attention_heads": 1, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    (spec,) = describe(config).layers
    tensors = {name: normal(shape, name, std=0.25) for name, shape in spec.tensors().items()}
    routing = Routing(torch.tensor([[0, -1], [3, 2]]), torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    inputs = BlockInputs(config, 0, tensors, normal((1, 2, 16), "x"), routing=routing, native_ids=native_ids)
    return Transformers().block(inputs).output, Reference().block(replace(inputs, native_ids=False)).output


def test_minus_one_is_said_in_transformers_own_way() -> None:
    _close(*_block(native_ids=False), 2 * 16 * 8)


def test_native_ids_are_handed_on_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="Class values must be non-negative"):
        _block(native_ids=True)
