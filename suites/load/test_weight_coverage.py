"""A checkpoint that does not fit its config, or is damaged, is refused whole."""

from __future__ import annotations

import tempfile
from pathlib import Path

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine
from moe_conformance.errors import Unsupported
from moe_conformance.judging import compare
from moe_conformance.suites.load import checkpoint, families
from moe_conformance.suites.load.cases import BROKEN, INCOMPLETE
from moe_conformance.suites.load.loaded import loads_whole


@check(BROKEN)
def test_a_broken_checkpoint_is_refused(engine: Engine, case: Case) -> None:
    """And a whole one loads afterwards."""
    with tempfile.TemporaryDirectory() as broken, tempfile.TemporaryDirectory() as whole:
        checkpoint.write(Path(broken), case.recipe)
        compare.refused(f"a checkpoint with {case['damage']}", lambda: sorted(engine.load(Path(broken))))
        want = checkpoint.write(Path(whole), {**case.recipe, "damage": None}, "whole")
        try:
            loads_whole(engine, Path(whole), want)
        except Exception as error:
            # A style that does not load at all is judged by the load cases, once.
            raise Unsupported(f"the same checkpoint undamaged does not load: {error}") from error


@check(INCOMPLETE)
def test_a_tensor_that_only_its_family_has_is_missed(engine: Engine, case: Case) -> None:
    """A checkpoint without it is refused, and a whole one loads afterwards."""
    with tempfile.TemporaryDirectory() as broken, tempfile.TemporaryDirectory() as whole:
        families.write(Path(broken), case["family"], "hub", missing=case["missing"])
        compare.refused(f"a checkpoint without {case['missing']}", lambda: sorted(engine.load(Path(broken))))
        want = families.write(Path(whole), case["family"], "hub", "whole")
        try:
            loads_whole(engine, Path(whole), want)
        except Exception as error:
            raise Unsupported(f"the same checkpoint with it does not load: {error}") from error
