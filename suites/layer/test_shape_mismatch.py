"""Padded widths must be cut before they meet unpadded ones (vllm#40794), in all eight of shared x latent x padded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import LayerInputs, LayerSpec
from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare
from moe_conformance.oracle.layer import expected_layer
from moe_conformance.protocol.moving import to_device
from moe_conformance.suites.layer.cases import CUT_CASES, TRACE_CASES
from moe_conformance.suites.layer.inputs import inputs_of
from moe_conformance.suites.layer.judging import answer


@check(CUT_CASES)
@torch.no_grad()
def test_padding_never_reaches_the_output(engine: Any, case: Case) -> dict[str, Any]:
    """The output equals that of the same layer computed without padding; every fresh allocation is poisoned."""
    inputs = inputs_of(case)
    got = answer(engine, inputs)
    want, bound = expected_layer(inputs)
    compare.close("layer output", got, want, bound)
    return {"shape": list(got.shape), "dtype": str(got.dtype)}


@check(TRACE_CASES)
@torch.no_grad()
def test_fake_tensors_have_the_true_shape(engine: Any, case: Case) -> dict[str, Any]:
    """Under FakeTensorMode, as Dynamo and the memory planner run the layer, shape and dtype are those of a real run."""
    inputs = to_device(inputs_of(case), engine.info.device)
    engine.within("layer", inputs)  # `raw` is not guarded
    mode = FakeTensorMode()
    fake = replace(
        inputs,
        x=mode.from_tensor(inputs.x),
        logits=mode.from_tensor(inputs.logits),
        tensors={name: mode.from_tensor(tensor) for name, tensor in inputs.tensors.items()},
    )
    with mode:
        got = engine.raw.layer(fake)
    compare.same("layer output's shape under fake tensors", [int(size) for size in got.shape], list(inputs.x.shape))
    return {"shape": [int(size) for size in got.shape], "dtype": str(got.dtype)}


def _compiled(case: Case) -> bool:
    """The layer with neither of its other parts, and with both: half a second each."""
    spec: LayerSpec = case["spec"]
    return bool(case["padded_intermediate"]) and (spec.shared is None) == (spec.latent is None)


@check(filter(_compiled, TRACE_CASES))
@torch.no_grad()
def test_the_whole_layer_compiles_without_a_graph_break(engine: Any, case: Case) -> None:
    """torch.compile(fullgraph=True) traces it, and the traced layer computes what the eager one does."""
    inputs = to_device(inputs_of(case), engine.info.device)
    engine.within("layer", inputs)  # `raw` is not guarded
    want, bound = expected_layer(inputs_of(case))
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor, logits: Tensor) -> Tensor:
        output: Tensor = engine.raw.layer(replace_inputs(inputs, x, logits))
        return output

    try:
        got = compiled(inputs.x, inputs.logits)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = "\n".join(str(error).splitlines()[:6])
        raise Nonconformance(f"torch.compile(fullgraph=True) cannot trace the layer: {reason}") from error
    compare.close("compiled layer output", got, want, bound)


def replace_inputs(inputs: LayerInputs, x: Tensor, logits: Tensor) -> LayerInputs:
    """dataclasses.replace, spelt so that Dynamo can trace it."""
    return LayerInputs(x, logits, inputs.spec, inputs.tensors, inputs.padded_hidden, inputs.padded_intermediate)
