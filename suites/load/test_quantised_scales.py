"""A quantised checkpoint gives the numbers that its codes and scales make, in every published form."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import Engine, Loaded, MLPSpec, QuantSpec
from moe_conformance.errors import CheckpointError, Nonconformance
from moe_conformance.judging import compare
from moe_conformance.oracle.bounds import relative
from moe_conformance.oracle.quantised import plain_weights
from moe_conformance.quote import quoted
from moe_conformance.suites.load.cases import STORED
from moe_conformance.suites.load.forms import EXPERTS, HIDDEN, NUMBERS_ALONE, WIDTH
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
    if isinstance(got, Loaded):
        _mean_the_same(got, want, case)


def _mean_the_same(got: Loaded, want: Mapping[str, Tensor], case: Case) -> None:
    """Stored experts are those of the format, in their shapes, and mean the same numbers."""
    mlp = MLPSpec(case.recipe.get("width", WIDTH))
    layers = {name.removesuffix("experts.w2") for name in want if name.endswith("experts.w2")}
    left = [name for name in case["left"] if not name.startswith("shared")]
    # ModelOpt's last group has what is left of a row.
    is_cut = case["stored"] == "nvfp4-modelopt" and "width" in case.recipe
    said = set() if left or is_cut or case["stored"] in NUMBERS_ALONE else layers
    if got.stored.keys() != said:
        raise Nonconformance(f"stored: got {sorted(got.stored)}, want {sorted(said)}, whose experts a QuantSpec says")
    for layer, held in got.stored.items():
        if len(held) != 2 or not isinstance(held[0], QuantSpec):
            raise Nonconformance(f"stored[{layer!r}]: got {quoted(held)}, want a QuantSpec and its tensors")
        quant, tensors = held
        if quant.format != case["codes"]:
            raise Nonconformance(f"stored[{layer!r}]: got format {quant.format}, want {case['codes']}")
        shapes = quant.tensors("experts", mlp, HIDDEN, (EXPERTS,))
        if tensors.keys() != shapes.keys():
            raise Nonconformance(f"stored[{layer!r}]: got {sorted(tensors)}, want {sorted(shapes)}")
        for name, shape in shapes.items():
            compare.shape_and_type(f"stored {layer}{name}", tensors[name], shape, integer=None)
        for name, numbers in plain_weights(quant, mlp, tensors, HIDDEN).items():
            # A quotient in place of a scale is in float32.
            bound = relative(want[layer + name].double(), ROUNDINGS, torch.float32, "code times scales")
            compare.close(f"stored {layer}{name}, as numbers", numbers, want[layer + name].double(), bound)
