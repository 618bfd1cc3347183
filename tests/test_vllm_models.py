"""vLLM's adapter without vLLM: configs as published, parameters by canonical name, silenced decoder layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_conformance.engine import RECORDS, Target, checkpoint_of
from moe_conformance.engines import decoder, published, servers
from moe_conformance.engines.vllm import loading, quantised
from moe_conformance.engines.vllm.refusing import refusals
from moe_conformance.errors import Unsupported
from moe_conformance.suites.block.blocks import tensors_of
from moe_conformance.suites.block.configs import VARIANTS
from moe_conformance.suites.load.stored import ENCODED, TILE


def of_family(model_type: str, architecture: str, **keys: Any) -> dict[str, Any]:
    record = RECORDS[model_type]
    config = {**VARIANTS[record.slug].config, **keys}
    return published.config(record, architecture, config)


def test_a_key_that_transformers_derives_is_derived_back() -> None:
    assert of_family("axk1", "AXK1ForCausalLM")["first_k_dense_replace"] == 1
    assert of_family("glm4_moe", "Glm4MoeForCausalLM")["head_dim"] == 32
    assert of_family("mimo_v2_flash", "MiMoV2FlashForCausalLM")["moe_layer_freq"] == [0, 1]


def test_a_config_that_says_nothing_of_its_layers_gets_no_number_of_them() -> None:
    record = RECORDS["glm4_moe_lite"]
    found = published.config(record, "Glm4MoeLiteForCausalLM", {"model_type": "glm4_moe_lite"})
    assert "first_k_dense_replace" not in found


def test_a_list_of_layers_that_no_number_says_is_told() -> None:
    for model_type, types, lossy in (
        ("axk1", ["dense", "sparse", "dense"], True),
        ("axk1", ["dense", "sparse", "sparse"], False),
        ("axk1", ["dense"], False),
        ("axk1", None, False),
        ("laguna", ["dense", "sparse", "dense"], False),
    ):
        assert published.is_lossy(RECORDS[model_type], {"mlp_layer_types": types}) is lossy, (model_type, types)
    nested = {"text_config": {"mlp_layer_types": ["sparse", "dense"]}}
    assert published.is_lossy(RECORDS["inkling_text"], nested)


def test_a_key_that_the_config_has_stays() -> None:
    assert of_family("axk1", "AXK1ForCausalLM", first_k_dense_replace=2)["first_k_dense_replace"] == 2


def test_a_text_model_without_a_class_of_its_own_is_wrapped() -> None:
    pytest.importorskip("transformers.models.qwen3_vl_moe")
    wrapped = of_family("qwen3_vl_moe_text", "Qwen3VLMoeForConditionalGeneration")
    assert wrapped["model_type"] == "qwen3_vl_moe"
    assert wrapped["text_config"]["num_experts"] == 12
    assert wrapped["text_config"]["norm_topk_prob"] is True


def test_a_text_model_with_a_class_of_its_own_stays_flat() -> None:
    assert "text_config" not in of_family("gemma4_text", "Gemma4ForCausalLM")


def test_a_wrapped_config_is_of_its_experts_family() -> None:
    assert published.record_of({"model_type": "unheard_of", "text_config": {"model_type": "qwen3_moe"}}) is not None
    assert published.record_of({"model_type": "unheard_of"}) is None


def test_checkpoints_have_published_names_and_layouts() -> None:
    """Experts that compute nothing have no tensors; packed ones lie as transformers 4 wrote them."""
    tensors = tensors_of("qwen3-vl-moe")
    record, config = RECORDS["qwen3_vl_moe_text"], VARIANTS["qwen3-vl-moe"].config
    named = dict(checkpoint_of(record, config, 1, tensors))
    first = next(tensor for name, tensor in named.items() if name.endswith("gate_up_proj"))
    assert torch.equal(first.mT, tensors["experts.w13"])
    longcat = checkpoint_of(RECORDS["longcat_flash"], VARIANTS["longcat-flash"].config, 1, tensors_of("longcat-flash"))
    assert not any(".experts.12." in name for name, _ in longcat)
    hy = dict(checkpoint_of(RECORDS["hy_v4"], VARIANTS["hy-v4"].config, 1, tensors_of("hy-v4")))
    assert "model.layers.1.mlp.shared_experts.gate_proj.weight" in hy
    assert not any("linear_gate" in name for name in hy)


W13 = "model.layers.1.mlp.experts.routed_experts.w13_weight"


def placed(name: str, shape: tuple[int, ...], where: Any) -> str | Target:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[where] = True
    return servers.place(name, mask)


def test_a_target_says_which_expert_and_which_part() -> None:
    assert placed(W13, (3, 8, 4), ...) == W13
    assert placed(W13, (3, 8, 4), 1) == Target(W13, 1, None)
    assert placed(W13, (3, 8, 4), (2, slice(4))) == Target(W13, 2, "w1")
    assert placed(W13, (3, 8, 4), (2, slice(4, 8))) == Target(W13, 2, "w3")
    assert placed(W13, (3, 8, 4), (slice(3), slice(4))) == Target(W13, None, "w1")


def test_a_part_of_a_fused_linear_has_its_row() -> None:
    name = "model.layers.1.mlp.shared_experts.gate_up_proj.weight"
    assert placed(name, (8, 4), slice(4)) == Target(name, None, 0)
    assert placed(name, (8, 4), slice(4, 8)) == Target(name, None, 4)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("mlp.gate.weight", "router.proj"),
        ("ffn.router.layer.weight", "router.proj"),
        ("block_sparse_moe.gate.weight", "router.proj"),
        ("mlp.gate.e_score_correction_bias", "router.selection_bias"),
        ("mlp.shared_experts.gate_up_proj.weight", "shared.w13"),
        ("shared_mlp.output_linear.weight", "shared.w2"),
        ("mlp.shared_expert_gate.weight", "shared.gate"),
        ("post_mlp_layernorm.weight", None),
        ("self_attn.o_proj.weight", None),
        ("mlp.gate_up_proj.weight", None),
    ],
)
def test_parameters_of_a_layer_have_canonical_names(name: str, canonical: str | None) -> None:
    import re

    found = [key for pattern, key in {**servers.CANONICAL, **loading.CANONICAL}.items() if re.fullmatch(pattern, name)]
    assert found == ([canonical] if canonical else [])


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class GraniteLayer(nn.Module):
    """As vLLM's: attention and norms around two parts, whose sum is added to the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.residual_multiplier = 0.25
        self.input_layernorm, self.self_attn = Scaled(3.0), Scaled(5.0)
        self.post_attention_layernorm = Scaled(7.0)
        self.block_sparse_moe, self.shared_mlp = Scaled(2.0), Scaled(10.0)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        attended: Tensor = self.self_attn(positions=positions, hidden_states=self.input_layernorm(hidden_states))
        hidden_states = residual + attended * self.residual_multiplier
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.block_sparse_moe(hidden_states) + self.shared_mlp(hidden_states)
        return residual + hidden_states * self.residual_multiplier


