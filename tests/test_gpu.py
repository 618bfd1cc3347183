"""The kernels recorded in a CUDA graph, and free of waits for the device; their answers are tests/kernel_twins."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from moe_conformance.running.devices import gpu_count

if not gpu_count():
    pytest.skip("needs a GPU, and there is none", allow_module_level=True)

import torch
from torch import Tensor

from moe_conformance.engine import CaptureSpec, LayerSpec, LogitsSpec, MLPSpec, RouteInputs, RoutingSpec, Rows
from moe_conformance.errors import InputError
from moe_conformance.judging.inputs import distinct_logits, integers, normal, poison_
from moe_conformance.reference_impl import experts as reference_experts
from moe_conformance.reference_impl import layer as reference_layer
from moe_conformance.reference_impl import routing as reference_routing
from moe_conformance.reference_impl.capture import Capturer, raise_rejected

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU, though the machine has one", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled in this process", allow_module_level=True)

TOKENS, LAYERS, TOP_K, EXPERTS = 9, 3, 4, 60
HIDDEN, WIDTH = 72, 48
# Tokens on each path of the experts: pairs not sorted; sorted in one launch; counted first, being more than 4096.
PATHS = pytest.mark.parametrize("tokens", [3, TOKENS, 1100], ids=["unsorted", "sorted", "counted"])
LAYER = LayerSpec(HIDDEN, EXPERTS, LogitsSpec(), RoutingSpec(TOP_K, renormalize="sum"), MLPSpec(WIDTH))


def recorded(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The step in a graph, after a run outside it, in which kernels are compiled."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def ids_of(step: int, rows: int = TOKENS) -> Tensor:
    return integers((rows, TOP_K), f"step {step}", EXPERTS).cuda()


@pytest.mark.parametrize("rows", [TOKENS, 2000], ids=["one-launch", "two-launches"])
def test_captured_ids_follow_their_tensor_when_the_graph_is_replayed(rows: int) -> None:
    from moe_conformance.kernels.capture import capture

    ids = ids_of(0, rows)
    buffer = poison_(torch.empty(rows, LAYERS, TOP_K, dtype=torch.int16, device="cuda"))
    rejected = torch.zeros(LAYERS, dtype=torch.int32, device="cuda")
    graph = recorded(lambda: capture(ids, 2, rows - 3, buffer, 1, EXPERTS, rejected))
    for step in (1, 2):
        ids.copy_(ids_of(step, rows))
        graph.replay()
        assert torch.equal(buffer[: rows - 3, 1].long(), ids[2:-1])
    kept = buffer.clone()
    ids.copy_(ids_of(3, rows))
    ids[5, 1] = EXPERTS
    graph.replay()
    assert torch.equal(buffer, kept), "a step with an id out of range has changed the buffer"
    with pytest.raises(InputError, match="layer 1 row 3"):
        raise_rejected(rejected)
    ids[5, 1] = 0
    graph.replay()
    assert torch.equal(buffer[: rows - 3, 1].long(), ids[2:-1])
    assert (buffer[rows - 3 :] == torch.iinfo(torch.int16).min).all()
    assert (buffer[:, [0, 2]] == torch.iinfo(torch.int16).min).all()


@pytest.mark.parametrize("kernel", [False, True], ids=["reference", "kernel"])
def test_a_capture_session_gives_each_replay_its_own_ids(kernel: bool) -> None:
    from moe_conformance.kernels.capture import capture

    session = Capturer(CaptureSpec(TOKENS, LAYERS, TOP_K, EXPERTS, dp_rank=1, dp_size=2), device="cuda")
    if kernel:
        session.write = capture
    ids = [ids_of(layer) for layer in range(LAYERS)]
    rows = Rows("concatenated", (4, TOKENS - 4))

    def step() -> None:
        for layer in range(LAYERS):
            session.capture(layer, ids[layer], rows)

    graph = recorded(step)
    for number in (10, 20):
        for layer in range(LAYERS):
            ids[layer].copy_(ids_of(number + layer))
        graph.replay()
        want = torch.stack([own[4:] for own in ids], dim=1)
        assert torch.equal(session.read(TOKENS - 4).long(), want)


def test_routing_follows_its_logits_when_the_graph_is_replayed() -> None:
    from moe_conformance.kernels.routing import route

    logits = distinct_logits(TOKENS, EXPERTS, "graph").cuda()
    inputs = RouteInputs(logits, LAYER.routing, valid_rows=TOKENS - 2)
    answers: list[Tensor] = []
    graph = recorded(lambda: answers.append(route(inputs).ids))
    logits.copy_(distinct_logits(TOKENS, EXPERTS, "another"))
    graph.replay()
    assert torch.equal(answers[-1].cpu().long(), reference_routing.route(replace(inputs, logits=logits.cpu())).ids)


def layer_tensors() -> dict[str, Tensor]:
    """On the GPU; every value is exact in float32, so that the reference computes with the same."""
    return {name: normal(shape, name, std=1 / 8).cuda() for name, shape in LAYER.tensors().items()}


def tokens_of(step: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], ids [T, K] with one that names no expert, and weights [T, K]."""
    ids = distinct_logits(tokens, EXPERTS, f"ids {step}").topk(TOP_K).indices.int()
    ids[step % tokens, 1] = -1
    weights = normal((tokens, TOP_K), f"weights {step}").softmax(-1)
    return normal((tokens, HIDDEN), f"x {step}").cuda(), ids.cuda(), weights.cuda()


