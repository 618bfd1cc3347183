"""Whatever a config or a checkpoint says, a call gives a result or an error of this project's own, and soon.

tests/hostile/ holds inputs that once did not: `python tools/fuzz.py --keep` adds to it. Here each is tried again, and a
few new ones; CI's own minute of tools/fuzz.py, and the night's hour, try many.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hostile_inputs import Found, Hostile, configs, generated, judged, kept, little_memory, tries

from moe_conformance.errors import ConfigError
from moe_conformance.model.families.describe import describe

CORPUS = sorted((Path(__file__).parent / "hostile").glob("*.json"))


# For one call: five times what tools/fuzz.py grants, for here other tests run beside.
SECONDS = 10.0


def findings(hostile: Hostile) -> list[Found]:
    with little_memory(), tries(hostile) as calls:
        answers = [judged(name, call, SECONDS) for name, call in calls]
    return [finding for _, finding in answers if finding is not None]


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.stem)
def test_what_was_found_once_is_refused_or_read(file: Path) -> None:
    assert findings(kept(file)) == []


@pytest.mark.parametrize(("kind", "count"), [("config", 200), ("checkpoint", 150), ("stored", 100), ("record", 100)])
def test_hostile_inputs_are_refused_or_read(kind: str, count: int) -> None:
    for number in range(count):
        hostile = generated(kind, random.Random(f"test {number}"))
        assert findings(hostile) == [], hostile.text()


def test_what_inputs_are_made_of_is_valid() -> None:
    """All but the bases that are cases of refusal: else nothing behind the first check would be reached."""
    refused = []
    for name, config in configs().items():
        try:
            describe(config)
        except ConfigError:
            refused.append(name)
    assert len(refused) < len(configs()) / 10, refused


@pytest.mark.parametrize("kind", ["config", "checkpoint", "stored", "record"])
def test_inputs_depend_on_their_seed_alone(kind: str) -> None:
    assert generated(kind, random.Random("one")).text() == generated(kind, random.Random("one")).text()


def test_other_errors_slowness_and_endless_messages_are_found() -> None:
    def slow() -> None:
        while True:
            pass

    def endless() -> None:
        raise ConfigError("x" * 10_000)

    def raw() -> None:
        raise KeyError("x")

    def fine() -> None:
        raise ConfigError("x")

    calls = (slow, endless, raw, fine)
    assert [judged("a call", call, seconds=0.05)[0] for call in calls] == ["slow", "endless", "raw", "refused"]
    assert [judged("a call", call, seconds=0.05)[1] is None for call in calls] == [False, False, False, True]
