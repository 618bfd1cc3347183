"""What the config stage says where the suite's cases do not go: unknown model types, nesting, error messages."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from record_facts import bare_configs, spelled

from moe_conformance.engine import CaptureShape, MoESpec
from moe_conformance.errors import ConfigError, DenseModelError
from moe_conformance.model.families.configs import Keys
from moe_conformance.model.families.describe import capture_shape, describe, layer_of
from moe_conformance.model.families.families import BY_SLUG, EXPERTS, HIDDEN, RECORDS
from moe_conformance.model.families.keys import keys_in
from moe_conformance.model.families.record import DENSE_WIDTH, LAYERS, SHARED_COUNT, TOP_K, WIDTH
from moe_conformance.model.families.words import ACTIVATIONS
from moe_conformance.model.specs import Capacity, LayerSpec, LogitsSpec, MLPSpec, RoutingSpec
from moe_conformance.oracle import activation as oracle
from moe_conformance.suites.describe.cases import CASES
from moe_conformance.suites.describe.families import flat_keys, layer_keys

RECORDED = "the families here are those of transformers 5.24"
MIXTRAL = {
    "model_type": "mixtral",
    "num_hidden_layers": 9,
    "hidden_size": 40,
    "intermediate_size": 24,
    "num_local_experts": 11,
    "num_experts_per_tok": 3,
}
MIXTRAL_SIZES = MoESpec(9, tuple(range(9)), 11, 3, 40, 24)
MIXTRAL_LAYER = LayerSpec(40, 11, LogitsSpec(), RoutingSpec(3, renormalize="sum"), MLPSpec(24))
MIXTRAL_SPEC = replace(MIXTRAL_SIZES, layers=(MIXTRAL_LAYER,) * 9)
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


class Evasive:
    """An object that raises whatever it is asked for, its class included."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("not telling")


def test_an_object_below_the_top_that_raises_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Evasive raised .*not telling.* when read"):
        describe({"model_type": "llava", "text_config": Evasive()})


def test_an_unknown_model_type_is_read_by_its_keys() -> None:
    assert describe(OTHER) == MIXTRAL_SIZES
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
    assert plain and all(RECORDS.record_of(case["keys"]["model_type"]) for case in plain)


def test_a_record_of_layers_that_specs_can_say_has_all_its_parts() -> None:
    for record in RECORDS.values():
        said = not record.method.unsaid
        parts = (record.names, record.block, record.ways)
        assert all(bool(part) == said for part in parts), record.model_type


