"""A real load gives every tensor of the checkpoint, in every naming style, whatever was loaded before."""

from __future__ import annotations

import tempfile
from pathlib import Path

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine
from moe_conformance.errors import Unsupported
from moe_conformance.suites.load import checkpoint, families
from moe_conformance.suites.load.cases import BESIDE, LOAD, LOAD_TWICE, OF_FAMILIES, PUBLISHED, UNSAID
from moe_conformance.suites.load.loaded import loads_whole


@check(LOAD)
def test_a_load_gives_every_tensor_of_the_checkpoint(engine: Engine, case: Case) -> dict[str, str]:
    """Returns shape and checksum of each tensor, which are the same in every engine and every naming style."""
    with tempfile.TemporaryDirectory() as folder:
        return loads_whole(engine, Path(folder), checkpoint.write(Path(folder), case.recipe))


@check(LOAD_TWICE)
def test_each_load_gives_its_own_checkpoint(engine: Engine, case: Case) -> None:
    """First, second, the first again, and the first with new content: nothing of an earlier load is left."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        want = {
            Path(first): checkpoint.write(Path(first), case.recipe, "first"),
            Path(second): checkpoint.write(Path(second), case.recipe, "second"),
        }
        for folder in (Path(first), Path(second), Path(first)):
            loads_whole(engine, folder, want[folder])
        loads_whole(engine, Path(first), checkpoint.write(Path(first), case.recipe, "third"))


@check(OF_FAMILIES + PUBLISHED + UNSAID)
def test_a_load_gives_every_tensor_of_every_family(engine: Engine, case: Case) -> None:
    """The names of modules are judged where those of the hub load."""
    if case["form"] == "modules":
        with tempfile.TemporaryDirectory() as folder:
            want = families.write(Path(folder), case["family"], "hub")
            try:
                loads_whole(engine, Path(folder), want)
            except Exception as error:
                raise Unsupported(f"the same tensors under the hub's names do not load: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        unsaid = case.recipe.get("unsaid", "")
        loads_whole(engine, Path(folder), families.write(Path(folder), case["family"], case["form"], unsaid=unsaid))


@check(BESIDE)
def test_a_load_takes_nothing_from_what_lies_beside_the_model(engine: Engine, case: Case) -> None:
    """Neither from a draft layer nor from a file that the index does not name."""
    with tempfile.TemporaryDirectory() as folder:
        want = families.write(Path(folder), case["family"], case["form"], beside=case["beside"])
        loads_whole(engine, Path(folder), want)
