"""Records: what is derived of them is written out, and a fault in any field of any of them is noticed.

A record is not its own witness. What the sweep below calls a fact is held against something else elsewhere: described
configs against goldens and transformers' own models (suites/describe), blocks against transformers' blocks
(suites/block), defaults and dead keys against its config classes (tests/test_config.py), names against what it saves
(tests/test_checkpoints.py), and all that is written out against a reviewed file. A fault that changes no fact is one
that nobody would see.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any

import pytest
import written_out
from record_facts import derived, facts, lines

from moe_conformance.catalogue.case import catalogue
from moe_conformance.model.families.configs import Size
from moe_conformance.model.families.families import BY_SLUG, RECORDS, Families
from moe_conformance.model.families.keys import Key
from moe_conformance.model.families.naming import Piece
from moe_conformance.model.families.record import LAYERS, SHARED_COUNT, TOP_K, Config, Record, Shared, Sizes
from moe_conformance.model.families.words import ACTIVATIONS
from moe_conformance.suites.describe.families import flat_keys


@pytest.mark.parametrize("slug", BY_SLUG)
def test_what_is_derived_of_a_record_is_as_written_out(slug: str) -> None:
    """`python tests/written_out.py` writes it again, for a review."""
    assert list(derived(BY_SLUG[slug])) == lines(BY_SLUG[slug])[0]


def test_nothing_is_written_out_of_a_family_without_a_record() -> None:
    assert {path.stem for path in written_out.FOLDER.iterdir()} == set(BY_SLUG)


WITHOUT = """
import pkgutil, sys

every = pkgutil.iter_modules
pkgutil.iter_modules = lambda *where: (found for found in every(*where) if found.name != sys.argv[1])
from moe_conformance.catalogue.case import catalogue
from moe_conformance.engines.reference import Reference

print(*catalogue(), *(word for words in Reference().capabilities().values() for word in words))
"""


@pytest.mark.parametrize("slug", ["solar-open", "mixtral", "jamba", "qwen3-omni-thinker"])
def test_a_family_without_its_record_is_nowhere(slug: str) -> None:
    """No case and no engine of ours has it, and everything else is there."""
    record = BY_SLUG[slug]
    module = record.model_type.replace("-", "_")
    done = subprocess.run([sys.executable, "-c", WITHOUT, module], capture_output=True, text=True, check=True)
    left, whole = set(done.stdout.split()), {*catalogue(), *RECORDS}
    assert record.model_type not in left
    gone = {case for case in whole - left if case in catalogue()}
    named = {name: case.recipe.get("family", slug) for name, case in catalogue().items() if slug in name}
    assert gone == {name for name, family in named.items() if family == slug or family.startswith(f"{slug}-")}
    assert len(gone) > 5


@pytest.mark.parametrize("module", ["deepseek_v3", "gpt_oss", "qwen3_moe"])
def test_cases_that_name_a_family_go_with_it(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT, module], capture_output=True, text=True, check=True)
    assert f"update-{module.replace('_', '-')}-once" not in done.stdout.split()


MIXTRAL_LIKE = next(record for record in RECORDS.values() if record.sample == "smoke" and not record.wrapper)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"slug": "another"}, r"got '\w+', which is that of \w+ too"),
        ({"model_type": "another", "also": (MIXTRAL_LIKE.model_type,)}, "one record for each model type and slug"),
        ({"model_type": "another"}, "one record for each model type and slug"),
    ],
)
def test_two_records_for_one_name_are_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Families([*RECORDS.values(), replace(MIXTRAL_LIKE, **changed)])


def test_what_a_record_cannot_say_is_refused_where_it_is_written() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'experts_per_token'"):
        replace(MIXTRAL_LIKE, experts_per_token=2)
    with pytest.raises(TypeError, match="default"):
        Key("norm_topk_prob")  # type: ignore[call-arg]  # a config may lack it
    with pytest.raises(TypeError, match=r"also: got 'mixtral', want a tuple"):
        replace(MIXTRAL_LIKE, also="mixtral")
    with pytest.raises(ValueError, match="form: got 'hub', want one of class, nested, plain"):
        Config("hub", form="hub")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="want form 'plain'"):
        Config("hub", model_type="mixtral")
    with pytest.raises(ValueError, match="want one of them"):
        Sizes(width_of_hidden="mlp_ratio")
    with pytest.raises(ValueError, match="width_entry with width 1"):
        Sizes(width=1, width_entry=0)
    with pytest.raises(ValueError, match="got 'turned', want ops of transposed"):
        Piece("gate.weight", "router.proj", ops=("turned",))  # type: ignore[arg-type]


# The sweep ---------------------------------------------------------------------------------------------------------


def differs(record: Record, true: Record, before: list[str]) -> bool:
    """Whether a fact of the record is not as it was; the first that differs is enough."""
    try:
        return any(new != old for new, old in itertools.zip_longest(facts(record, true), before))
    except Exception:  # a record that breaks what reads it is noticed, however it breaks it
        return True


# Tables that all records share; tests of their own have their entries.
COMMON = (TOP_K, LAYERS, SHARED_COUNT, ACTIVATIONS)
# In place of None.
PLANTED: Mapping[str, Any] = {
    "shared": Shared(1),
    "width_entry": 0,
    "extra_experts": ("zero_expert_num", 1),
    "dense": {},
}


def others(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Each way in which a value may be a little wrong, with its path."""
    if any(value is table for table in COMMON):
        yield path, type(value)()
    elif isinstance(value, Size):
        yield path, Size.DENSE if value is not Size.DENSE else Size.WIDTH
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            held = getattr(value, item.name)
            # A default of nothing says nothing that could be wrong; there may be something in its place.
            if held or held is None or item.default is MISSING or held != item.default:
                for where, other in others(held, f"{path}.{item.name}"):
                    yield where, _replaced(value, item.name, other)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield f"{path}[{key!r}] dropped", {name: kept for name, kept in value.items() if name != key}
            for where, other in others(entry, f"{path}[{key!r}]"):
                yield where, {**value, key: other}
    elif isinstance(value, tuple | list):
        for index, entry in enumerate(value):
            yield f"{path}[{index}] dropped", type(value)((*value[:index], *value[index + 1 :]))
            for where, other in others(entry, f"{path}[{index}]"):
                yield where, type(value)((*value[:index], other, *value[index + 1 :]))
    elif isinstance(value, bool):
        yield path, not value
    elif isinstance(value, int):
        yield path, value + 1
    elif isinstance(value, float):
        yield path, value * 2 if 0 < abs(value) < float("inf") else 1.0
    elif isinstance(value, str):
        yield path, f"{value}x"
    elif callable(value):
        yield path, _wrong(value)
    elif value is None and path.rpartition(".")[2] in PLANTED:
        yield path, PLANTED[path.rpartition(".")[2]]


