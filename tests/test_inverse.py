"""From what a layer computes back to a config: each family's own layers, other values of its keys, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moe_conformance.model.families.describe import layer_of
from moe_conformance.model.families.families import RECORDS
from moe_conformance.model.families.inverse import (
    Said,
    Setting,
    at_rest,
    config_of,
    is_out_of_reach,
    settings,
    with_fields,
    with_values,
)
from moe_conformance.model.specs import Activation, LayerSpec

SETTINGS = {
    f"{record.slug}-{number}": setting
    for record in RECORDS.values()
    for number, setting in enumerate(settings(record.model_type))
    if record.block and record.block.given
}
# Other values than a setting has, of fields that keys decide.
OTHERWISE: dict[str, Any] = {
    "hidden_size": 72,
    "num_experts": 24,
    "routing.top_k": 3,
    "experts.width": 88,
    "routing.scale": 1.75,
    "output_scale": 1.75,
    "routing.logit_scale": 0.625,
    "routing.logit_softcap": 11.0,
    "routing.identity_experts": 3,
    "latent.width": 104,
    "experts.alpha": 1.375,
    "dense.mlp.width": 120,
    "vocab_size": 37,
}
# What a function makes of a key's value: K itself, 1 / K, and 1 less a share.
BY_FUNCTION = {
    ("openai-privacy-filter", "routing.top_k"),
    ("openai-privacy-filter", "routing.scale"),
    ("openai-privacy-filter", "output_scale"),
    ("nllb-moe", "output_scale"),
}
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def _config(setting: Setting, spec: LayerSpec) -> Said | None:
    return config_of(setting, spec, lambda found: at_rest(found, True) == at_rest(spec, True))


def test_every_family_that_can_be_given_a_routing_has_a_setting() -> None:
    able = {record.slug for record in RECORDS.values() if record.block and record.block.given}
    assert {setting.record.slug for setting in SETTINGS.values()} == able


@pytest.mark.parametrize("name", SETTINGS)
def test_a_familys_own_layer_has_a_config(name: str) -> None:
    setting = SETTINGS[name]
    said = _config(setting, setting.spec)
    assert said is not None
    assert layer_of(said.config, setting.layer) == said.spec
    assert at_rest(said.spec, True) == at_rest(setting.spec, True)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_value_that_a_key_may_have_is_asked_for_by_it(name: str) -> None:
    """One field at a time, so that each shows; the shared expert is as wide as it may be said to be."""
    setting = SETTINGS[name]
    decided = {path: value for path, value in OTHERWISE.items() if path in setting.decided}
    decided = {path: value for path, value in decided.items() if (setting.record.slug, path) not in BY_FUNCTION}
    if not setting.spec.vocab_size:  # of a layer that chooses by token, and of no other
        decided.pop("vocab_size", None)
    asked = [with_fields(setting.spec, {path: value}) for path, value in decided.items()]
    for spec in asked:
        assert is_out_of_reach(setting, spec, ("routing", "experts")) is False
        assert with_values(setting, spec) == spec
        said = config_of(setting, spec, lambda found, want=spec: _but_shared(found) == _but_shared(want))  # type: ignore[misc]
        assert said is not None, spec
    assert asked


def _but_shared(spec: LayerSpec) -> LayerSpec:
    return replace(at_rest(spec, True), shared=None)


# Whose config may say another activation; DBRX's does below a level of its own, where a function reads it.
CHOOSING = tuple(
    name
    for name, setting in SETTINGS.items()
    if "experts.activation" in setting.decided and setting.record.slug != "dbrx"
)


@pytest.mark.parametrize("name", CHOOSING)
def test_every_activation_that_a_key_may_have_is_asked_for_by_it(name: str) -> None:
    setting = SETTINGS[name]
    for activation in ACTIVATIONS:
        spec = with_fields(setting.spec, {"experts.activation": activation, "shared.mlp.activation": activation})
        said = config_of(setting, spec, lambda found, want=spec: found.experts == want.experts)  # type: ignore[misc]
        assert said is not None and said.spec.experts.activation == activation


@pytest.mark.parametrize("name", SETTINGS)
def test_what_no_key_says_is_refused(name: str) -> None:
    setting = SETTINGS[name]
    for path, value in {"routing.norm_order": 7.0, "experts.up_offset": 0.375, "routing.jitter": 0.375}.items():
        spec = with_fields(setting.spec, {path: value})
        if path not in setting.decided:
            assert with_values(setting, spec) != spec
            assert config_of(setting, spec, lambda found, want=spec: found == want) is None  # type: ignore[misc]


def test_a_quick_no_is_a_no() -> None:
    """What is out of reach has no config; and not everything is."""
    quick = 0
    for setting in SETTINGS.values():
        for other in SETTINGS.values():
            if is_out_of_reach(setting, other.spec, ("routing", "experts")):
                quick += 1
                assert with_values(setting, other.spec) != other.spec
    assert len(SETTINGS) < quick < len(SETTINGS) ** 2 - len(SETTINGS)
