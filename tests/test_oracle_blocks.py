"""What a layer and a block must answer: at whose routing, by what choice, and from which inputs there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_conformance.engine import (
    BlockInputs,
    Capacity,
    LayerInputs,
    LayerSpec,
    LogitsSpec,
    MLPSpec,
    QuantSpec,
    Routing,
    RoutingSpec,
    SharedSpec,
)
from moe_conformance.oracle.layer import block_logits, block_routing, expected_block, expected_layer, layer_value
from moe_conformance.oracle.storage import Storage
from moe_conformance.oracle.weights import weights_value
from moe_conformance.reference_impl.layer import layer

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
B, S, H, E = 2, 4, 10, 6
SPEC = LayerSpec(H, E, LogitsSpec(), RoutingSpec(2, renormalize="sum"), MLPSpec(8))


def built(spec: LayerSpec = SPEC, dtype: torch.dtype = FP64) -> BlockInputs:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=random) * shape[-1] ** -0.5).bfloat16().to(dtype)

    tensors = {name: normal(*shape) for name, shape in spec.tensors().items()}
    token_ids = torch.randint(9, (B, S), generator=random)
    if spec.vocab_size:
        table = [torch.randperm(E, generator=random)[: spec.routing.top_k] for _ in range(spec.vocab_size)]
        tensors["router.table"] = torch.stack(table)
    state = normal(B, S, spec.logits.width) if spec.logits.takes_state else None
    return BlockInputs({}, 0, tensors, normal(B, S, H) * 4, token_ids, state)


def reference(inputs: BlockInputs, spec: LayerSpec, routing: Routing | None = None) -> Tensor:
    found = layer(
        inputs.x.flatten(0, 1),
        spec,
        inputs.tensors,
        token_ids=inputs.token_ids.flatten(),
        state=None if inputs.state is None else inputs.state.flatten(0, 1),
        sequences=B,
        routing=routing,
    )
    return found.output


SPECS = {
    "plain": SPEC,
    "table": replace(SPEC, routing=RoutingSpec(2, selector="table", renormalize="sum"), vocab_size=9),
    "zaya": replace(SPEC, logits=LogitsSpec("zaya", width=6, takes_state=True, bias=False)),
    "sequences": replace(SPEC, routing=RoutingSpec(2, capacity=Capacity(tokens=1))),
    "batch": replace(SPEC, routing=RoutingSpec(2, capacity=Capacity(tokens=1, per="batch"))),
    "skip": replace(SPEC, routing=RoutingSpec(2, skip_expert=True)),
    "weighted": replace(
        SPEC,
        routing=RoutingSpec(2, score="sigmoid", shared_classes=2),
        shared=SharedSpec(MLPSpec(8, weight_on="w2_input"), count=2, weighted=True),
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_without_a_routing_a_block_has_the_oracle_s_own_choice(name: str) -> None:
    inputs, spec = built(SPECS[name]), SPECS[name]
    want, bound = expected_block(inputs, spec)
    torch.testing.assert_close(reference(inputs, spec), want, rtol=1e-11, atol=1e-12)
    assert (bound.limit < 1e-12).all()


def some_routing(top_k: int = 2) -> Routing:
    random = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(E, generator=random)[:top_k] for _ in range(B * S)])
    return Routing(ids, torch.rand(ids.shape, generator=random).double())


@pytest.mark.parametrize("name", SPECS)
def test_the_case_s_routing_comes_before_what_an_engine_reports(name: str) -> None:
    """What the router gives shared experts is of its own choice, which the routing does not change."""
    spec, given = SPECS[name], some_routing()
    inputs = replace(built(spec), routing=given)
    want = reference(inputs, spec, given)
    for reported in (None, Routing(given.ids.flip(1), given.weights * 2)):
        torch.testing.assert_close(expected_block(inputs, spec, reported)[0], want, rtol=1e-11, atol=1e-12)


def test_weights_of_shared_experts_go_with_the_experts_that_an_engine_reports() -> None:
    spec, reported = SPECS["weighted"], some_routing()
    inputs = built(spec)
    _, shared = weights_value(block_logits(inputs, spec), reported.ids, spec.routing, inputs.tensors, FP64)
    want = layer_value(
        inputs.x.flatten(0, 1), spec, inputs.tensors, *reported, Storage.stored(FP64), shared_weights=shared
    )
    assert torch.equal(expected_block(inputs, spec, reported)[0], want.exact)
    assert not torch.equal(expected_block(replace(inputs, routing=reported), spec)[0], want.exact)


@pytest.mark.parametrize("name", ["skip", "batch", "plain"])
def test_a_pair_of_weight_0_has_no_expert_where_the_model_skips_or_drops(name: str) -> None:
    spec, (ids, weights) = SPECS[name], some_routing()
    inputs, gone = built(spec), torch.arange(B * S) % 3 == 0
    weights = weights.masked_fill(gone[:, None], 0.0)
    want, _ = expected_block(inputs, spec, Routing(ids, weights))
    other, bound = expected_block(inputs, spec, Routing(ids.masked_fill(gone[:, None], -1), weights))
    torch.testing.assert_close(want, other, rtol=1e-13, atol=1e-14)
    nothing = gone[:, None].expand_as(want)
    assert (bound.limit[nothing] <= torch.finfo(FP64).tiny).all()
    # An id of -1 says so, whatever weight stands beside it.
    no_weight = Routing(ids.masked_fill(gone[:, None], -1), weights.masked_fill(gone[:, None], 0.5))
    torch.testing.assert_close(expected_block(inputs, spec, no_weight)[0], want, rtol=1e-13, atol=1e-14)


def test_a_block_s_router_computes_in_its_input_s_dtype() -> None:
    inputs = built(dtype=BF16)
    routed, logits = block_routing(inputs, SPEC), block_logits(inputs, SPEC)
    assert (routed.logits.dtype, routed.sequences, routed.routing) == (BF16, B, SPEC.routing)
    assert routed.token_ids is not None
    assert routed.token_ids.tolist() == inputs.token_ids.flatten().tolist()  # type: ignore[union-attr]
    assert torch.equal(routed.logits, logits.exact.to(BF16))
    assert (logits.limit >= 0.9 * 2**-9 * logits.exact.abs()).all()
    assert block_routing(replace(inputs, token_ids=None), SPEC).token_ids is None


def layer_inputs(dtype: torch.dtype = FP32) -> LayerInputs:
    inputs = built(dtype=dtype)
    tensors = {name: tensor for name, tensor in inputs.tensors.items() if name != "router.proj"}
    logits = inputs.x.flatten(0, 1)[:, :E].float()
    return LayerInputs(inputs.x.flatten(0, 1), logits, SPEC, tensors)


def test_a_layer_is_computed_from_its_logits_and_padding_changes_nothing() -> None:
    inputs = layer_inputs()
    want, bound = expected_layer(inputs)
    weights, ids = inputs.logits.double().softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    mine = layer_value(inputs.x, SPEC, inputs.tensors, ids, weights, Storage.stored(FP32))
    torch.testing.assert_close(want, mine.exact, rtol=1e-12, atol=1e-12)
    assert (bound.limit > mine.limit).all()
    assert torch.equal(expected_layer(replace(inputs, padded_hidden=16, padded_intermediate=16))[0], want)
    assert bound.origin.startswith("derived: roundings carried through the layer: sums in torch.float32")


def test_a_layer_whose_experts_rounding_may_change_has_no_answer() -> None:
    inputs = layer_inputs()
    inputs.logits[3] = 1.0
    with pytest.raises(ValueError, match=r"inputs are no good: rounding may change the experts of rows \[3\]"):
        expected_layer(inputs)


def test_a_layer_of_stored_experts_is_that_of_their_numbers() -> None:
    """And its bound has room for weights that are made of codes and scales on the way."""
    inputs, quant = layer_inputs(), QuantSpec("int8", "channel")
    codes = {name: t for name, t in inputs.tensors.items() if not name.startswith("experts.w")}
    numbers = dict(codes)
    for name in (name for name in inputs.tensors if name.startswith("experts.w")):
        scale = inputs.tensors[name].abs().amax(-1) / 127
        codes |= {name: (inputs.tensors[name] / scale[..., None]).round().to(torch.int8), f"{name}.scale": scale}
        numbers[name] = codes[name].double() * scale[..., None].double()
    got, bound = expected_layer(replace(inputs, tensors=codes, quant=quant))
    want, less = expected_layer(replace(inputs, tensors=numbers))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert (bound.limit >= less.limit).all()


def test_a_layer_in_a_narrow_dtype_may_have_its_weights_in_it() -> None:
    narrow = layer_inputs(BF16)
    want, bound = expected_layer(narrow)
    weights, ids = narrow.logits.double().softmax(-1).topk(2)
    weights = (weights / weights.sum(-1, keepdim=True)).bfloat16()
    from_rounded = layer_value(narrow.x, SPEC, narrow.tensors, ids, weights, Storage.fused(BF16)).exact
    assert ((from_rounded - want).abs() <= bound.limit).all()