def test_a_silenced_layer_gives_what_its_block_adds() -> None:
    x = torch.arange(6.0).reshape(3, 2)
    root = decoder.whole_layer(GraniteLayer(), ["block_sparse_moe.weight", "shared_mlp.weight"])
    assert torch.equal(root(x), 12 * x)


def test_a_layer_whose_parts_lie_apart_in_another_way_is_refused() -> None:
    with pytest.raises(Unsupported, match="lie apart in an unknown way"):
        decoder.whole_layer(nn.ModuleDict({"a": Scaled(1.0)}), ["a.weight"])


def test_what_no_loader_wrote_is_seen() -> None:
    module = Scaled(1.0)
    servers.clear(module)
    assert servers.unwritten(module.weight).all()
    with torch.no_grad():
        module.weight.fill_(2.0)
    assert not servers.unwritten(module.weight).any()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NotImplementedError("no kernel"), "vLLM: no kernel"),
        (ImportError("No module named 'cutlass'"), "No module named 'cutlass'"),
        (RuntimeError("biased_topk_cpu: unsupported num_experts 40"), "num_experts 40"),
        (AttributeError("'_OpNamespace' '_moe_C' object has no attribute 'topk_softmax'"), "topk_softmax"),
    ],
)
def test_what_a_build_lacks_is_refused_in_its_words(error: Exception, words: str) -> None:
    with pytest.raises(Unsupported, match=words), refusals():
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), AssertionError("rows"), ValueError("wrong"), KeyError()]
)
def test_what_goes_wrong_is_no_refusal(error: Exception) -> None:
    with pytest.raises(type(error)), refusals():
        raise error


def test_a_refusal_of_ours_keeps_its_words() -> None:
    with pytest.raises(Unsupported, match=r"^route: unsupported$"), refusals():
        raise Unsupported("route: unsupported")


STORED = (
    *("fp8-block", "fp8-channel", "fp8-tensor", "int4-packed", "int4-packed-zero", "int8-packed", "mxfp4", "nvfp4"),
    "nvfp4-modelopt",
)


@pytest.mark.parametrize("form", STORED)
def test_codes_times_scales_are_the_numbers_of_a_form(form: str) -> None:
    parts, want = ENCODED[form]((3, 64, 32), "quantised")
    tile = (TILE, TILE) if form == "fp8-block" else None
    got = quantised._numbers(parts, 64, 32, tile, 1)
    torch.testing.assert_close(got, want.double(), rtol=1e-15, atol=0.0)


def test_rows_and_columns_beyond_the_matrix_are_left_out() -> None:
    parts, want = ENCODED["mxfp4"]((3, 64, 64), "quantised")
    assert torch.equal(quantised._numbers(parts, 48, 32, None, 2), want[:, :48, :32].double())


def test_gate_and_up_may_have_a_scale_each() -> None:
    codes, scale = torch.ones(2, 4, 3).to(torch.float8_e4m3fn), torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    got = quantised._numbers({"weight": codes, "weight_scale": scale}, 4, 3, None, 2)
    assert got[:, :, 0].tolist() == [[1.0, 1.0, 2.0, 2.0], [4.0, 4.0, 8.0, 8.0]]


def test_a_matrix_that_was_left_out_is_as_it_is() -> None:
    plain = torch.ones(2, 4, 3)
    assert torch.equal(quantised._numbers({"weight": plain}, 4, 3, None, 1), plain)


def test_an_unknown_form_is_not_judged() -> None:
    with pytest.raises(Unsupported, match="qweight"):
        quantised._numbers({"qweight": torch.ones(2, 4, 3)}, 4, 3, None, 1)