QWEN = {**MIXTRAL, "model_type": "qwen3_moe", "moe_intermediate_size": 22}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        # Numbers: beyond any model, or none.
        ({"num_hidden_layers": 10**5}, "num_hidden_layers: got 100000, want an integer from 1 to 2048"),
        (
            {"num_local_experts": 10**30},
            "num_local_experts: got 1000000000000000000000000000000, want an integer from 0",
        ),
        ({"hidden_size": 10**5000}, "hidden_size: got an integer of 16610 bits, want an integer from 1 to 1048576"),
        ({"hidden_size": math.nan}, "hidden_size: got nan, want an integer"),
        ({"model_type": "mixtral", "intermediate_size": [24] * 10}, "intermediate_size has 10 entries for 9 layers"),
        # Lists, where something else is.
        ({"model_type": "qwen3_moe", "mlp_only_layers": True}, "mlp_only_layers: got True, want a list"),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [0] * 10**5},
            "mlp_only_layers: got .*, want a list of at most",
        ),
        ({"model_type": "axk1", "mlp_layer_types": 7}, "mlp_layer_types: got 7, want a list"),
        ({"model_type": "axk1", "mlp_layer_types": [["moe"]] * 9}, r"mlp_layer_types has \['moe'\], .*; want dense or"),
        (
            {"model_type": "axk1", "mlp_layer_types": None, "moe_layer_freq": [2.5] * 9},
            "moe_layer_freq has 2.5, .*; want",
        ),
        ({"model_type": "step3p5", "moe_layers_enum": "9" * 5000}, "moe_layers_enum has 9999.*; want layer indices"),
        ({"model_type": "nemotron_h", "layer_types": 3}, "layer_types: got 3, want a list"),
        # Maps, where something else is, and keys that they cannot have.
        ({"per_layer_config": 2.5}, "per_layer_config: got 2.5, want a map"),
        ({"per_layer_config": {"x": {}}}, "per_layer_config: got 'x': {}, want the index of a layer and a map"),
        ({"per_layer_config": {"1": [3]}}, r"per_layer_config: got '1': \[3\], want the index of a layer and a map"),
        ({"model_type": "dbrx", "ffn_config": 3}, "ffn_config: got 3, want a map"),
        ({"model_type": ["mixtral"]}, r"model_type: got \['mixtral'\], want text"),
        ({"model_type": "gemma4_text", "enable_moe_block": "no"}, "enable_moe_block: got 'no', want true or false"),
    ],
)
def test_what_a_config_says_is_checked_where_it_is_read(changed: Keys, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        describe(QWEN | changed)
    assert len(str(caught.value)) < 2000


def test_a_config_that_holds_itself_is_refused() -> None:
    own: Keys = {"model_type": "never-heard-of"}
    own |= {"text_config": own, "llm_config": own}
    with pytest.raises(ConfigError, match=r"text_config\.text_config: got a level below it, want at most 4 levels"):
        describe(own)


def test_an_object_whose_dict_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config: got \['no', 'map'\] from to_dict, want a map"):
        describe(SimpleNamespace(to_dict=lambda: ["no", "map"]))


class Mute(Exception):
    """Raises even when it is asked what was wrong."""

    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


def _raises(self: object, *_: object) -> Any:
    raise Mute


@pytest.mark.parametrize("name", ["to_dict", "__getattribute__", "__class__", "__dict__"])
def test_a_config_that_raises_when_read_is_one_error_of_ours(name: str) -> None:
    body = {name: _raises if name in ("to_dict", "__getattribute__") else property(_raises)}
    config = type("Broken", (), body)()
    with pytest.raises(ConfigError, match=r"config: Broken raised <Mute instance at .* when read; pass its dict"):
        describe(config)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"routed_scaling_factor": math.nan}, "routed_scaling_factor: got nan, want a number from -1e"),
        ({"routed_scaling_factor": 10**400}, "routed_scaling_factor: got an integer of 1329 bits, want a number"),
        ({"n_group": 2.5}, "n_group: got 2.5, want an integer from 0 to 262144 or null"),
        ({"n_group": -4, "topk_group": -4}, "n_group: got -4, want an integer from 0"),
        ({"model_type": "axk1", "rms_norm_eps": 0.0}, "rms_norm_eps: got 0.0, want a number from 1.4013e-45 to 1"),
    ],
)
def test_a_number_of_a_method_is_checked_where_it_is_read(changed: Keys, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        layer_of(DEEPSEEK | changed, 5)


LAGUNA = {
    **MIXTRAL,
    "model_type": "laguna",
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 22,
    "mlp_layer_types": ["dense"] + ["sparse"] * 8,
    "moe_routed_scaling_factor": 2.5,
    "moe_router_logit_softcapping": 30.0,
    "moe_apply_router_weight_on_input": False,
}
DEEPSEEK = {
    **MIXTRAL,
    "model_type": "deepseek_v3",
    "num_local_experts": 12,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 3,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}


def unknown(config: Keys, **changed: Any) -> Keys:
    return {**config, "model_type": "never-heard-of", **changed}


def test_an_unknown_model_type_computes_as_the_one_family_with_its_keys() -> None:
    layer = layer_of(unknown(LAGUNA), 4)
    assert layer == layer_of(LAGUNA, 4)
    assert (layer.output_scale, layer.routing.logit_softcap, layer.routing.score) == (2.5, 30.0, "sigmoid")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (unknown(DEEPSEEK), "n_group, norm_topk_prob, routed_scaling_factor, topk_group.*deepseek_v3.*mistral4"),
        (unknown(MIXTRAL), ": none; families with these keys:.*jamba.*mixtral"),
        # One key less than the family has, one key more, one of its sizes not there.
        (unknown({k: v for k, v in LAGUNA.items() if k != "moe_router_logit_softcapping"}), "with these keys: none"),
        (unknown(LAGUNA, norm_topk_prob=True), "families with these keys: none"),
        (unknown(LAGUNA, shared_expert_intermediate_size=None), "families with these keys: laguna"),
        # A value that says which families it may be of, though none of them reads it; and one that says: of none.
        (unknown(DEEPSEEK, topk_method="noaux_tc"), "topk_method; families with these keys: axk1, deepseek_v3, "),
        (
            unknown(DEEPSEEK, topk_method="fastest"),
            "topk_group, topk_method; families with these keys: deepseek_v2; set model_type",
        ),
    ],
)
def test_an_unknown_model_type_whose_keys_leave_the_method_open_has_no_layers(config: Keys, says: str) -> None:
    spec = describe(config)
    assert spec.num_experts and spec.layers == ()
    with pytest.raises(ConfigError, match=f"unknown model type, keys.*{says}"):
        layer_of(config, spec.moe_layers[0])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"norm_topk_prob": 1}, "norm_topk_prob: got 1, want one of True, False"),
        ({"routed_scaling_factor": "2.5"}, "routed_scaling_factor: got '2.5', want a number"),
        ({"routed_scaling_factor": None}, "routed_scaling_factor: got None, want a number"),
        ({"routed_scaling_factor": True}, "routed_scaling_factor: got True, want a number"),
        ({"hidden_act": "xielu"}, "hidden_act: got 'xielu', want one of 'silu', .*'relu2'"),
        ({"hidden_act": ["silu"]}, "hidden_act: got .'silu'., want one of"),
        ({"n_group": "4"}, "n_group: got '4', want an integer from 0 to 262144 or null"),
        ({"n_group": 5}, "groups: got the best 2 of 5 for 12 experts"),
        ({"topk_group": 6}, "groups: got the best 6 of 4 for 12 experts"),
    ],
)
def test_a_method_key_that_means_nothing_leaves_the_layers_open_and_is_named(changed: Keys, says: str) -> None:
    config = DEEPSEEK | changed
    assert describe(config) == replace(describe(DEEPSEEK), layers=())
    with pytest.raises(ConfigError, match=f"deepseek_v3: MoE method: {says}"):
        layer_of(config, 5)


