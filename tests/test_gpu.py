"""The kernels compiled, and captures recorded in a CUDA graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_conformance.devices import gpu_count

if not gpu_count():
    pytest.skip("needs a GPU, and there is none", allow_module_level=True)

import torch
from torch import Tensor

from moe_conformance.engine import CaptureSpec, Rows
from moe_conformance.errors import InputError
from moe_conformance.inputs import distinct_logits, integers, poison_
from moe_conformance.reference_impl.capture import Capturer, raise_rejected

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU, though the machine has one", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled in this process", allow_module_level=True)

TOKENS, LAYERS, TOP_K, EXPERTS = 9, 3, 4, 60


def test_compiled_kernels_equal_the_reference() -> None:
    twins = Path(__file__).with_name("kernel_twins.py")
    ran = subprocess.run([sys.executable, "-W", "ignore", twins, "cuda"], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    outcome = json.loads(ran.stdout.splitlines()[-1])
    failed = {check: error for check, error in outcome.items() if error is not None}
    assert outcome and not failed, "\n".join(f"{check}:\n{error}" for check, error in failed.items())


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
    from moe_conformance.kernels.routing import softmax_topk

    logits = distinct_logits(TOKENS, EXPERTS, "graph").cuda()
    answers: list[Tensor] = []
    graph = recorded(lambda: answers.append(softmax_topk(logits, TOP_K, True).ids))
    logits.copy_(distinct_logits(TOKENS, EXPERTS, "another"))
    graph.replay()
    assert torch.equal(answers[-1], softmax_topk(logits, TOP_K, True).ids)
