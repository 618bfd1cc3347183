"""ci/floors.txt, which CI tries, is what pyproject.toml admits at its lowest."""

from __future__ import annotations

import tomllib
from pathlib import Path

from floors import FLOORS, floors
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def admitted() -> dict[str, Version]:
    """The lower bounds of the metadata: what is needed to run, to develop and to build."""
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = metadata["project"]
    lines = [*project["dependencies"], *metadata["build-system"]["requires"]]
    lines += [line for extra in project["optional-dependencies"].values() for line in extra]
    bounds = [(required.name, bound) for required in map(Requirement, lines) for bound in required.specifier]
    assert {bound.operator for _, bound in bounds} == {">="}
    return {name: Version(bound.version) for name, bound in bounds}


def test_every_floor_of_the_metadata_is_tried_and_no_other() -> None:
    """A bound of 3.6 is tried as 3.6.1 where no 3.6.0 was released, but never as 3.7."""
    tried = {name: Version(line.partition("==")[2]) for name, line in floors(FLOORS).items()}
    bounds = admitted()
    assert sorted(tried) == sorted(bounds)
    too_high = {
        name: (str(tried[name]), str(bound))
        for name, bound in bounds.items()
        if tried[name] < bound or tried[name].release[: len(bound.release)] != bound.release
    }
    assert too_high == {}