STEP: Keys = {
    **MIXTRAL,
    "model_type": "step3p5",
    "moe_intermediate_size": 24,
    "share_expert_dim": 22,
    "moe_layers_enum": "2,8",
}


@pytest.mark.parametrize("limits", [4.5, [4.5] * 8])
def test_a_limit_is_given_for_each_layer_or_not_at_all(limits: Any) -> None:
    with pytest.raises(ConfigError, match=r"swiglu_limits: got .*4\.5.*, want null or a list with an entry for each"):
        layer_of(STEP | {"swiglu_limits": limits}, 8)


def test_names_of_one_key_must_agree() -> None:
    kimi = {**DEEPSEEK, "model_type": "kimi_linear", "moe_renormalize": True}
    assert layer_of(kimi, 5).routing.renormalize == "sum"
    with pytest.raises(ConfigError, match="moe_renormalize is True but norm_topk_prob is False"):
        layer_of(kimi | {"norm_topk_prob": False}, 5)


def test_a_layer_without_experts_is_refused_with_those_that_have_them() -> None:
    with pytest.raises(ConfigError, match="deepseek_v3: MoE method: layer 2 has no experts; want one of 3, 4, 5"):
        layer_of(DEEPSEEK, 2)


def test_a_model_that_no_spec_can_say_is_refused_with_the_reason() -> None:
    vitpose = {**MIXTRAL, "model_type": "vitpose_backbone", "mlp_ratio": 3}
    assert describe(vitpose).num_experts == 11
    with pytest.raises(ConfigError, match="not a router, chooses"):
        layer_of(vitpose, 0)


@pytest.mark.parametrize(
    "changed", [{"second_expert_policy": "random"}, {"router_dtype": "bfloat16"}, {"activation_function": "xielu"}]
)
def test_what_no_spec_can_say_leaves_the_layers_open(changed: Keys) -> None:
    keys = flat_keys(BY_SLUG["nllb-moe"]) | {"model_type": "nllb-moe"}
    assert describe(keys).layers and describe(keys | changed) == replace(describe(keys), layers=())


def test_an_encoder_that_alone_has_experts_gives_its_own_layers() -> None:
    keys = flat_keys(BY_SLUG["nllb-moe"]) | {"model_type": "nllb-moe", "decoder_sparse_step": 0, "encoder_ffn_dim": 26}
    spec = describe(keys)
    assert (spec.moe_layers, spec.encoder_moe_layers, len(spec.layers)) == ((), (5, 11), 2)
    assert layer_of(keys, 11).experts.width == spec.moe_intermediate_size == 26


def test_a_capacity_of_null_is_the_even_share() -> None:
    keys = flat_keys(BY_SLUG["nllb-moe"]) | {"model_type": "nllb-moe"}
    assert layer_of(keys, 2).routing.capacity == Capacity(64, 1.0, "batch")
    assert layer_of(keys | {"expert_capacity": None}, 2).routing.capacity == Capacity(None, 1.0, "batch")


