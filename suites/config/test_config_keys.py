"""Does the engine find what a config says, on every path and in every spelling, and does it say what it misses?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine, MoESpec
from moe_conformance.errors import Nonconformance, Unsupported
from moe_conformance.judging.compare import refused, same
from moe_conformance.model.families.describe import describe
from moe_conformance.model.specs import LayerSpec
from moe_conformance.suites.config.cases import CAPTURE_REFUSED, CAPTURED, DENSE, DESCRIBED, LAYERED, REFUSED, SAVED

SIDES: tuple[Literal["worker", "reader"], ...] = ("worker", "reader")


@check(DESCRIBED)
def test_a_config_says_what_the_model_is(engine: Engine, case: Case) -> dict[str, Any]:
    """As an object, and the same in the form in which it is saved."""
    return _said(engine, case, _facts)


@check(LAYERED)
def test_a_config_says_how_its_layers_compute(engine: Engine, case: Case) -> dict[str, Any]:
    """Routing, experts, shared experts and how they are added, by the keys that the model reads and no others."""
    return _said(engine, case, _layer_facts)


@check(CAPTURED)
def test_both_sides_of_capture_take_the_sizes_of_the_model(engine: Engine, case: Case) -> None:
    """A buffer has a place for each layer of the model, or for each MoE layer; both sides the same."""
    want = case["want"]
    layers = {want["layers"], len(describe(_config(case)).moe_layers)}
    shapes = {side: engine.capture_shape(_config(case), side) for side in SIDES}
    for side, shape in shapes.items():
        if shape.layers not in layers:
            raise Nonconformance(f"{side}: layers: got {shape.layers}, want one of {sorted(layers)}")
        same(f"{side}: top_k", shape.top_k, want["top_k"])
        if shape.experts is not None:
            same(f"{side}: experts", shape.experts, want["experts"])
    same("layers of the reader", shapes["reader"].layers, shapes["worker"].layers)


@check(REFUSED)
def test_a_config_without_answer_is_refused_with_the_keys(engine: Engine, case: Case) -> None:
    config = _config(case)
    _refused("describe", lambda: engine.describe(config), case)


@check(DENSE)
def test_a_dense_model_is_refused_by_name(engine: Engine, case: Case) -> None:
    config = _config(case)
    _refused("describe", lambda: engine.describe(config), case)


@check(CAPTURE_REFUSED)
def test_both_sides_of_capture_refuse_on_purpose(engine: Engine, case: Case) -> None:
    config = _config(case)
    for side in SIDES:
        _refused(side, partial(engine.capture_shape, config, side), case)


def _said(engine: Engine, case: Case, facts_of: Callable[[MoESpec], dict[str, Any]]) -> dict[str, Any]:
    config = _config(case)
    facts = facts_of(engine.describe(config))
    if case in SAVED:
        saved = json.loads(json.dumps(config.to_diff_dict()))  # as config.json, but for its spelling of infinity
        same("describe(config.json)", facts_of(engine.describe(saved)), facts)
    return facts


def _config(case: Case) -> Any:
    """The config object of the recipe, or its plain dict."""
    keys = json.loads(json.dumps(case["keys"]))  # a copy that the engine may change
    name = case.recipe.get("class")
    if name is None:
        return keys
    import transformers

    config_class = getattr(transformers, name, None)
    if config_class is None:
        raise Unsupported(f"transformers {transformers.__version__} has no {name}")
    return config_class(**keys)


def _refused(what: str, call: Callable[[], Any], case: Case) -> None:
    """An error on purpose with the names of the recipe; one that fell out of an attribute or key lookup says nothing.

    Keys are named as they are spelled, a dense model by its model type or its class (qwen3_moe, Qwen3MoeConfig).
    """
    by_name = case.clause == "config.refuse-dense" and case["names"]
    error = refused(what, call, () if by_name else case["names"])
    if isinstance(error, AttributeError | LookupError | TypeError):
        raise Nonconformance(f"{what}: stumbled over {type(error).__name__}, want an error that is meant: {error}")
    if by_name and _letters(case["names"][0]) not in _letters(str(error)):
        raise Nonconformance(f"{what}: {type(error).__name__} does not name {case['names'][0]}: {error}")


def _letters(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _facts(spec: MoESpec) -> dict[str, Any]:
    """A spec in few lines, defaults left out: layers as ranges, one value for each MoE layer as runs."""
    facts = {
        "layers": spec.num_layers,
        "moe_layers": _ranges(spec.moe_layers),
        "experts": _runs(spec.num_experts),
        "top_k": _runs(spec.top_k),
        "hidden": spec.hidden_size,
        "width": _runs(spec.moe_intermediate_size),
    }
    if spec.shared_experts or spec.shared_intermediate_size is not None:
        facts["shared"] = f"{spec.shared_experts} of summed width {spec.shared_intermediate_size}"
    if spec.latent_size is not None:
        facts["latent"] = spec.latent_size
    if spec.encoder_moe_layers:
        facts["encoder_moe_layers"] = _ranges(spec.encoder_moe_layers)
    return facts


def _layer_facts(spec: MoESpec) -> dict[str, Any]:
    """What layers compute, those that compute the same together; raises unless there is one for each MoE layer."""
    indices = spec.moe_layers or spec.encoder_moe_layers
    if len(spec.layers) != len(indices):
        raise Nonconformance(f"layers: got {len(spec.layers)}, want one for each of the {len(indices)} MoE layers")
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


def _runs(values: int | tuple[int, ...]) -> int | str:
    """(2, 2, 3) -> "2x2 1x3"."""
    if isinstance(values, int):
        return values
    return " ".join(f"{len(list(run))}x{value}" for value, run in groupby(values))