def exact_experts(tensors: dict[str, Tensor], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    tensors = {name: tensor.cpu().double() for name, tensor in tensors.items()}
    x, weights = x.cpu().double(), weights.cpu().double()
    return reference_experts.routed_experts(x, LAYER.experts, tensors, ids.cpu(), weights)


def close(got: Tensor, want: Tensor) -> None:
    """float32 sums of 72 and 48 products, of values around 1."""
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-5)


@PATHS
def test_the_experts_follow_their_inputs_when_the_graph_is_replayed(tokens: int) -> None:
    from moe_conformance.kernels.experts import routed_experts

    tensors = layer_tensors()
    x, ids, weights = tokens_of(0, tokens)
    answers: list[Tensor] = []
    graph = recorded(lambda: answers.append(routed_experts(x, LAYER.experts, tensors, ids, weights)))
    for step in (1, 2):
        for tensor, following in zip((x, ids, weights), tokens_of(step, tokens), strict=True):
            tensor.copy_(following)
        graph.replay()
        close(answers[-1], exact_experts(tensors, x, ids, weights))


@PATHS
def test_the_layer_follows_its_inputs_and_weights_when_the_graph_is_replayed(tokens: int) -> None:
    from moe_conformance.kernels.layer import layer

    tensors = layer_tensors()
    x, _, _ = tokens_of(0, tokens)
    answers = []
    graph = recorded(lambda: answers.append(layer(x, LAYER, tensors)))
    x.copy_(tokens_of(1, tokens)[0])
    tensors["router.proj"].copy_(normal((EXPERTS, HIDDEN), "another router", std=1 / 8))
    graph.replay()
    output, ids, weights, _ = answers[-1]
    exact = reference_layer.layer(x.cpu().double(), LAYER, {name: t.cpu().double() for name, t in tensors.items()})
    assert torch.equal(ids.cpu().long(), exact.ids.long())
    close(weights, exact.weights)
    close(output, exact.output)


@PATHS
def test_dispatch_follows_its_ids_when_the_graph_is_replayed(tokens: int) -> None:
    from moe_conformance.kernels.dispatch import align
    from moe_conformance.reference_impl.dispatch import align as reference_align

    ids = tokens_of(0, tokens)[1]
    answers = []
    graph = recorded(lambda: answers.append(align(ids, EXPERTS, 16)))
    for step in (1, 2):
        ids.copy_(tokens_of(step, tokens)[1])
        graph.replay()
        for got, want in zip(answers[-1], reference_align(ids.cpu(), EXPERTS, 16), strict=True):
            assert torch.equal(got.cpu(), want)


@pytest.fixture
def no_waiting() -> Iterator[Callable[[], None]]:
    """From its call to the end of the test, what makes the host wait for the device raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@PATHS
def test_no_stage_of_the_layer_waits_for_the_device(tokens: int, no_waiting: Callable[[], None]) -> None:
    from moe_conformance.kernels.capture import capture
    from moe_conformance.kernels.dispatch import align
    from moe_conformance.kernels.experts import routed_experts
    from moe_conformance.kernels.layer import layer

    tensors = layer_tensors()
    x, ids, weights = tokens_of(0, tokens)
    taken = layer(x, LAYER, tensors).ids
    buffer = torch.zeros(tokens, LAYERS, TOP_K, dtype=torch.uint8, device="cuda")
    rejected = torch.zeros(LAYERS, dtype=torch.int32, device="cuda")

    def step() -> None:
        layer(x, LAYER, tensors)
        routed_experts(x, LAYER.experts, tensors, ids, weights)
        align(ids, EXPERTS, 16)
        capture(taken, 0, tokens, buffer, 1, EXPERTS, rejected)

    step()  # compiled, which may wait
    no_waiting()
    step()
