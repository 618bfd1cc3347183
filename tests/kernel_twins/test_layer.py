"""The whole layer in kernels against the reference's, and what tracing, far memory and every operator need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from kernel_twins.stored import stored_and_exact
from torch import Tensor

from moe_conformance.engine import (
    DenseSpec,
    LatentSpec,
    LayerInputs,
    LayerSpec,
    LogitsSpec,
    MLPSpec,
    QuantSpec,
    Routing,
    RoutingSpec,
    SharedSpec,
)
from moe_conformance.errors import Unsupported
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import distinct_logits, integers, normal, poisoned_allocations
from moe_conformance.kernels import capture as capture_kernels
from moe_conformance.kernels import dispatch, experts, grouped_matmul, padding, routing
from moe_conformance.kernels.capture import capture
from moe_conformance.kernels.layer import layer, moe_layer
from moe_conformance.oracle.layer import layer_bound
from moe_conformance.oracle.storage import Storage
from moe_conformance.reference_impl import layer as reference_layer
from moe_conformance.reference_impl import padding as reference_padding
from moe_conformance.reference_impl import routing as reference_routing
from moe_conformance.reference_impl.operators import keywords

PLAIN = LayerSpec(40, 7, LogitsSpec(), RoutingSpec(3, renormalize="sum"), MLPSpec(24), output_scale=2.5)
# One of each way that the parts come together: with the combine, or around it.
LAYERS = {
    "routed alone": PLAIN,
    "shared": replace(PLAIN, shared=SharedSpec(MLPSpec(36), gate=True)),
    "averaged": replace(PLAIN, shared=SharedSpec(MLPSpec(36), combine="average")),
    "dense": replace(PLAIN, dense=DenseSpec(MLPSpec(36, "gelu_tanh"))),
    "shared and dense": replace(PLAIN, shared=SharedSpec(MLPSpec(36)), dense=DenseSpec(MLPSpec(36))),
    "norms": replace(PLAIN, dense=DenseSpec(MLPSpec(36), norm_eps=0.125)),
    "latent": replace(PLAIN, latent=LatentSpec(20, norm_eps=0.125), shared=SharedSpec(MLPSpec(36))),
    "bias and norm behind": replace(PLAIN, output_bias=True, output_norm=0.125),
    "identity": replace(PLAIN, routing=replace(PLAIN.routing, identity_experts=4)),
}


def tensors_of(spec: LayerSpec) -> dict[str, Tensor]:
    return {n: normal(s, n, std=1.0 if len(s) == 1 else 0.25) for n, s in spec.tensors().items()}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_reference_at_its_own_routing(device: str, name: str) -> None:
    spec, x = LAYERS[name], normal((9, 40), "x")
    tensors = tensors_of(spec)
    with poisoned_allocations():
        got = layer(x.to(device), spec, {n: t.to(device) for n, t in tensors.items()})
    wide = {n: t.double() for n, t in tensors.items()}
    routing_of = Routing(got.ids.cpu().long(), got.weights.cpu().double())
    want = reference_layer.layer(x.double(), spec, wide, routing=routing_of)
    bound = layer_bound(x, spec, tensors, *routing_of, Storage.stored(torch.float32))
    compare.close("output", got.output, want.output, bound)
    own = reference_layer.layer(x.double(), spec, wide)
    compare.equal("experts", got.ids, own.ids)


def same_layer(device: str, spec: LayerSpec, tensors: dict[str, Tensor], exact: dict[str, Tensor], **how: Any) -> None:
    """The stage gives the reference's output of the exact tensors, within the bound of kernels at their routing."""
    x, logits = normal((9, spec.hidden_size), "x"), distinct_logits(9, spec.classes, "logits")
    on = {n: t.to(device) for n, t in tensors.items()}
    with poisoned_allocations():
        got = moe_layer(LayerInputs(x.to(device), logits.to(device), spec, on, **how))
    wide = {n: t.double() for n, t in exact.items()}
    routed = reference_routing.route_logits(logits.double(), spec.routing, wide)
    want = reference_layer.moe_layer(LayerInputs(x.double(), logits.double(), spec, wide))
    bound = layer_bound(x, spec, exact, routed.ids, routed.weights, Storage.stored(torch.float32))
    compare.close("output", got, want, bound)


PADDED = {
    "gated": LayerSpec(20, 7, LogitsSpec(), RoutingSpec(3, renormalize="sum"), MLPSpec(10), output_scale=2.5),
    "bias, no gate": LayerSpec(
        20, 7, LogitsSpec(), RoutingSpec(3, score="sigmoid"), MLPSpec(10, "relu2", gated=False, bias=True)
    ),
    "latent": LayerSpec(32, 7, LogitsSpec(), RoutingSpec(3), MLPSpec(10), latent=LatentSpec(20)),
}


@pytest.mark.parametrize("hidden, intermediate", ((None, None), (24, None), (None, 16), (24, 16)))
@pytest.mark.parametrize("name", PADDED)
def test_padded_widths_are_those_of_the_weights(
    device: str, name: str, hidden: int | None, intermediate: int | None
) -> None:
    """Each padded width alone, both, and neither; what the load leaves behind the true hidden dim is NaN."""
    spec, tensors = PADDED[name], tensors_of(PADDED[name])
    with patch.object(grouped_matmul, "launch_grouped_matmul", wraps=grouped_matmul.launch_grouped_matmul) as launched:
        same_layer(device, spec, tensors, tensors, padded_hidden=hidden, padded_intermediate=intermediate)
    widths = hidden or 20, intermediate or 10
    halves = 2 if spec.experts.gated else 1
    shapes = [tuple(call.args[1].shape) for call in launched.call_args_list]
    compare.same("shapes of weights", shapes, [(7, halves * widths[1], widths[0]), (7, *widths)])


