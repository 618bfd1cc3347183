"""Experts by themselves: pairs that add nothing, other ranks' experts, and the sum of all ranks' parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_conformance.engine import ExpertsInputs, MLPSpec
from moe_conformance.oracle.experts import divided, divisor, expected_experts, expected_parts, shared_slices
from moe_conformance.oracle.storage import Storage
from moe_conformance.reference_impl.experts import experts

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
T, E, K, D = 9, 6, 3, 10

MLPS = {
    "silu": MLPSpec(12),
    "plain-bias": MLPSpec(12, "relu", gated=False, bias=True),
    "oai": MLPSpec(12, clamp="before", limit=0.75, alpha=1.7, up_offset=1.0, bias=True),
    "input": MLPSpec(12, weight_on="input"),
    "norm": MLPSpec(12, output_norm=0.25),
}


def built(mlp: MLPSpec, dtype: torch.dtype = FP64, seed: int = 0, **given: Any) -> ExpertsInputs:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=random) * shape[-1] ** -0.5).bfloat16().to(dtype)

    tensors = {name: normal(*shape) for name, shape in mlp.tensors("experts", D, (E,)).items()}
    count = E + given.get("identity_experts", 0)
    ids = torch.stack([torch.randperm(count, generator=random)[:K] for _ in range(T)])
    weights = torch.rand(T, K, generator=random).to(torch.promote_types(dtype, FP32))
    return ExpertsInputs(normal(T, D) * 3, mlp, tensors, ids, weights, **given)


@pytest.mark.parametrize("given", [{}, {"identity_experts": 2}, {"output_scale": 2.5}], ids=str)
@pytest.mark.parametrize("name", MLPS)
def test_the_float64_sum_is_the_reference_s(name: str, given: dict[str, Any]) -> None:
    inputs = built(MLPS[name], **given)
    want, _ = expected_experts(inputs)
    torch.testing.assert_close(experts(inputs), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", MLPS)
def test_a_correct_sum_is_below_its_bound_and_not_far_below(name: str, dtype: torch.dtype) -> None:
    ratios = []
    for seed in range(6):
        inputs = built(MLPS[name], dtype, seed, output_scale=2.5, identity_experts=1)
        want, bound = expected_experts(inputs)
        ratios.append(float(((experts(inputs).double() - want).abs() / bound.limit).max()))
    assert max(ratios) < 0.6
    assert dtype == FP32 or max(ratios) > 0.1


def test_a_pair_without_expert_adds_exactly_nothing() -> None:
    inputs = built(MLPS["silu"], identity_experts=2)
    gone = inputs.ids % 3 == 0
    without = replace(inputs, weights=inputs.weights.masked_fill(gone, 0.0))
    want, _ = expected_experts(without)
    for number in (-1, E + 2, 10**9, -7):
        got, bound = expected_experts(replace(inputs, ids=inputs.ids.masked_fill(gone, number)))
        assert torch.equal(got, want)
        nothing = gone.all(-1)
        assert (bound.limit[nothing] <= torch.finfo(FP64).tiny).all()


def test_other_ranks_experts_add_nothing_and_local_ids_may_be_in_any_order() -> None:
    inputs = built(MLPS["plain-bias"], identity_experts=1)
    whole, _ = expected_experts(inputs)
    here, there = [4, 0, 3], [1, 5, 2]
    parts = []
    for held in (here, there):
        local = torch.full((E,), -1, dtype=torch.int32)
        local[held] = torch.arange(3, dtype=torch.int32)
        own = {name: tensor[held] for name, tensor in inputs.tensors.items()}
        part = replace(inputs, tensors=own, expert_map=local)
        assert part.experts == E
        parts.append(expected_experts(part)[0])
    only_identity, _ = expected_experts(replace(inputs, ids=inputs.ids.where(inputs.ids == E, -1)))
    torch.testing.assert_close(sum(parts) - only_identity, whole, rtol=1e-12, atol=1e-12)


def test_a_scale_multiplies_the_sum_and_its_error() -> None:
    inputs = built(MLPS["silu"], BF16)
    one, bound = expected_experts(inputs)
    twice, wider = expected_experts(replace(inputs, output_scale=2.0))
    assert torch.equal(twice, 2 * one)
    assert (wider.limit > 2 * bound.limit).all()
    assert (wider.limit < 2 * bound.limit + 2.1 * 2**-8 * one.abs() + 1e-6).all()


def test_a_policy_that_stores_less_has_a_smaller_bound() -> None:
    inputs = built(MLPS["silu"], BF16)
    (stored, wide), (fused, narrow) = (expected_experts(inputs, s) for s in (None, Storage.fused(BF16)))
    assert torch.equal(stored, fused)
    assert (narrow.limit < wide.limit).all()
    assert "running sum in torch.float32" in narrow.origin
    assert "running sum in torch.bfloat16" in wide.origin


@pytest.mark.parametrize("name", MLPS)
def test_slices_of_an_mlp_sum_to_it(name: str) -> None:
    mlp = replace(MLPS[name], output_norm=0.0, weight_on="output")
    inputs = built(mlp)
    tensors = {n.removeprefix("experts."): t[0] for n, t in inputs.tensors.items() if n != "experts.output_norm"}
    everybody = replace(inputs, ids=torch.zeros(T, 1, dtype=torch.long), weights=torch.ones(T, 1))

    def alone(mlp: MLPSpec, tensors: dict[str, Tensor]) -> Tensor:
        own = {f"experts.{n}": t[None] for n, t in tensors.items()}
        return expected_experts(replace(everybody, mlp=mlp, tensors=own))[0]

    parts = shared_slices(mlp, tensors, 3)
    assert [narrow.width for narrow, _ in parts] == [4, 4, 4]
    torch.testing.assert_close(sum(alone(*part) for part in parts), alone(mlp, tensors), rtol=1e-12, atol=1e-12)


def test_a_width_is_cut_into_the_next_number_of_slices_that_divides_it() -> None:
    assert [divisor(12, parts) for parts in (1, 2, 5, 7, 12)] == [1, 2, 6, 12, 12]
    norm = torch.ones(5)
    assert divided("experts.output_norm", norm, MLPS["norm"], 4) is norm


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("size", "tp"), [(1, 1), (3, 1), (1, 2), (2, 5)])
@pytest.mark.parametrize("name", ["silu", "plain-bias"])
def test_parts_of_ranks_sum_to_the_whole_layer_within_the_bound(
    name: str, size: int, tp: int, dtype: torch.dtype
) -> None:
    """Ranks by hand: each has some experts, or a slice of their width; each stores its part in x's dtype."""
    shared = MLPSpec(20)
    ratios = []
    for seed in range(4):
        inputs = built(MLPS[name], dtype, seed, identity_experts=1)
        random = torch.Generator().manual_seed(seed)
        own = {
            n: (torch.randn(s, generator=random) * s[-1] ** -0.5).to(dtype)
            for n, s in shared.tensors("shared", D).items()
        }
        want, bound = expected_parts(inputs, shared, own, size, tp)
        total = torch.zeros(T, D, dtype=FP64)
        widths = torch.arange(12).tensor_split(tp)
        columns = torch.arange(20).tensor_split(size * tp)
        for rank in range(size):
            ids = inputs.ids.where((inputs.ids % size == rank), -1)
            for part, width in enumerate(widths):
                mine = columns[rank * tp + part]
                total += _part(replace(inputs, ids=ids), width, part == 0, shared, own, mine).double()
        ratios.append(float(((total - want).abs() / bound.limit).max()))
    assert max(ratios) < 0.8
    assert dtype == FP32 or max(ratios) > 0.05


