"""LoRA on experts: each token gets its own adapter's update, of the right expert and matrix, scaled once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_conformance.engine import ExpertsInputs, Lora, LoraSpec, MLPSpec, QuantSpec
from moe_conformance.errors import InputError
from moe_conformance.judging.compare import equal
from moe_conformance.judging.inputs import integers, normal
from moe_conformance.reference_impl.experts import experts, plain
from moe_conformance.reference_impl.lora import (
    expert_parallel,
    from_peft,
    merged,
    scaling,
    side_by_side,
    tensor_parallel,
    with_adapters,
)
from moe_conformance.reference_impl.parallel.experts import slice_width, take_experts
from moe_conformance.reference_impl.quantised.experts import quantised_activations

D64 = torch.float64
EXPERTS, HIDDEN, WIDTH, TOKENS, TOP_K = 5, 12, 7, 9, 2
SPEC = MLPSpec(WIDTH, clamp="before", limit=1.5, bias=True)
NOT_GATED = MLPSpec(WIDTH, activation="relu2", gated=False)
LORA = LoraSpec(adapters=3, rank=4, alpha=2.5)
TOKEN_ADAPTER = torch.tensor([0, -1, 1, 2, 1, -1, 0, 2, 0])


def lora(spec: MLPSpec = SPEC, dtype: torch.dtype = D64, lora_spec: LoraSpec = LORA) -> Lora:
    shapes = lora_spec.tensors(spec, HIDDEN, EXPERTS)
    return Lora(lora_spec, {name: normal(shape, name, dtype, 0.5) for name, shape in shapes.items()}, TOKEN_ADAPTER)


def inputs(spec: MLPSpec = SPEC, given: Lora | None = None, dtype: torch.dtype = D64) -> ExpertsInputs:
    """Every row has two of the experts, or one and a dropped pair."""
    shapes = spec.tensors("experts", HIDDEN, (EXPERTS,))
    tensors = {name: normal(shape, name, dtype, 0.25) for name, shape in shapes.items()}
    order = torch.stack([integers((EXPERTS + 1,), f"row{t}", 997).argsort()[:TOP_K] for t in range(TOKENS)]) - 1
    x, weights = normal((TOKENS, HIDDEN), "x", dtype), normal((TOKENS, TOP_K), "routing", D64) * 2.5
    return ExpertsInputs(x, spec, tensors, order, weights, lora=given)


def near(got: Tensor, want: Tensor) -> None:
    """Both are float64 sums of the same few dozen products in another order."""
    assert (got - want).abs().max() <= 1e-13 * want.abs().max()


@pytest.mark.parametrize("spec", [SPEC, NOT_GATED], ids=["gated", "not-gated"])
@pytest.mark.parametrize("rslora", [False, True])
def test_each_tokens_output_is_that_of_its_own_adapter_merged(spec: MLPSpec, rslora: bool) -> None:
    given = lora(spec, lora_spec=replace(LORA, rslora=rslora))
    base = inputs(spec)
    whole = [replace(base, tensors=merged(spec, base.tensors, given, adapter)) for adapter in range(3)]
    outputs = [experts(own) for own in (*whole, base)]  # index -1: no adapter
    near(experts(replace(base, lora=given)), torch.stack([outputs[int(a)][t] for t, a in enumerate(TOKEN_ADAPTER)]))
    for one, other in ((0, 1), (1, 2), (0, 2), (2, 3)):
        assert (outputs[one] - outputs[other]).abs().max() > 0.1


def test_a_merged_weight_is_the_sum_by_hand() -> None:
    a = {"lora.w13.a": torch.tensor([[1.0, 2.0]]), "lora.w2.a": torch.tensor([[2.0]])}
    b = {"lora.w13.b": torch.tensor([[3.0], [0.5]]), "lora.w2.b": torch.tensor([[1.0], [-1.0]])}
    given = Lora(LoraSpec(1, 1, 2.0), {n: t[None, None] for n, t in (a | b).items()}, torch.tensor([0]))
    ones = {"experts.w13": torch.ones(1, 2, 2), "experts.w2": torch.ones(1, 2, 1)}
    got = merged(MLPSpec(1), ones, given, 0)
    assert got["experts.w13"].tolist() == [[[7.0, 13.0], [2.0, 3.0]]]
    assert got["experts.w2"].tolist() == [[[5.0], [-3.0]]]
    assert ones["experts.w13"].tolist() == [[[1.0, 1.0], [1.0, 1.0]]]


def test_scaling_is_alpha_over_r_or_over_its_root() -> None:
    assert scaling(LoraSpec(1, 4, 10.0)) == 2.5
    assert scaling(LoraSpec(1, 4, 10.0, rslora=True)) == 5.0
    assert scaling(LoraSpec(1, 2, 1.0, rslora=True)) == 1 / math.sqrt(2)


def test_updates_of_gate_and_up_fuse_into_one_of_both_ranks() -> None:
    shapes = {"gate": (2, 3), "up": (4, 3)}  # ranks 2 and 4
    a = {half: normal((EXPERTS, rank, HIDDEN), half + "a", D64) for half, (rank, _) in shapes.items()}
    b = {half: normal((EXPERTS, WIDTH, rank), half + "b", D64) for half, (rank, _) in shapes.items()}
    fused_a, fused_b = side_by_side((a["gate"], b["gate"]), (a["up"], b["up"]))
    assert fused_a.shape == (EXPERTS, 6, HIDDEN)
    near(fused_b @ fused_a, torch.cat([b["gate"] @ a["gate"], b["up"] @ a["up"]], dim=1))


def test_an_adapter_in_pefts_layout_is_what_peft_merges() -> None:
    """PEFT 0.21.2, merge_and_unload: 2 experts, rank 3, lora_alpha 6, [E, out, in] = [2, 2, 4]."""
    a, b = torch.arange(24.0).reshape(6, 4), torch.arange(12.0).reshape(2, 6)
    own_a, own_b = from_peft(a, b, experts=2)
    assert (scaling(LoraSpec(1, 3, 6.0)) * own_b @ own_a).tolist() == [
        [[80, 92, 104, 116], [224, 272, 320, 368]],
        [[320, 338, 356, 374], [896, 950, 1004, 1058]],
    ]
    for bad_a, bad_b, count in ((a, b, 4), (a, b[:, :4], 2), (a[None], b, 2), (a, b[None], 2)):
        with pytest.raises(InputError, match="from_peft"):
            from_peft(bad_a, bad_b, count)


@pytest.mark.parametrize("dtype", [D64, torch.bfloat16], ids=str)
def test_tokens_without_an_adapter_have_the_base_models_bits(dtype: torch.dtype) -> None:
    """While other tokens of the same expert have one (vllm#42120)."""
    given = lora(dtype=dtype)
    base, adapted = experts(inputs(dtype=dtype)), experts(inputs(given=given, dtype=dtype))
    without = TOKEN_ADAPTER == -1
    equal("output", adapted[without], base[without])
    assert not torch.equal(adapted[~without], base[~without])
    nobody = replace(given, adapters=torch.full((TOKENS,), -1))
    equal("all without", experts(inputs(given=nobody, dtype=dtype)), base)


def test_updates_of_narrow_dtypes_are_kept_in_float32() -> None:
    """A x is 257, which is 256 in bfloat16, as W x is -256: 1 is left, or nothing."""
    base = {"experts.w1": torch.tensor([[[-256.0, 0.0]]]), "experts.w2": torch.ones(1, 2, 1)}
    update = {"lora.w1.a": torch.tensor([[[[256.0, 1.0]]]]), "lora.w1.b": torch.ones(1, 1, 1, 1)}
    nothing = {"lora.w2.a": torch.zeros(1, 1, 1, 1), "lora.w2.b": torch.zeros(1, 1, 2, 1)}
    base, update = ({name: t.bfloat16() for name, t in tensors.items()} for tensors in (base, update | nothing))
    given = Lora(LoraSpec(1, 1, 1.0), update, torch.tensor([0]))
    x, ids = torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([[0]])
    spec = MLPSpec(1, "relu", gated=False)
    assert experts(ExpertsInputs(x, spec, base, ids, torch.ones(1, 1), lora=given)).tolist() == [[1.0, 1.0]]


def test_adapters_see_what_fp8_has_not_quantised() -> None:
    """On a w8a8 base the update is that of x itself."""
    base, quant = inputs(), QuantSpec("fp8_e4m3", "channel", activations="token")
    rough = quantised_activations(plain(base.tensors), quant, {})
    at = ("w13", 3, torch.arange(TOKENS), base.x)
    update = with_adapters(rough, lora())(*at) - rough(*at)
    near(update, with_adapters(plain(base.tensors), lora())(*at) - plain(base.tensors)(*at))
    assert (rough(*at) - plain(base.tensors)(*at)).abs().max() > 1e-3


@pytest.mark.parametrize("spec", [SPEC, NOT_GATED], ids=["gated", "not-gated"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_slices_of_tensor_parallel_ranks_add_up(ranks: int, spec: MLPSpec) -> None:
    """Of a width of 7, which they do not divide evenly."""
    base, given, total = inputs(spec), lora(spec), torch.zeros(TOKENS, HIDDEN, dtype=D64)
    for rank in range(ranks):
        narrow, tensors = slice_width(spec, base.tensors, "experts", rank, ranks)
        own = tensor_parallel(spec, given, rank, ranks)
        assert {n: tuple(t.shape) for n, t in own.tensors.items()} == LORA.tensors(narrow, HIDDEN, EXPERTS)
        total += experts(replace(base, mlp=narrow, tensors=tensors, lora=own))
    near(total, experts(replace(base, lora=given)))


def test_slices_of_expert_parallel_ranks_add_up() -> None:
    base, total = inputs(), torch.zeros(TOKENS, HIDDEN, dtype=D64)
    for held in (torch.tensor([3, 0]), torch.tensor([1, 2, 4])):
        owners = torch.full((EXPERTS,), -1, dtype=torch.int32)
        owners[held] = torch.arange(len(held), dtype=torch.int32)
        own = replace(base, tensors=take_experts(base.tensors, held), expert_map=owners)
        total += experts(replace(own, lora=expert_parallel(lora(), held)))
    near(total, experts(inputs(given=lora())))


@pytest.mark.parametrize("bad", [-2, 3])
def test_an_adapter_that_does_not_exist_is_refused(bad: int) -> None:
    given = replace(lora(), adapters=TOKEN_ADAPTER.where(torch.arange(TOKENS) != 4, bad))
    with pytest.raises(InputError, match=rf"lora.adapters: got \[{bad}\], want -1 or 0 to 2"):
        experts(inputs(given=given))


@pytest.mark.parametrize("name", ["lora.w13.a", "lora.w2.b"])
def test_matrices_that_do_not_fit_the_spec_are_refused(name: str) -> None:
    given = lora()
    for bad in (given.tensors[name][:2], given.tensors[name].mT, given.tensors[name][0]):
        with pytest.raises(InputError, match=rf"{name}: got .*want 3 adapters of rank 4"):
            experts(inputs(given=replace(given, tensors={**given.tensors, name: bad})))


def test_no_tokens_have_no_adapters() -> None:
    nobody = replace(lora(), adapters=TOKEN_ADAPTER[:0])
    base = inputs()
    got = experts(replace(base, x=base.x[:0], ids=base.ids[:0], weights=base.weights[:0], lora=nobody))
    assert got.shape == (0, HIDDEN)