@pytest.mark.parametrize("name", ("shared", "latent"))
@pytest.mark.parametrize("granularity", ("block", "tensor"))
def test_a_layer_takes_float8_experts(device: str, name: str, granularity: Any) -> None:
    """Alone with the combine, and with steps between."""
    spec, quant = LAYERS[name], QuantSpec("fp8_e4m3", granularity, block=(16, 16))
    plain = tensors_of(spec)
    stored, exact = stored_and_exact(quant, spec.experts, plain)
    same_layer(device, spec, plain | stored, plain | exact, quant=quant)


def test_float8_experts_at_padded_widths_are_unsupported(device: str) -> None:
    quant = QuantSpec("fp8_e4m3", "block")
    with pytest.raises(Unsupported, match="padded"):
        same_layer(device, PLAIN, tensors_of(PLAIN), {}, quant=quant, padded_hidden=48)


@pytest.mark.parametrize("name", ("shared", "latent"))
def test_a_layer_takes_rows_of_gate_and_up_in_turn(device: str, name: str) -> None:
    spec, x = LAYERS[name], normal((9, 40), "x")
    tensors = tensors_of(spec)
    turns = torch.arange(48).view(2, 24).T.flatten()
    on = {n: t.to(device) for n, t in (tensors | {"experts.w13": tensors["experts.w13"][:, turns]}).items()}
    got = layer(x.to(device), spec, on, interleaved=True)
    wide = {n: t.double() for n, t in tensors.items()}
    routing_of = Routing(got.ids.cpu().long(), got.weights.cpu().double())
    want = reference_layer.layer(x.double(), spec, wide, routing=routing_of).output
    bound = layer_bound(x, spec, wide, *routing_of, Storage.stored(torch.float32))
    compare.close("output", got.output, want, bound)


# Rows 2^30 elements apart, so that the third begins beyond 2^31; memory in between is never touched.
FAR = 2**30 + 1


@pytest.mark.parametrize("what", ("logits", "experts"))
def test_offsets_of_routing_do_not_wrap_at_32_bits(device: str, what: str) -> None:
    logits = torch.empty(2 * FAR + 7, dtype=torch.float16, device=device).as_strided((3, 7), (FAR, 1))
    view, top_k = (logits, 5) if what == "logits" else (logits.T, 2)
    view.copy_(distinct_logits(*view.shape, "far", torch.float16))
    spec = RoutingSpec(top_k, renormalize="sum")
    want = reference_routing.route_logits(view.cpu().double(), spec, {})
    compare.equal("ids", routing.route_logits(view, spec, {}).ids, want.ids)


def test_offsets_of_rows_do_not_wrap_at_32_bits(device: str) -> None:
    x = torch.empty(2 * FAR + 20, dtype=torch.int8, device=device).as_strided((3, 20), (FAR, 1))
    x.copy_(integers((3, 20), "far", 100))
    compare.equal("far rows", padding.pad(x, 24), reference_padding.pad(x.cpu(), 24))
    compare.equal("far columns", padding.pad(x.T, 4), reference_padding.pad(x.T.cpu(), 4))
    x[:, :6] = 77
    buffer = x.as_strided((3, 2, 3), (FAR, 3, 1))
    ids, flags = integers((3, 3), "ids", 60), torch.zeros(2, dtype=torch.int32, device=device)
    capture(ids.to(device), 0, 3, buffer, 1, 60, flags)
    compare.equal("far tokens", buffer[:, 1], ids)
    compare.equal("their other layer", buffer[:, 0], torch.full((3, 3), 77))
    layers = x.as_strided((3, 3, 3), (3, FAR, 1))
    capture(ids.to(device), 0, 3, layers, 2, 60, torch.zeros(3, dtype=torch.int32, device=device))
    compare.equal("far layers", layers[:, 2], ids)


def test_operators_trace_with_true_shapes(device: str) -> None:
    """torch's own check of a custom operator: schema, fake tensors, mutations declared, aot_autograd."""
    logits, scale = distinct_logits(5, 7, "trace").to(device), normal((7,), "trace").to(device)
    ids = integers((5, 3), "ids", 7).to(device)
    buffer, flags = torch.zeros(5, 2, 3, dtype=torch.int32, device=device), torch.zeros(2, dtype=torch.int32)
    x, share = normal((5, 20), "x").to(device), normal((5, 3), "share").to(device)
    mlp = MLPSpec(12)
    weights = {n: normal(s, n).to(device) for n, s in mlp.tensors("experts", 20, (7,)).items()}
    routed = (x, [*weights], [*weights.values()], ids, share, x, None, [], [], [], 0, 2.5, False)
    gemma4 = keywords(RoutingSpec(3, renormalize="sum", per_expert_scale=True), ("capacity",))
    shared = keywords(RoutingSpec(3, select_on="logits", shared_classes=2), ("capacity",))
    plain = (0, "constant", 1.0)
    for operator, arguments, spec in (
        (routing._route, (logits, None, scale, None, None, 5, *plain), gemma4),
        (routing._route, (logits, None, None, None, None, 5, *plain), shared),
        (routing._route, (logits, None, None, None, None, 3, 2, "router", 1.0), shared),
        (dispatch._align, (ids, 7, 16, None), {}),
        (experts._operator, routed, keywords(mlp)),
        (padding._pad, (logits, 9, 0.0), {}),
        (padding._unpad, (logits, 4), {}),
        (capture_kernels._capture, (ids, 1, 3, buffer, 1, 7, flags.to(device)), {}),
    ):
        torch.library.opcheck(operator, arguments, spec, raise_exception=True)