def _replaced(value: Any, name: str, other: Any) -> Any:
    try:
        return replace(value, **{name: other})
    except (TypeError, ValueError):  # refused where it is written
        return None


def _wrong(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but for its result: a rule without its last layer, or another value."""

    def wrong(*given: Any) -> Any:
        found = function(*given)
        if isinstance(found, tuple):
            return found[:-1]
        return next(others(found, ""))[1]

    return wrong


# What a fault may not show in. Bounds of what is believed are no knowledge of a model (tests/test_config.py has them);
# why a method cannot be said, and which authority is followed, are words for a reader; sizes of a tiny model are those
# at which it can be built. What a way says that the config says already is said once; of a method that cannot be said
# nothing is read.
WORDS = (".least", ".most", ".whole", ".unsaid", ".authority", ".lenient")
EQUIVALENT = {
    # One key decides two fields; of this one all numbers mean the same.
    ("dbrx", ".method.routing['renormalize'].default"),
    # The sizes ask for this key, so that its default here is never taken.
    ("inkling", ".method.routing['shared_classes'].default"),
    # Its list of attention layers is as long.
    ("lfm2-moe", ".sizes.num_layers"),
}


def is_left_out(record: Record, path: str) -> bool:
    if path.endswith(WORDS) or path.startswith(".tiny.keys") or (record.slug, path) in EQUIVALENT:
        return True
    if path.startswith(".disputed[") and not path.endswith("dropped"):
        return True
    if record.method.unsaid and path.startswith(".method."):
        return True
    said = re.fullmatch(r"\.ways\[(\d+)\]\['(\w+)'\] dropped", path)
    return said is not None and flat_keys(record).get(said[2]) == record.ways[int(said[1])][said[2]]


@pytest.mark.parametrize("slug", BY_SLUG)
def test_a_fault_in_any_field_of_a_record_is_noticed(slug: str) -> None:
    record = BY_SLUG[slug]
    before = list(facts(record, record))
    found = [(path, other) for path, other in others(record, "") if not is_left_out(record, path)]
    assert len(found) > 30 and not differs(record, record, before)
    assert [path for path, other in found if not differs(other, record, before)] == []
