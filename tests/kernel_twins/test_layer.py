"""The whole layer in kernels against the reference's, and what tracing, far memory and every operator need."""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_conformance.engine import LayerInputs, Routing
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import distinct_logits, integers, normal, poisoned_allocations
from moe_conformance.kernels import capture as capture_kernels
from moe_conformance.kernels import dispatch, experts, padding, routing
from moe_conformance.kernels.capture import capture
from moe_conformance.kernels.float8 import Quantised
from moe_conformance.kernels.layer import layer, moe_layer
from moe_conformance.model.specs import DenseSpec, LatentSpec, LayerSpec, LogitsSpec, MLPSpec, RoutingSpec, SharedSpec
from moe_conformance.oracle.layer import layer_bound
from moe_conformance.oracle.tolerance import Contract
from moe_conformance.reference_impl import layer as reference_layer
from moe_conformance.reference_impl import padding as reference_padding
from moe_conformance.reference_impl import routing as reference_routing
from moe_conformance.reference_impl.quantised.fp8 import dequantise_fp8, quantise_fp8

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


def test_a_layer_is_the_reference_at_its_own_routing(device: str) -> None:
    for name, spec in LAYERS.items():
        tensors = {n: normal(s, n, std=1.0 if len(s) == 1 else 0.25) for n, s in spec.tensors().items()}
        x = normal((9, 40), "x")
        with poisoned_allocations():
            got = layer(x.to(device), spec, {n: t.to(device) for n, t in tensors.items()})
        wide = {n: t.double() for n, t in tensors.items()}
        routing_of = Routing(got.ids.cpu().long(), got.weights.cpu().double())
        want = reference_layer.layer(x.double(), spec, wide, routing=routing_of)
        bound = layer_bound(x, spec, tensors, *routing_of, Contract.stored(torch.float32))
        compare.close(name, got.output, want.output, bound)
        own = reference_layer.layer(x.double(), spec, wide)
        compare.equal(f"{name}: experts", got.ids, own.ids)


def test_padded_widths_of_layer_inputs_are_those_of_the_weights(device: str) -> None:
    """Each padded width alone, both, and neither; what the load leaves behind the true hidden dim is NaN."""
    x, w13, w2 = normal((9, 20), "x"), normal((7, 20, 20), "w13", std=0.25), normal((7, 20, 10), "w2", std=0.25)
    logits = distinct_logits(9, 7, "logits")
    spec = LayerSpec(20, 7, LogitsSpec(), RoutingSpec(3, renormalize="sum"), MLPSpec(10), output_scale=2.5)
    tensors = {"experts.w13": w13, "experts.w2": w2}
    routing_of = reference_routing.softmax_topk(logits.double(), 3, True)
    wide = {n: t.double() for n, t in tensors.items()}
    want = reference_layer.experts_output(x.double(), spec, wide, *routing_of)
    bound = layer_bound(x, spec, tensors, *routing_of, Contract.stored(torch.float32))
    for hidden, intermediate in ((None, None), (24, None), (None, 16), (24, 16)):
        inputs = LayerInputs(
            *(t.to(device) for t in (x, logits, w13, w2)),
            top_k=3,
            method="softmax_topk_renorm",
            scale=2.5,
            padded_hidden=hidden,
            padded_intermediate=intermediate,
        )
        compare.close(f"padded to {hidden}, {intermediate}", moe_layer(inputs), want, bound)


def test_a_layer_takes_its_experts_as_they_are_stored(device: str) -> None:
    """float8 weights, and rows of gate and up in turn; alone with the combine, and with steps between."""
    for name in ("shared", "latent"):
        spec = LAYERS[name]
        tensors = {n: normal(s, n, std=0.25) for n, s in spec.tensors().items()}
        x = normal((9, 40), "x")
        turns = torch.arange(48).view(2, 24).T.flatten()
        codes, exact, quantised = {}, {}, {}
        for part, stacked in (("w13", 2), ("w2", 1)):
            codes[f"experts.{part}"], scale = quantise_fp8(tensors[f"experts.{part}"], tile=(16, 16), stacked=stacked)
            exact[f"experts.{part}"] = dequantise_fp8(codes[f"experts.{part}"], scale, tile=(16, 16), stacked=stacked)
            quantised[part] = Quantised(scale.to(device), (16, 16))
        for what, stored, storage, meant in (
            ("float8", codes, {"quantised": quantised}, exact),
            ("interleaved", {"experts.w13": tensors["experts.w13"][:, turns]}, {"interleaved": True}, {}),
        ):
            on = {n: t.to(device) for n, t in (tensors | stored).items()}
            got = layer(x.to(device), spec, on, **storage)
            wide = {n: t.double() for n, t in (tensors | meant).items()}
            routing_of = Routing(got.ids.cpu().long(), got.weights.cpu().double())
            want = reference_layer.layer(x.double(), spec, wide, routing=routing_of).output
            bound = layer_bound(x, spec, wide, *routing_of, Contract.stored(torch.float32))
            compare.close(f"{name}, {what}", got.output, want, bound)


