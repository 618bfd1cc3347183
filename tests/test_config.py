"""What the config stage says where the suite's cases do not go: unknown model types, nesting, error messages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moe_conformance.engine import CaptureShape, MoESpec
from moe_conformance.errors import ConfigError, DenseModelError
from moe_conformance.reference_impl.config import capture_shape, describe
from moe_conformance.reference_impl.config_families import FAMILIES, TOP_K, family_of
from moe_conformance.suites.config.cases import CASES

MIXTRAL = {
    "model_type": "mixtral",
    "num_hidden_layers": 9,
    "hidden_size": 40,
    "intermediate_size": 24,
    "num_local_experts": 11,
    "num_experts_per_tok": 3,
}
MIXTRAL_SPEC = MoESpec(9, tuple(range(9)), 11, 3, 40, 24)
OTHER = {**MIXTRAL, "model_type": "never-heard-of"}
DENSE = {"model_type": "llama", "num_hidden_layers": 9, "hidden_size": 40, "intermediate_size": 24}


def without(key: str, **changed: Any) -> dict[str, Any]:
    return {name: value for name, value in MIXTRAL.items() if name != key} | changed


@pytest.mark.parametrize("key", [key for key in MIXTRAL if key != "model_type"])
def test_a_missing_key_is_named_with_its_level(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"mixtral.*found none of .*{key}.*top level") as caught:
        describe(without(key))
    assert not isinstance(caught.value, DenseModelError)


def test_every_name_of_top_k_is_said() -> None:
    with pytest.raises(ConfigError) as caught:
        describe({"model_type": "llava", "text_config": without("num_experts_per_tok")})
    assert all(key in str(caught.value) for key in (*TOP_K, "text_config", "llava", "mixtral"))


def test_an_object_without_to_dict_is_read_by_its_attributes() -> None:
    assert describe(SimpleNamespace(**MIXTRAL)) == MIXTRAL_SPEC


@pytest.mark.parametrize("config", [None, 3, [MIXTRAL], "mixtral"])
def test_what_is_no_config_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="pass the config"):
        describe(config)


def test_an_unknown_model_type_is_read_by_its_keys() -> None:
    assert describe(OTHER) == MIXTRAL_SPEC
    leading = {**OTHER, "first_k_dense_replace": 4, "moe_intermediate_size": 22}
    assert describe(leading) == MoESpec(9, (4, 5, 6, 7, 8), 11, 3, 40, 22)
    shared = {**OTHER, "moe_intermediate_size": 22, "n_shared_experts": 2, "moe_latent_size": 16}
    assert describe(shared) == MoESpec(9, tuple(range(9)), 11, 3, 40, 22, 2, 44, 16)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"first_k_dense_replace": 4, "decoder_sparse_step": 2}, "first_k_dense_replace, decoder_sparse_step"),
        ({"first_k_dense_replace": 4}, "moe_intermediate_size"),  # intermediate_size may be the dense layers'
        ({"n_shared_experts": 2, "shared_intermediate_size": 22}, "shared_intermediate_size may be"),
    ],
)
def test_an_unknown_model_type_that_leaves_doubt_is_refused(keys: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        describe({**OTHER, **keys})


@pytest.mark.parametrize("level", ["text_config", "llm_config", "language_config"])
def test_a_nested_model_is_found_under_every_name(level: str) -> None:
    assert describe({"model_type": "some-vlm", "vision_config": DENSE, level: MIXTRAL}) == MIXTRAL_SPEC


def test_the_vision_model_is_taken_only_where_nothing_else_has_experts() -> None:
    vision = {**MIXTRAL, "num_local_experts": 13}
    assert describe({"vision_config": vision, "text_config": MIXTRAL}).num_experts == 11
    assert describe({"vision_config": vision, "text_config": DENSE}).num_experts == 13
    off = {"model_type": "gemma4_text", "enable_moe_block": False}
    assert describe({"vision_config": vision, "text_config": off}).num_experts == 13


def test_a_repeated_number_agrees_with_its_list() -> None:
    assert describe({**MIXTRAL, "moe_topk": [3] * 9}) == MIXTRAL_SPEC
    with pytest.raises(ConfigError, match="num_experts_per_tok is 3 but moe_topk is"):
        describe({**MIXTRAL, "moe_topk": [3] * 8 + [2]})


def test_a_capture_buffer_has_all_layers_and_the_largest_top_k() -> None:
    hunyuan = {**without("num_experts_per_tok"), "model_type": "hunyuan_v1_moe", "moe_topk": [2] * 8 + [5]}
    assert capture_shape(hunyuan) == CaptureShape(9, 5, 11)
    assert capture_shape(
        {**MIXTRAL, "model_type": "qwen3_moe", "moe_intermediate_size": 22, "decoder_sparse_step": 3}
    ) == (
        9,
        3,
        11,
    )


def test_a_config_is_not_written_to() -> None:
    config = {"model_type": "llava", "text_config": dict(MIXTRAL)}
    describe(config)
    assert config == {"model_type": "llava", "text_config": MIXTRAL}


def test_every_plain_case_is_of_a_known_family() -> None:
    plain = [case for case in CASES if "class" not in case.recipe and case.clause != "config.refuse-dense"]
    assert plain and all(family_of(case["keys"]["model_type"]) for case in plain)
    assert len(FAMILIES) == 75
