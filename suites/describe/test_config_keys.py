"""Does the engine find what a config says, on every path and in every spelling, and does it say what it misses?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from itertools import groupby
from typing import Any

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine, MoESpec
from moe_conformance.errors import Nonconformance
from moe_conformance.judging.compare import same
from moe_conformance.model.families.describe import describe
from moe_conformance.model.specs import LayerSpec
from moe_conformance.suites.describe.cases import DENSE, DESCRIBED, LAYERED, REFUSED, SAVED, TWICE
from moe_conformance.suites.describe.configs import config_of, refused_on_purpose


@check(DESCRIBED)
def test_a_config_says_what_the_model_is(engine: Engine, case: Case) -> dict[str, Any]:
    """As an object, and the same in the form in which it is saved."""
    return _said(engine, case, _facts)


@check(TWICE)
def test_each_config_of_a_model_type_gives_its_own_answer(engine: Engine, case: Case) -> None:
    """One, another, and the first again: nothing of an earlier config is left."""
    first, other = case["keys"], case["other"]
    for keys in (first, other, first):
        same("sizes", _facts(engine.describe(json.loads(json.dumps(keys)))), _facts(describe(keys)))


@check(LAYERED)
def test_a_config_says_how_its_layers_compute(engine: Engine, case: Case) -> dict[str, Any]:
    """Routing, experts, shared experts and how they are added, by the keys that the model reads and no others."""
    return _said(engine, case, _layer_facts)


@check(REFUSED)
def test_a_config_without_answer_is_refused_with_the_keys(engine: Engine, case: Case) -> None:
    config = config_of(case)
    refused_on_purpose("describe", lambda: engine.describe(config), case)


@check(DENSE)
def test_a_dense_model_is_refused_by_name(engine: Engine, case: Case) -> None:
    config = config_of(case)
    refused_on_purpose("describe", lambda: engine.describe(config), case)


def _said(engine: Engine, case: Case, facts_of: Callable[[MoESpec], dict[str, Any]]) -> dict[str, Any]:
    config = config_of(case)
    facts = facts_of(engine.describe(config))
    if case in SAVED:
        saved = json.loads(json.dumps(config.to_diff_dict()))  # as config.json, but for its spelling of infinity
        same("describe(config.json)", facts_of(engine.describe(saved)), facts)
    return facts


def _facts(spec: MoESpec) -> dict[str, Any]:
    """A spec in few lines, defaults left out: layers as ranges, one value for each MoE layer as runs."""
    layers = len(spec.moe_layers or spec.encoder_moe_layers)
    facts = {
        "layers": spec.num_layers,
        "moe_layers": _ranges(spec.moe_layers),
        "experts": _runs(spec.num_experts, layers),
        "top_k": _runs(spec.top_k, layers),
        "hidden": spec.hidden_size,
        "width": _runs(spec.moe_intermediate_size, layers),
    }
    if spec.shared_experts or spec.shared_intermediate_size is not None:
        facts["shared"] = f"{spec.shared_experts} of summed width {spec.shared_intermediate_size}"
    if spec.latent_size is not None:
        facts["latent"] = spec.latent_size
    if spec.layer_runs:
        facts["runs"] = " ".join(map(str, spec.layer_runs))
    if spec.encoder_moe_layers:
        facts["encoder_moe_layers"] = _ranges(spec.encoder_moe_layers)
    return facts


def _layer_facts(spec: MoESpec) -> dict[str, Any]:
    """What layers compute, those that compute the same together; raises unless there is one for each MoE layer."""
    indices = spec.moe_layers or spec.encoder_moe_layers
    if len(spec.layers) != len(indices):
        why = f" ({spec.undetermined})" if spec.undetermined else ""
        raise Nonconformance(f"layers: got {len(spec.layers)}{why}, want one for each of the {len(indices)} MoE layers")
    same_as: dict[LayerSpec, list[int]] = {}
    for index, layer in zip(indices, spec.layers, strict=True):
        same_as.setdefault(layer, []).append(index)
    return {_ranges(tuple(places)): _differs(layer) for layer, places in same_as.items()}


def _differs(spec: Any) -> dict[str, Any]:
    """The fields of a spec that are not as by default, and those of the specs in it."""
    found: dict[str, Any] = {}
    for entry in fields(spec):
        value = getattr(spec, entry.name)
        if is_dataclass(value):
            found |= {f"{entry.name}.{name}": own for name, own in _differs(value).items()}
        elif value != entry.default:
            found[entry.name] = float(value) if isinstance(entry.default, float) else value
    return found


def _ranges(indices: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2 5"."""
    runs = [[index for _, index in run] for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _runs(values: int | tuple[int, ...], layers: int) -> int | str:
    """(2, 2, 3) -> "2x2 1x3". One number for each MoE layer that is the same in all says what the number alone says."""
    if isinstance(values, int):
        return values
    if len(values) == layers and len(set(values)) == 1:
        return values[0]
    return " ".join(f"{len(list(run))}x{value}" for value, run in groupby(values))