def _part(
    inputs: ExpertsInputs, width: Tensor, first: bool, shared: MLPSpec, tensors: dict[str, Tensor], columns: Tensor
) -> Tensor:
    rows = torch.cat([width, width + 12]) if inputs.mlp.gated else width
    own = {}
    for name, tensor in inputs.tensors.items():
        part = name.removeprefix("experts.")
        own[name] = tensor * first if part == "b2" else tensor[..., width] if part == "w2" else tensor[:, rows]
    ids = inputs.ids if first else inputs.ids.where(inputs.ids < E, -1)
    routed = experts(replace(inputs, ids=ids, mlp=replace(inputs.mlp, width=len(width)), tensors=own))
    gate, up = tensors["shared.w13"][columns], tensors["shared.w13"][columns + 20]
    always = torch.nn.functional.silu(inputs.x @ gate.T) * (inputs.x @ up.T) @ tensors["shared.w2"][:, columns].T
    return routed + always


def test_the_whole_of_parts_is_the_sum_of_experts_and_shared() -> None:
    inputs, shared = built(MLPS["oai"], output_scale=1.5), MLPSpec(8)
    own = {n: torch.ones(s, dtype=FP64) / 8 for n, s in shared.tensors("shared", D).items()}
    routed, alone = expected_parts(inputs, None, {}, 2, 2)
    want, with_shared = expected_parts(inputs, shared, own, 2, 2)
    assert torch.equal(routed, expected_experts(inputs)[0])
    gate = (inputs.x.sum(-1, keepdim=True) / 8).expand(T, 8)
    torch.testing.assert_close(want - routed, (gate * gate.sigmoid() * gate).mean(-1, keepdim=True).expand(T, D))
    assert (with_shared.limit > alone.limit).all()
    assert with_shared.origin.count("by 2 x 2 ranks") == 1