def test_offsets_do_not_wrap_at_32_bits(device: str) -> None:
    """Rows 2^30 elements apart, so that the third begins beyond 2^31; memory in between is never touched."""
    far = 2**30 + 1
    logits = torch.empty(2 * far + 7, dtype=torch.float16, device=device).as_strided((3, 7), (far, 1))
    for what, view, top_k in (("far logits", logits, 5), ("far experts", logits.T, 2)):
        view.copy_(distinct_logits(*view.shape, "far", torch.float16))
        want = reference_routing.softmax_topk(view.cpu().double(), top_k, True)
        compare.equal(f"{what}: ids", routing.softmax_topk(view, top_k, True).ids, want.ids)
    x = torch.empty(2 * far + 20, dtype=torch.int8, device=device).as_strided((3, 20), (far, 1))
    x.copy_(integers((3, 20), "far", 100))
    compare.equal("far rows", padding.pad(x, 24), reference_padding.pad(x.cpu(), 24))
    compare.equal("far columns", padding.pad(x.T, 4), reference_padding.pad(x.T.cpu(), 4))
    x[:, :6] = 77
    buffer = x.as_strided((3, 2, 3), (far, 3, 1))
    ids, flags = integers((3, 3), "ids", 60), torch.zeros(2, dtype=torch.int32, device=device)
    capture(ids.to(device), 0, 3, buffer, 1, 60, flags)
    compare.equal("far tokens", buffer[:, 1], ids)
    compare.equal("their other layer", buffer[:, 0], torch.full((3, 3), 77))
    layers = x.as_strided((3, 3, 3), (3, far, 1))
    capture(ids.to(device), 0, 3, layers, 2, 60, torch.zeros(3, dtype=torch.int32, device=device))
    compare.equal("far layers", layers[:, 2], ids)


def test_operators_trace_with_true_shapes(device: str) -> None:
    """torch's own check of a custom operator: schema, fake tensors, mutations declared, aot_autograd."""
    logits, scale = distinct_logits(5, 7, "trace").to(device), normal((7,), "trace").to(device)
    ids = integers((5, 3), "ids", 7).to(device)
    buffer, flags = torch.zeros(5, 2, 3, dtype=torch.int32, device=device), torch.zeros(2, dtype=torch.int32)
    gemma4 = RoutingSpec(3, renormalize="sum", per_expert_scale=True)
    shared = RoutingSpec(3, select_on="logits", shared_classes=2)
    x, share = normal((5, 20), "x").to(device), normal((5, 3), "share").to(device)
    weights = {n: normal(s, n).to(device) for n, s in MLPSpec(12).tensors("experts", 20, (7,)).items()}
    mlp = [getattr(MLPSpec(12), field.name) for field in experts._FIELDS]
    routed = (x, [*weights], [*weights.values()], ids, share, x, None, [], [128, 128], 0, 2.5, False, *mlp)

    def method(spec: RoutingSpec) -> list[object]:
        return [getattr(spec, field.name) for field in routing._FIELDS]

    for operator, arguments in (
        (routing._route, (logits, None, scale, None, None, *method(gemma4))),
        (routing._route, (logits, None, None, None, None, *method(shared))),
        (dispatch._align, (ids, 7, 16, None)),
        (experts._operator, routed),
        (padding._pad, (logits, 9, 0.0)),
        (padding._unpad, (logits, 4)),
        (capture_kernels._capture, (ids, 1, 3, buffer, 1, 7, flags.to(device))),
    ):  # fmt: skip
        torch.library.opcheck(operator, arguments, raise_exception=True)
