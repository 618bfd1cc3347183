"""What is judged of a record, as lines of text. Two records whose lines are all the same are the same to everybody."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import written_out

from moe_conformance.errors import MoEConformanceError
from moe_conformance.model.families.configs import UNPUBLISHED
from moe_conformance.model.families.describe import describe
from moe_conformance.model.families.families import Families
from moe_conformance.model.families.keys import keys_in
from moe_conformance.model.families.record import Record
from moe_conformance.reference_impl.checkpoint.names import names_of
from moe_conformance.reference_impl.checkpoint.places import Places
from moe_conformance.suites.block.configs import plain, varied
from moe_conformance.suites.describe.cases import of
from moe_conformance.suites.describe.families import flat_keys


def lines(record: Record) -> tuple[list[str], list[str]]:
    """What is written out of the record, and what of the real model."""
    if not written_out.path_of(record).exists():
        return [], []
    found = written_out.path_of(record).read_text(encoding="utf-8").splitlines()
    real = [line for line in found if line.startswith(("hub ", "modules ", "saved as: "))]
    return [line for line in found if line not in real], real


def derived(record: Record) -> Iterator[str]:
    yield from written_out.said(record)
    yield from written_out.never_written(record, lines(record)[1])


def facts(record: Record, true: Record) -> Iterator[str]:
    """Everything that is judged of a record, part by part. true: the record that it may be a faulty copy of."""
    alone = Families([record])
    yield from derived(record)
    level = {"model_type": record.model_type, **flat_keys(record)}
    for _, case in of(record):
        keys = case["keys"]
        if "class" in case.recipe:
            keys = level_said(record, keys)
        yield answer(lambda keys=keys: describe(keys, alone))
    # Without the keys of its method a config means the defaults of its class, in each way to choose one.
    for bare in bare_configs(true, level):
        yield answer(lambda bare=bare: describe(bare, alone))
    for keys in spelled(true, level):
        yield answer(lambda keys=keys: describe(keys, alone))
    # A null, alone and beside the key that the config class reads then.
    for key, (other, _) in true.sizes.nulls.items():
        for beside in ({}, {other: 3}):
            yield answer(lambda keys={**level, **beside, key: None}: describe(keys, alone))
            yield answer(lambda keys={**level, **beside, key: None}: Places(keys, alone).wanted)
    if record.block is not None:
        whole = plain(record, record.block)
        for family in (whole, *(varied(whole, variant) for variant in record.variants.values())):
            yield answer(lambda family=family: describe(family.config, alone))
    if record.names is not None:
        yield from named(record, alone, level)


def bare_configs(record: Record, level: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The sizes alone, and with the words of each way that choose a method: a test of configs has the same."""
    bare = without_method(record, level)
    yield bare
    for way in record.ways:
        if words := {key: value for key, value in way.items() if isinstance(value, str) and key not in UNPUBLISHED}:
            yield {**bare, **words}


def without_method(record: Record, level: Mapping[str, Any]) -> dict[str, Any]:
    method = {name for names in record.method_keys for name in names} - {"n_shared_experts"}
    bare = {key: value for key, value in level.items() if key not in method}
    # 8 groups, where that is the default.
    return bare | {key: 16 for key in ("num_experts", "n_routed_experts") if key in bare}


def spelled(record: Record, level: Mapping[str, Any], meaningless: bool = True) -> Iterator[Mapping[str, Any]]:
    """Under each name of a key that has several, a value that says something; and one that means nothing."""
    bare = without_method(record, level)
    keys = {key.names: key for part in vars(record.method).values() for key in keys_in(part)}
    for names, key in keys.items():
        for name in names if len(names) > 1 else ():
            yield {**bare, name: flipped(key.default)}
        if meaningless:
            yield {**bare, names[0]: ["no such value"]}
    shared = record.sizes.shared
    for name in shared.width if shared and len(shared.width) > 1 else ():
        yield {key: value for key, value in level.items() if key not in shared.width} | {name: 28}


def flipped(value: Any) -> Any:
    """Another value of the kind of a default."""
    if isinstance(value, bool):
        return not value
    return 2 if isinstance(value, int) else 1.25


def level_said(record: Record, keys: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments of a config class as a config.json: the level that describes the experts says its model type."""
    path = record.wrapper.path if record.wrapper else ()
    if not path or path[0] not in keys:
        return {"model_type": record.model_type, **keys}
    return {**keys, path[0]: level_said_below(record, keys[path[0]], path[1:])}


def level_said_below(record: Record, keys: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    if path:
        return {**keys, path[0]: level_said_below(record, keys[path[0]], path[1:])}
    return {"model_type": record.model_type, **keys}


def named(record: Record, alone: Families, level: Mapping[str, Any]) -> Iterator[str]:
    """Where each of the real model's names belongs, and what stands before them."""
    _, real = lines(record)
    places = Places(level, alone)
    root = real[0].removeprefix("saved as: ")
    if root and alone.name_of(root):
        yield f"prefix {names_of({'model_type': root}, alone).prefix!r}"
    if record.tiny.text_class:
        yield repr(names_of({"model_type": record.model_type}, alone).written)
    yield repr([(before, sorted(layer.tensors.items()), layer.sizes) for before, layer in places.layers()])
    number = max(int(layer.prefix.rstrip(".").rpartition(".")[2]) for _, layer in places.layers())
    for line in real[1:]:
        form, pattern, *_ = line.split(" ")
        for expert in (0, 10, 11, 16, 21):
            name = pattern.replace("{l}", str(number)).replace("{e}", str(expert))
            yield f"{form} {answer(lambda name=name: places.locate(name))}"


def answer(call: Callable[[], Any]) -> str:
    try:
        return repr(call())
    except MoEConformanceError as error:
        return f"{type(error).__name__}: {error}"