def test_one_layers_own_values_are_found_under_a_padded_index() -> None:
    own = {"05": {"num_experts_per_tok": 2, "routed_scaling_factor": 1.5}}
    spec = describe(DEEPSEEK | {"per_layer_config": own})
    assert spec.top_k == (3, 3, 2, 3, 3, 3)
    assert [layer.routing.scale for layer in spec.layers] == [2.5, 2.5, 1.5, 2.5, 2.5, 2.5]


def test_the_decoder_of_an_identity_expert_model_counts_those_with_weights() -> None:
    keys = flat_keys(BY_SLUG["longcat-flash"]) | {"model_type": "longcat_flash"}
    layer = layer_of(keys, 0)
    assert (describe(keys).num_experts, layer.num_experts, layer.routing.identity_experts, layer.classes) == (
        17,
        11,
        6,
        17,
    )
    assert layer_of(keys | {"zero_expert_num": None}, 0).classes == 11


@pytest.fixture(scope="module")
def configs() -> Mapping[str, Any]:
    """Slug -> a config of each class with a method, in its first way."""
    transformers = pytest.importorskip("transformers", minversion="5.24", reason=RECORDED)
    return {
        slug: getattr(transformers, record.config_class)(**layer_keys(record, record.ways[0]))
        for slug, record in BY_SLUG.items()
        if record.ways
    }


def of_the_method(config: Keys) -> Keys:
    """The level of the config that has the keys of the method."""
    level: Keys = config["ffn_config"] if config["model_type"] == "dbrx" else config
    return level


def with_key(config: Keys, key: str, value: Any) -> Keys:
    level = of_the_method(config) | {key: value}
    return config | {"ffn_config": level} if config["model_type"] == "dbrx" else level


FLIPS = {"n_group": 6, "num_expert_group": 6, "topk_group": 1, "n_shared_experts": 4}


def flipped(key: str, value: Any) -> Any:
    """Another value of the kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return FLIPS.get(key, value + 1)
    if isinstance(value, list):
        return value[1:] + value[:1]
    return "relu" if value is not None else 3.5


def test_every_key_of_a_method_changes_its_layers(configs: Mapping[str, Any]) -> None:
    for slug, config in configs.items():
        saved = config.to_dict()
        for part in vars(BY_SLUG[slug].method).values():
            for key in keys_in(part):
                stored = next((alias for alias in key.names if alias in of_the_method(saved)), None)
                assert stored is not None, f"{slug} has none of {key.names}"
                value = of_the_method(saved)[stored]
                other = describe(with_key(saved, stored, flipped(stored, value)))
                assert other.layers != describe(config).layers, f"{slug}: {stored} {value!r}"


def test_a_dead_key_changes_nothing(configs: Mapping[str, Any]) -> None:
    dead = 0
    for slug, config in configs.items():
        saved = config.to_dict()
        for key in BY_SLUG[slug].dead:
            value = of_the_method(saved)[key]
            assert describe(with_key(saved, key, flipped(key, value))) == describe(config), f"{slug}: {key}"
            dead += 1
    assert dead == sum(len(record.dead) for record in RECORDS.values())


# Keys that sound of experts and have to do with training, or with another part of the model.
ELSEWHERE = {
    *("output_router_logits", "router_aux_loss_coef", "aux_loss_coef", "router_z_loss_coef"),
    *("router_ignore_padding_tokens", "final_logit_softcapping", "kda_safe_gate"),
    *("index_topk", "index_topk_blocks", "n_groups", "mamba_n_groups", "mamba_hidden_act"),
}
SOUNDS = re.compile(r"expert|rout|moe|top_?k|n_group|scor|swiglu|_gate$|aux_loss|norm_topk|mlp_bias|act$|softcap")


def test_a_key_that_sounds_of_experts_is_read_or_known_to_be_dead() -> None:
    """A record that leaves one out knows less of its model than the model's config class."""
    transformers = pytest.importorskip("transformers", minversion="5.24", reason=RECORDED)
    common = {*TOP_K, *EXPERTS, *HIDDEN, *LAYERS, *WIDTH, *DENSE_WIDTH, *SHARED_COUNT, *ELSEWHERE}
    for record in RECORDS.values():
        if record.method.unsaid:
            continue
        keys = getattr(transformers, record.config_class)(**flat_keys(record)).to_dict()
        method = {name for names in record.method_keys for name in names}
        also = {key for config in record.configs for key in config.keys}
        known = common | method | also | {*record.dead, *record.config, *record.beside}
        assert {key for key in keys if SOUNDS.search(key)} - known == set(), record.model_type


