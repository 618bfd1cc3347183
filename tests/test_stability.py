"""docs/stability.md, as far as a program can see it: nothing of the last release is gone or harder without a word."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from release_catalogue import FILE, text, today

import moe_conformance
from moe_conformance.catalogue import aliases

ROOT = Path(__file__).parent.parent
RELEASED: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))


def broken(released: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What a minor version must not do, a line each."""
    tables = {"cases": aliases.CASES, "classes": aliases.CLASSES, "checks": aliases.CHECKS, "stages": {}}
    for what, table in tables.items():
        for name in released[what]:
            if table.get(name, name) not in now[what]:
                yield f"{what}: {name} is gone, and no alias says where"
    for stage, words in released["features"].items():
        for word in words:
            if word not in now["features"].get(stage, ()) and (stage, word) not in aliases.WORDS:
                yield f"features: {word} of {stage} is gone, and no alias says what is declared instead"
    for name, (_, _, level) in released["cases"].items():
        found = now["cases"].get(aliases.CASES.get(name, name))
        if found is not None and (level, found[2]) == ("SHOULD", "MUST"):
            yield f"cases: {name} was a SHOULD and is a MUST"
    if released["protocol"] != now["protocol"]:
        yield f"protocol: {now['protocol']}, was {released['protocol']}"


def test_nothing_of_the_last_release_is_gone_or_harder() -> None:
    major = [version.partition(".")[0] for version in (RELEASED["release"], moe_conformance.__version__)]
    assert major[0] != major[1] or list(broken(RELEASED, today())) == []


def test_the_last_release_is_that_of_the_changelog() -> None:
    heads = [line for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line[:3] == "## "]
    versions = [line.split()[1] for line in heads if line.split()[1] != "unreleased"]
    assert versions[0] == RELEASED["release"]
    assert moe_conformance.__version__ == versions[0] or heads[0].split()[1] == "unreleased"


def test_the_file_is_as_the_tool_writes_it() -> None:
    assert FILE.read_text(encoding="utf-8") == text(RELEASED)


def _changed(**changes: Any) -> dict[str, Any]:
    return {**today(), **changes}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cases": {}}, "cases: layer-tiny-padded-hidden is gone, and no alias says where"),
        ({"classes": []}, "classes: shape-mismatch is gone"),
        ({"checks": []}, "checks: padding_never_reaches_the_output is gone"),
        ({"stages": []}, "stages: layer is gone"),
        ({"features": {}}, "features: softmax of layer is gone"),
        ({"protocol": 3}, "protocol: 3, was 2"),
    ],
)
def test_what_goes_without_a_word_is_noticed(change: dict[str, Any], words: str) -> None:
    assert any(line.startswith(words) for line in broken(today(), _changed(**change)))


def test_a_should_that_becomes_a_must_is_noticed_and_the_other_way_is_not() -> None:
    def at(level: str) -> dict[str, Any]:
        return _changed(cases={"layer-tiny-padded-hidden": ["layer", "shape-mismatch", level]})

    assert "cases: layer-tiny-padded-hidden was a SHOULD and is a MUST" in list(broken(at("SHOULD"), at("MUST")))
    assert list(broken(at("MUST"), at("SHOULD"))) == []


def test_an_alias_says_where_a_case_went(monkeypatch: pytest.MonkeyPatch) -> None:
    old = _changed(cases={"layer-old": ["layer", "shape-mismatch", "MUST"]})
    assert len(list(broken(old, today()))) == 1
    monkeypatch.setattr(aliases, "CASES", {"layer-old": "layer-tiny-padded-hidden"})
    assert list(broken(old, today())) == []


def test_what_is_new_breaks_nothing() -> None:
    more = {**today()["cases"], "layer-new": ["layer", "shape-mismatch", "MUST"]}
    assert list(broken(today(), _changed(cases=more))) == []
