"""A quantised checkpoint gives the numbers that its codes and scales make, in every published form."""

from __future__ import annotations

import tempfile
from pathlib import Path

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine
from moe_conformance.errors import CheckpointError, Nonconformance
from moe_conformance.judging import compare
from moe_conformance.oracle.bounds import relative
from moe_conformance.suites.load.cases import STORED
from moe_conformance.suites.load.stored import write

# Products with a scale and a global one, and a quotient on the way to the latter.
ROUNDINGS = 3


@check(STORED)
def test_a_load_gives_the_numbers_of_every_form(engine: Engine, case: Case) -> None:
    """Weights come in any dtype that floats have, rounded as it does; what was not quantised comes as it is."""
    with tempfile.TemporaryDirectory() as folder:
        want = write(Path(folder), case.recipe)
        try:
            got = engine.load(Path(folder))
        except CheckpointError as error:
            raise Nonconformance(f"a whole checkpoint: refused ({error}), want every tensor of it") from error
    absent = sorted(set(want) - set(got))
    if absent:
        raise Nonconformance(f"loaded tensors: {', '.join(absent)} not there, got {sorted(got)}")
    for name, tensor in want.items():
        compare.shape_and_type(name, got[name], tensor.shape, integer=False)
        bound = relative(tensor.double(), ROUNDINGS, got[name].dtype, "code times scales")
        compare.close(name, got[name], tensor.double(), bound)
