"""The family suite itself: two oracles that agree, inputs on which faults show, an adapter that leaves nothing out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_conformance.engine import BlockInputs, BlockOutput, Routing
from moe_conformance.engines.reference import Reference
from moe_conformance.engines.transformers import Transformers
from moe_conformance.errors import ConfigError, InputError, Nonconformance, Unsupported
from moe_conformance.model.specs import LayerSpec
from moe_conformance.oracle.choice import choose
from moe_conformance.oracle.layer import block_logits, block_routing, expected_block
from moe_conformance.reference_impl.layer import layer
from moe_conformance.suites.block.blocks import inputs_of
from moe_conformance.suites.block.cases import (
    BLOCK_CASES,
    EXPERTS_CASES,
    NARROW_ROUTE_CASES,
    ROUTE_CASES,
    SHARED_CASES,
    VARIANTS,
)
from moe_conformance.suites.block.configs import spec_of
from moe_conformance.suites.block.judging import answer, judge_output, judge_router, reported

ROUTED = (*ROUTE_CASES, *NARROW_ROUTE_CASES)
CASES = {case.id.removeprefix("family-"): case for case in (*ROUTED, *BLOCK_CASES, *EXPERTS_CASES, *SHARED_CASES)}


def exact(inputs: BlockInputs) -> BlockInputs:
    """The same in float64."""

    def wide(tensor: torch.Tensor | None) -> Any:
        return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor

    tensors = {name: wide(tensor) for name, tensor in inputs.tensors.items()}
    routing = inputs.routing and Routing(*map(wide, inputs.routing))
    return replace(inputs, x=wide(inputs.x), tensors=tensors, state=wide(inputs.state), routing=routing)


@pytest.mark.parametrize("slug", VARIANTS)
def test_the_reference_agrees_with_the_oracle(slug: str) -> None:
    """Two implementations of a layer in float64, neither of which knows the other, nor transformers."""
    inputs = exact(inputs_of(next(case for case in BLOCK_CASES if case["family"] == slug)))
    want, _ = expected_block(inputs, spec_of(slug))
    torch.testing.assert_close(Reference().block(inputs).output, want, rtol=1e-11, atol=1e-11)


def test_no_case_leaves_it_to_rounding_which_experts_are_chosen() -> None:
    for case in ROUTE_CASES:
        inputs, spec = inputs_of(case), spec_of(case["family"])
        choose(block_routing(inputs, spec), block_logits(inputs, spec), inputs.x.dtype)


class Altered(Reference):
    """The reference, of another layer than the config's."""

    def __init__(self, change: Callable[[LayerSpec], LayerSpec]) -> None:
        self.change = change

    def block(self, inputs: BlockInputs) -> BlockOutput:
        spec = self.change(spec_of(self.family))
        found = layer(inputs.x.flatten(0, 1), spec, inputs.tensors, sequences=2, routing=inputs.routing)
        return BlockOutput(found.output, None if inputs.routing else Routing(found.ids, found.weights))

    def judge(self, case_id: str) -> None:
        case = CASES[case_id]
        self.family = case["family"]
        if case in ROUTED:
            inputs = inputs_of(case)
            judge_router(inputs, spec_of(self.family), reported(answer(self, inputs)))
        else:
            judge_output(self, case)


def _routing(**fields: Any) -> Callable[[LayerSpec], LayerSpec]:
    return lambda spec: replace(spec, routing=replace(spec.routing, **fields))


def _experts(**fields: Any) -> Callable[[LayerSpec], LayerSpec]:
    return lambda spec: replace(spec, experts=replace(spec.experts, **fields))


def _shared(**fields: Any) -> Callable[[LayerSpec], LayerSpec]:
    return lambda spec: replace(spec, shared=spec.shared and replace(spec.shared, **fields))


def _latent(**fields: Any) -> Callable[[LayerSpec], LayerSpec]:
    return lambda spec: replace(spec, latent=spec.latent and replace(spec.latent, **fields))


def _dense(**fields: Any) -> Callable[[LayerSpec], LayerSpec]:
    return lambda spec: replace(spec, dense=spec.dense and replace(spec.dense, **fields))


def _of_layer(**fields: Any) -> Callable[[LayerSpec], LayerSpec]:
    return lambda spec: replace(spec, **fields)


def _narrow_router(spec: LayerSpec) -> LayerSpec:
    return _routing(score_dtype="input")(replace(spec, logits=replace(spec.logits, dtype="input")))


