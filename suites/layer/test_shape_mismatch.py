"""Padded widths must be cut before they meet unpadded ones (vllm#40794), in all eight of shared x latent x padded."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_conformance.catalogue.case import Case, check
from moe_conformance.engine import LayerInputs
from moe_conformance.errors import Nonconformance
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import distinct_logits, normal, poisoned_allocations, windows
from moe_conformance.suites.layer.cases import TRACE_CASES, VALUE_CASES
from moe_conformance.suites.layer.oracle import layer


def build(case: Case) -> LayerInputs:
    """Inputs of a case. Weights are about 1 over the root of what they sum over, so that every part of the output
    is of a size with the others and none hides in another's rounding."""
    dtype = getattr(torch, case["dtype"])
    T, E, H, F, Fs = (case[name] for name in ("T", "E", "H", "F", "Fs"))
    has = set(case["parts"])
    D = case["D"] if "latent" in has else H

    def weight(name: str, *shape: int) -> Tensor:
        std = 2.0 ** round(-0.5 * (shape[-1] - 1).bit_length())
        return windows(shape, f"layer-{name}", dtype, std)

    return LayerInputs(
        x=normal((T, H), "layer-x", dtype),
        logits=distinct_logits(T, E, "layer-logits"),
        w13=weight("w13", E, 2 * F, D),
        w2=weight("w2", E, D, F),
        top_k=case["K"],
        method=case["method"],
        activation=case["activation"],
        scale=case["scale"],
        per_expert_scale=normal((E,), "layer-expert-scale") + 1.5 if case["method"] == "gemma4" else None,
        shared_w13=weight("shared-w13", 2 * Fs, H) if "shared" in has else None,
        shared_w2=weight("shared-w2", H, Fs) if "shared" in has else None,
        latent_in=weight("latent-in", D, H) if "latent" in has else None,
        latent_out=weight("latent-out", H, D) if "latent" in has else None,
        padded_hidden=case["Dp" if "latent" in has else "Hp"] if "padded_hidden" in has else None,
        padded_intermediate=case["Fp"] if "padded_intermediate" in has else None,
    )


def on(inputs: LayerInputs, device: str) -> LayerInputs:
    if device == "cpu":
        return inputs
    values = {item.name: getattr(inputs, item.name) for item in fields(inputs)}
    moved: dict[str, Any] = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
    return replace(inputs, **moved)


@check(VALUE_CASES)
@torch.no_grad()
def test_padding_never_reaches_the_output(engine: Any, case: Case) -> dict[str, Any]:
    """The output equals that of the same layer computed without padding; every fresh allocation is poisoned."""
    inputs = build(case)
    with poisoned_allocations():
        got = engine.layer(on(inputs, engine.info.device))
    compare.shape_and_type("layer output", got, inputs.x.shape, integer=False)
    compare.same("layer output's dtype", str(got.dtype), str(inputs.x.dtype))
    want, bound = layer(inputs)
    compare.close("layer output", got, want, bound)
    return {"shape": list(got.shape), "dtype": str(got.dtype)}


# Whatever scratch keeps does not depend on scale or dtype.
FLOAT32_CASES = tuple(case for case in VALUE_CASES if case["scale"] != 1 and case["dtype"] == "float32")


@check(case for case in FLOAT32_CASES if case["T"] > 1 and case.id.startswith(("layer-tiny-", "layer-both")))
@torch.no_grad()
def test_a_second_run_gives_the_same_bits(engine: Any, case: Case) -> None:
    """A scratch buffer that keeps something of the first run shows in the second."""
    inputs = on(build(case), engine.info.device)
    first = engine.layer(inputs).clone()
    engine.layer(replace(inputs, x=inputs.x.flip(0) * 3))
    compare.equal("layer output of the second run", engine.layer(inputs), first)


@check(TRACE_CASES)
@torch.no_grad()
def test_fake_tensors_have_the_true_shape(engine: Any, case: Case) -> dict[str, Any]:
    """Under FakeTensorMode, as Dynamo and the memory planner run the layer, shape and dtype are those of a real run."""
    inputs = on(build(case), engine.info.device)
    mode = FakeTensorMode()
    values = {item.name: getattr(inputs, item.name) for item in fields(inputs)}
    faked: dict[str, Any] = {n: mode.from_tensor(v) for n, v in values.items() if isinstance(v, Tensor)}
    fake = replace(inputs, **faked)
    with mode:
        got = engine.raw.layer(fake)
    return {"shape": [int(size) for size in got.shape], "dtype": str(got.dtype)}


@check(case for case in TRACE_CASES if "padded_intermediate" in case["parts"])  # half a second each
@torch.no_grad()
def test_the_whole_layer_compiles_without_a_graph_break(engine: Any, case: Case) -> None:
    """torch.compile(fullgraph=True) traces it, and the traced layer computes what the eager one does."""
    inputs = on(build(case), engine.info.device)
    want, bound = layer(build(case))
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
    return LayerInputs(
        x=x,
        logits=logits,
        w13=inputs.w13,
        w2=inputs.w2,
        top_k=inputs.top_k,
        method=inputs.method,
        activation=inputs.activation,
        scale=inputs.scale,
        per_expert_scale=inputs.per_expert_scale,
        shared_w13=inputs.shared_w13,
        shared_w2=inputs.shared_w2,
        latent_in=inputs.latent_in,
        latent_out=inputs.latent_out,
        padded_hidden=inputs.padded_hidden,
        padded_intermediate=inputs.padded_intermediate,
    )
