"""LoRA on experts: each token gets its own adapter's update, of the right expert and half, scaled once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_conformance.errors import InputError
from moe_conformance.judging.compare import equal
from moe_conformance.judging.inputs import integers, normal
from moe_conformance.model.specs import MLPSpec
from moe_conformance.reference_impl.experts import routed_experts
from moe_conformance.reference_impl.lora import (
    ExpertAdapter,
    LowRank,
    expert_parallel,
    from_peft,
    merge,
    split_fused,
    tensor_parallel,
    with_adapters,
)
from moe_conformance.reference_impl.quantised.experts import fp8_activations, plain, projected_experts

D64 = torch.float64
EXPERTS, HIDDEN, WIDTH, TOKENS, TOP_K = 5, 12, 8, 9, 2
SPEC = MLPSpec(WIDTH, clamp="before", limit=1.5, bias=True)
WEIGHTS = {name: normal(shape, name, D64, 0.25) for name, shape in SPEC.tensors("experts", HIDDEN, (EXPERTS,)).items()}
X = normal((TOKENS, HIDDEN), "x", D64)
IDS = torch.stack([integers((EXPERTS + 1,), f"row{t}", 997).argsort()[:TOP_K] for t in range(TOKENS)])  # 5 is dropped
ROUTING = normal((TOKENS, TOP_K), "routing", D64) * 2.5
TOKEN_ADAPTER = torch.tensor([0, -1, 1, 2, 1, -1, 0, 2, 0])


def low_rank(seed: str, out: int, width: int, rank: int, alpha: float, rslora: bool = False) -> LowRank:
    a, b = normal((EXPERTS, rank, width), seed + "a", D64, 0.5), normal((EXPERTS, out, rank), seed + "b", D64, 0.5)
    return LowRank(a, b, alpha, rslora)


# Ranks, alphas and scalings differ between adapters and projections; the last adapter leaves gate as it is.
ADAPTERS = (
    ExpertAdapter(
        low_rank("g0", WIDTH, HIDDEN, 3, 2.5),
        low_rank("u0", WIDTH, HIDDEN, 2, 5.0),
        low_rank("d0", HIDDEN, WIDTH, 4, 3.0),
    ),
    ExpertAdapter(*split_fused(low_rank("f1", 2 * WIDTH, HIDDEN, 5, 7.0, True)), low_rank("d1", HIDDEN, WIDTH, 2, 1.0)),
    ExpertAdapter(None, low_rank("u2", WIDTH, HIDDEN, 1, 0.5), low_rank("d2", HIDDEN, WIDTH, 3, 4.0, True)),
)


def unmerged(token_adapter: Tensor, x: Tensor = X) -> Tensor:
    project = with_adapters(plain(WEIGHTS), ADAPTERS, token_adapter)
    return projected_experts(x, SPEC, project, IDS, ROUTING, experts=EXPERTS)


def merged(adapter: ExpertAdapter) -> dict[str, Tensor]:
    return WEIGHTS | {f"experts.{name}": merge(name, WEIGHTS[f"experts.{name}"], adapter) for name in ("w13", "w2")}


def near(got: Tensor, want: Tensor) -> None:
    """Both are float64 sums of the same few dozen products in another order."""
    assert (got - want).abs().max() <= 1e-13 * want.abs().max()


def test_each_tokens_output_is_that_of_its_own_adapter_merged() -> None:
    outputs = [routed_experts(X, SPEC, merged(adapter), IDS, ROUTING) for adapter in ADAPTERS]
    outputs.append(routed_experts(X, SPEC, WEIGHTS, IDS, ROUTING))  # index -1
    near(unmerged(TOKEN_ADAPTER), torch.stack([outputs[int(a)][t] for t, a in enumerate(TOKEN_ADAPTER)]))
    for one, other in ((0, 1), (1, 2), (0, 2), (2, 3)):
        assert (outputs[one] - outputs[other]).abs().max() > 0.1


def test_a_merged_weight_is_the_sum_by_hand() -> None:
    gate = LowRank(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0]]]), alpha=2.0)
    up = LowRank(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[1.0, 5.0]]]), alpha=3.0)
    down = LowRank(torch.tensor([[[2.0]]]), torch.tensor([[[1.0], [-1.0]]]), alpha=0.5)
    adapter = ExpertAdapter(gate, up, down)
    assert merge("w13", torch.ones(1, 2, 2), adapter).tolist() == [[[7.0, 13.0], [2.5, 8.5]]]
    assert merge("w2", torch.ones(1, 2, 1), adapter).tolist() == [[[2.0], [0.0]]]
    assert merge("w1", torch.ones(1, 1, 2), adapter).tolist() == [[[2.5, 8.5]]]
    assert merge("w13", torch.ones(1, 2, 2), ExpertAdapter(up=up)).tolist() == [[[1.0, 1.0], [2.5, 8.5]]]


def test_scaling_is_alpha_over_r_or_over_its_root() -> None:
    assert low_rank("s", 4, 4, rank=4, alpha=10.0).scaling == 2.5
    assert low_rank("s", 4, 4, rank=4, alpha=10.0, rslora=True).scaling == 5.0
    assert low_rank("s", 4, 4, rank=2, alpha=1.0, rslora=True).scaling == 1 / math.sqrt(2)


def test_a_fused_update_of_w13_is_that_of_its_halves() -> None:
    fused = low_rank("f", 2 * WIDTH, HIDDEN, 3, 2.5)
    gate, up = split_fused(fused)
    near(merge("w13", WEIGHTS["experts.w13"], ExpertAdapter(gate, up)), WEIGHTS["experts.w13"] + fused.delta())


def test_an_adapter_in_pefts_layout_is_what_peft_merges() -> None:
    """PEFT 0.21.2, merge_and_unload: 2 experts, rank 3, lora_alpha 6, [E, out, in] = [2, 2, 4]."""
    a, b = torch.arange(24.0).reshape(6, 4), torch.arange(12.0).reshape(2, 6)
    assert from_peft(a, b, experts=2, alpha=6).delta().tolist() == [
        [[80, 92, 104, 116], [224, 272, 320, 368]],
        [[320, 338, 356, 374], [896, 950, 1004, 1058]],
    ]
    assert from_peft(a, b, experts=2, alpha=6, rslora=True).scaling == 6 / math.sqrt(3)
    for bad_a, bad_b, experts in ((a, b, 4), (a, b[:, :4], 2), (a[None], b, 2), (a, b[None], 2)):
        with pytest.raises(InputError, match="from_peft"):
            from_peft(bad_a, bad_b, experts, 6)


def test_tokens_without_an_adapter_have_the_base_models_bits() -> None:
    """While other tokens of the same expert have one (vllm#42120)."""
    base = projected_experts(X, SPEC, plain(WEIGHTS), IDS, ROUTING, experts=EXPERTS)
    without = TOKEN_ADAPTER == -1
    equal("output", unmerged(TOKEN_ADAPTER)[without], base[without])
    equal("all without", unmerged(torch.full((TOKENS,), -1)), base)


def test_a_projection_without_a_gate_takes_the_update_of_up() -> None:
    spec = MLPSpec(WIDTH, activation="relu2", gated=False)
    shapes = spec.tensors("experts", HIDDEN, (EXPERTS,))
    weights = {name: normal(shape, name, D64, 0.25) for name, shape in shapes.items()}
    project = with_adapters(plain(weights), ADAPTERS, torch.zeros(TOKENS, dtype=torch.int32))
    whole = {f"experts.{name}": merge(name, weights[f"experts.{name}"], ADAPTERS[0]) for name in ("w1", "w2")}
    got = projected_experts(X, spec, project, IDS, ROUTING, experts=EXPERTS)
    near(got, routed_experts(X, spec, whole, IDS, ROUTING))


def test_adapters_see_what_fp8_has_not_quantised() -> None:
    """On a w8a8 base the update is that of x itself."""
    project = with_adapters(fp8_activations(plain(WEIGHTS)), ADAPTERS, TOKEN_ADAPTER)
    token, x = torch.arange(TOKENS), X
    update = project("w13", 3, token, x) - fp8_activations(plain(WEIGHTS))("w13", 3, token, x)
    plainly = with_adapters(plain(WEIGHTS), ADAPTERS, TOKEN_ADAPTER)("w13", 3, token, x)
    near(update, plainly - plain(WEIGHTS)("w13", 3, token, x))


@pytest.mark.parametrize("ranks", [2, 4])
def test_slices_of_tensor_parallel_ranks_add_up(ranks: int) -> None:
    total = torch.zeros_like(X)
    for rank in range(ranks):
        gate, up, bias_gate, bias_up = (
            half.chunk(ranks, 1)[rank] for name in ("w13", "b13") for half in WEIGHTS[f"experts.{name}"].chunk(2, 1)
        )
        share = {
            "experts.w13": torch.cat([gate, up], 1),
            "experts.b13": torch.cat([bias_gate, bias_up], 1),
            "experts.w2": WEIGHTS["experts.w2"].chunk(ranks, 2)[rank],
            "experts.b2": WEIGHTS["experts.b2"] * (rank == 0),
        }
        adapters = [tensor_parallel(adapter, rank, ranks) for adapter in ADAPTERS]
        project = with_adapters(plain(share), adapters, TOKEN_ADAPTER)
        total += projected_experts(X, SPEC, project, IDS, ROUTING, experts=EXPERTS)
    near(total, unmerged(TOKEN_ADAPTER))


def test_slices_of_expert_parallel_ranks_add_up() -> None:
    total = torch.zeros_like(X)
    for held in (torch.tensor([3, 0]), torch.tensor([1, 2, 4])):
        local = torch.full((EXPERTS + 1,), len(held))
        local[held] = torch.arange(len(held))
        share = {name: tensor[held] for name, tensor in WEIGHTS.items()}
        adapters = [expert_parallel(adapter, held) for adapter in ADAPTERS]
        project = with_adapters(plain(share), adapters, TOKEN_ADAPTER)
        total += projected_experts(X, SPEC, project, local[IDS], ROUTING, experts=len(held))
    near(total, unmerged(TOKEN_ADAPTER))


@pytest.mark.parametrize("bad", [-2, 3])
def test_an_adapter_that_does_not_exist_is_refused(bad: int) -> None:
    with pytest.raises(InputError, match=rf"token_adapter: got \[{bad}\], want -1 or 0 to 2"):
        unmerged(TOKEN_ADAPTER.where(torch.arange(TOKENS) != 4, bad))


def test_matrices_that_do_not_fit_each_other_are_refused() -> None:
    for a, b in (((2, 3, 4), (2, 5, 4)), ((2, 3, 4), (1, 5, 3)), ((3, 4), (5, 3))):
        with pytest.raises(InputError, match="LowRank"):
            LowRank(torch.zeros(a), torch.zeros(b), 1.0)


def test_no_tokens_and_no_adapters() -> None:
    project = with_adapters(plain(WEIGHTS), (), torch.full((0,), -1))
    nothing = projected_experts(X[:0], SPEC, project, IDS[:0], ROUTING[:0], experts=EXPERTS)
    assert nothing.shape == (0, HIDDEN)