FAULTS: dict[str, tuple[str, Callable[[LayerSpec], LayerSpec]]] = {
    "a bias that is left out": ("deepseek-v3-route", _routing(selection_bias=False)),
    "no groups": ("deepseek-v3-route", _routing(groups=1, top_groups=1)),
    "a group's best instead of its two best": ("deepseek-v3-route", _routing(group_score="max")),
    "a group's two best instead of its best": ("deepseek-v2-route", _routing(group_score="top2_sum")),
    "one group too many": ("mistral4-route", _routing(top_groups=3)),
    "experts outside the groups as minus infinity": ("axk2-zero-mask-route", _routing(group_mask=-torch.inf)),
    "renormalised though the key says no": ("qwen3-moe-no-norm-route", _routing(renormalize="sum")),
    "not renormalised": ("mixtral-route", _routing(renormalize="no")),
    "sum instead of the root of squares": ("dbrx-order-2-route", _routing(norm_order=1.0)),
    "nothing added to the sum": ("deepseek-v3-route-tiny-sum", _routing(epsilon=0.0)),
    "no floor of the sum": ("ernie4-5-moe-route", _routing(floor=0.0)),
    "scale 1": ("deepseek-v3-block", _routing(scale=1.0)),
    "scale left out where nothing is renormalised": ("deepseek-v3-no-norm-block", _routing(scale=1.0)),
    "softmax for sigmoid": ("flint-route", _routing(score="softmax")),
    "scores of all instead of the chosen": ("gpt-oss-route", _routing(select_on="scores")),
    "no softcap": ("laguna-route", _routing(logit_softcap=0.0)),
    "logits not multiplied": ("muse-spark-route", _routing(logit_scale=1.0)),
    "no scale of an expert's own": ("gemma4-route", _routing(per_expert_scale=False)),
    "a narrower threshold": ("phimoe-route", _routing(jitter=0.1)),
    "nobody dropped": ("switch-transformers-route", _routing(capacity=None)),
    "a float32 router in the model's dtype": ("deepseek-v3-bf16-route", _narrow_router),
    "and where nothing is renormalised": ("longcat-flash-bf16-route", _narrow_router),
    "gelu for silu": ("mixtral-experts", _experts(activation="gelu")),
    "erf for tanh": ("gemma4-experts", _experts(activation="gelu")),
    "relu for its square": ("nemotron-h-experts", _experts(activation="relu")),
    "no clamp": ("deepseek-v4-experts", _experts(clamp="no")),
    "clamped before": ("step3p7-experts", _experts(clamp="before")),
    "one cap for both": ("inkling2-one-cap-block", _experts(up_limit=0.0)),
    "alpha 1": ("gpt-oss-experts", _experts(alpha=1.0)),
    "up without its 1": ("gpt-oss-experts", _experts(up_offset=0.0)),
    "no biases": ("gpt-oss-experts", _experts(bias=False)),
    "the weight on the output": ("llama4-block", _experts(weight_on="output")),
    "another epsilon of the experts' norm": ("muse-spark-experts", _experts(output_norm=0.0625)),
    "no gate of the shared expert": ("qwen2-moe-shared", _shared(gate=False)),
    "added, not averaged": ("cohere2-moe-shared", _shared(combine="sum")),
    "no shared expert": ("deepseek-v3-shared", _of_layer(shared=None)),
    "no dense part": ("gemma4-shared", _of_layer(dense=None)),
    "another epsilon of the dense norms": ("gemma4-shared", _dense(norm_eps=0.03125)),
    "no norm in the latent width": ("muse-spark-block", _latent(norm_eps=0.0)),
    "the output not scaled": ("beam-block", _of_layer(output_scale=1.0)),
    "scaled in the weights": ("minimax-m3-vl-route", lambda spec: _routing(scale=2.5)(spec)),
    "no bias at the end": ("jetmoe-block", _of_layer(output_bias=False)),
    "no norm at the end": ("axk1-block", _of_layer(output_norm=0.0)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_any_part_of_a_layer_is_noticed(fault: str) -> None:
    case_id, change = FAULTS[fault]
    Altered(lambda spec: spec).judge(case_id)
    with pytest.raises(Nonconformance):
        Altered(change).judge(case_id)


class GuessesTheOrientation(Reference):
    """Takes the larger dim of [E, 2F, H] for 2F, as a loader without names of dims may."""

    def block(self, inputs: BlockInputs) -> BlockOutput:
        first = inputs.tensors["experts.w13"]
        if first.shape[1] < first.shape[2]:
            first = first.reshape(len(first), first.shape[2], first.shape[1]).transpose(1, 2).contiguous()
        return super().block(replace(inputs, tensors={**inputs.tensors, "experts.w13": first}))


def test_an_orientation_guessed_from_the_larger_dim_shows_on_narrow_experts_alone() -> None:
    for slug in ("mixtral", "mixtral-square"):
        judge_output(GuessesTheOrientation(), CASES[f"{slug}-block"])
    with pytest.raises(Nonconformance, match="block output: "):
        judge_output(GuessesTheOrientation(), CASES["mixtral-narrow-block"])


def block_inputs(case_id: str, **tensors: torch.Tensor) -> BlockInputs:
    inputs = inputs_of(CASES[case_id])
    return replace(inputs, tensors={**inputs.tensors, **tensors})


def test_the_adapter_refuses_a_tensor_that_no_parameter_takes() -> None:
    with pytest.raises(InputError, match=r"not used: \['shared.gate'\]"):
        Transformers().block(block_inputs("mixtral-block", **{"shared.gate": torch.ones(1, 40)}))


def test_the_adapter_refuses_a_tensor_of_another_shape() -> None:
    with pytest.raises(InputError, match=r"gate\.weight: got"):
        Transformers().block(block_inputs("mixtral-block", **{"router.proj": torch.ones(12, 39)}))


def test_the_adapter_names_a_tensor_that_is_missing() -> None:
    inputs = block_inputs("mixtral-block")
    some = {name: tensor for name, tensor in inputs.tensors.items() if name != "experts.w2"}
    with pytest.raises(InputError, match=r"experts\.w2: got no such tensor"):
        Transformers().block(replace(inputs, tensors=some))


def test_the_adapter_refuses_a_layer_without_experts() -> None:
    with pytest.raises(ConfigError, match="layer 0 has no routed experts"):
        Transformers().block(replace(block_inputs("axk1-block"), layer=0))


def test_an_implementation_that_the_family_ignores_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="ignores"):
        Transformers().block(replace(block_inputs("dbrx-block"), implementation="grouped_mm"))


def test_a_routing_cannot_be_put_into_a_block_without_experts_of_its_own() -> None:
    routing = Routing(torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 5))
    with pytest.raises(Unsupported, match="no place"):
        Transformers().block(replace(block_inputs("doge-block-token-0"), routing=routing))
