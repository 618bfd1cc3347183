"""A key of a config that is null or left out means to the plain dict what it means to transformers' config object.

Either both give one spec, or the plain dict is refused by the name of the key: sizes that are left out are not guessed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from moe_conformance.errors import ConfigError
from moe_conformance.model.description import MoESpec
from moe_conformance.model.families.describe import describe
from moe_conformance.model.families.families import RECORDS
from moe_conformance.model.families.tiny import tiny_config
from moe_conformance.reference_impl.checkpoint.places import Places

pytest.importorskip("transformers", minversion="5.24", reason="the families here are those of transformers 5.24")

# Of which class a null is a value that it fills in, with a size that decides.
FILLED = ("dbrx", "dots3_note_vision_encoder", "ernie4_5_vl_moe_text", "switch_transformers")


def paths(config: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


def changed(config: dict[str, Any], path: tuple[str, ...], null: bool) -> dict[str, Any]:
    found = copy.deepcopy(config)
    level = found
    for key in path[:-1]:
        level = level[key]
    if null:
        level[path[-1]] = None
    else:
        del level[path[-1]]
    return found


def said(config: Any) -> MoESpec | ConfigError:
    try:
        return describe(config)
    except ConfigError as error:
        return error


def differences(family: str) -> Iterator[str]:
    """A line for each key whose absence the plain dict reads as another spec, or refuses without its name."""
    known = tiny_config(RECORDS[family], "distinct", {})
    config = json.loads(known.to_json_string(use_diff=False))
    for path in paths(config):
        for null in (True, False):
            if path[-1] == "model_type":  # without one it is another family's
                continue
            given = changed(config, path, null)
            try:
                held = type(known).from_dict(copy.deepcopy(given))
            except Exception:  # the class does not take it, in its own words
                continue
            plain, theirs = said(given), said(held)
            where = f"{family}: {'.'.join(path)} {'null' if null else 'left out'}"
            if plain == theirs or (isinstance(plain, ConfigError) and isinstance(theirs, ConfigError)):
                continue
            why = str(plain) if isinstance(plain, ConfigError) else plain.undetermined
            if path[-1] not in why:
                yield f"{where}: got {plain!s:.300}, want {theirs!s:.300}, or a refusal by the name of the key"


SWEEP = [pytest.mark.nightly, pytest.mark.sweep]


@pytest.mark.parametrize("family", [f if f in FILLED else pytest.param(f, marks=SWEEP) for f in RECORDS])
def test_null_and_left_out_mean_what_the_config_class_takes_them_for(family: str) -> None:
    assert list(differences(family)) == []


@pytest.mark.parametrize("family", FILLED)
def test_a_null_that_the_class_fills_in_is_read_as_it_does(family: str) -> None:
    known = tiny_config(RECORDS[family], "distinct", {})
    config = json.loads(known.to_json_string(use_diff=False))
    for key in RECORDS[family].sizes.nulls:
        path = next(path for path in paths(config) if path[-1] == key)
        given = changed(config, path, null=True)
        assert describe(given) == describe(type(known).from_dict(copy.deepcopy(given))), key
        assert Places(given).wanted, key