def test_a_key_left_out_is_the_default_of_the_config_class(configs: Mapping[str, Any]) -> None:
    for slug, config in configs.items():
        record = BY_SLUG[slug]
        own = {"model_type": config.model_type}
        for keys in bare_configs(record, flat_keys(record)):
            said = describe(own | dict(keys))
            assert said.layers and said == describe(type(config)(**keys)), f"{slug}: {keys}"


def test_each_name_of_a_key_means_the_same_to_the_config_class(configs: Mapping[str, Any]) -> None:
    several = 0
    for slug, config in configs.items():
        record = BY_SLUG[slug]
        own = {"model_type": config.model_type}
        for keys in spelled(record, flat_keys(record), meaningless=False):
            assert describe(own | dict(keys)) == describe(type(config)(**keys)), f"{slug}: {keys}"
            several += 1
    assert several > 10


def test_a_value_that_a_method_does_not_know_is_refused_by_the_name_of_its_key() -> None:
    """In the way to choose a method that reads the key."""
    for record in RECORDS.values():
        level = {"model_type": record.model_type, **flat_keys(record)}
        for names in record.method_keys if not record.sizes.experts_under else ():
            if names != ("n_shared_experts",):
                configs = [dict(keys) | {names[0]: ["no such value"]} for keys in bare_configs(record, level)]
                assert any(f"{names[0]}: got ['no such value']" in refusals(keys) for keys in configs), names


def refusals(config: Keys) -> str:
    """What is said of the layers of a config that cannot be described."""
    spec, said = describe(config), []
    for layer in spec.moe_layers or spec.encoder_moe_layers:
        try:
            layer_of(config, layer)
        except ConfigError as error:
            said.append(str(error))
    return "\n".join(said)


@pytest.mark.parametrize("name", [*TOP_K, *EXPERTS, *SHARED_COUNT])
def test_each_common_name_of_a_size_is_read(name: str) -> None:
    keys = {**DEEPSEEK, "num_experts_per_tok": 2, "n_shared_experts": 1}
    common = next(names for names in (TOP_K, EXPERTS, SHARED_COUNT) if name in names)
    read = {TOP_K: lambda spec: spec.top_k, EXPERTS: lambda spec: spec.num_experts}
    said = describe({key: value for key, value in keys.items() if key not in common} | {name: 5})
    assert read.get(common, lambda spec: spec.shared_experts)(said) == 5


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layers"])
def test_each_common_name_of_the_number_of_layers_is_read(name: str) -> None:
    assert describe(without("num_hidden_layers", **{name: 4})).num_layers == 4


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_name_of_an_activation_means_what_it_does_to_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    import torch
    from transformers.activations import ACT2FN

    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    torch.testing.assert_close(oracle.ACTIVATIONS[ACTIVATIONS[name]](x), ACT2FN[name](x), rtol=1e-12, atol=1e-12)


RULE_KEYS = {
    *("mlp_layer_types", "first_k_dense_replace", "num_dense_layers", "decoder_sparse_step", "mlp_only_layers"),
    *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "interleave_moe_layer_step"),
    *("expert_layer_period", "expert_layer_offset", "encoder_sparse_step"),
    *("num_sparse_encoder_layers", "num_sparse_decoder_layers"),
}


def test_layers_that_a_config_leaves_open_are_those_of_its_class(configs: Mapping[str, Any]) -> None:
    for slug, config in configs.items():
        keys = {key: value for key, value in flat_keys(BY_SLUG[slug]).items() if key not in RULE_KEYS}
        if slug == "deepseek-ocr2":  # its layers have no default
            continue
        said, of_class = describe({"model_type": config.model_type, **keys}), describe(type(config)(**keys))
        assert (said.moe_layers, said.encoder_moe_layers) == (of_class.moe_layers, of_class.encoder_moe_layers), slug


def test_a_limit_of_none_is_no_limit() -> None:
    assert layer_of(STEP, 8).experts == MLPSpec(24)
    limited = layer_of(STEP | {"swiglu_limits": [0] * 8 + [4.5, 5.5]}, 8).experts
    assert limited == MLPSpec(24, clamp="after", limit=4.5)
    assert layer_of(STEP | {"swiglu_limits": [4.5] * 8 + [0]}, 8).experts.limit == math.inf
