"""The routed sum: align, both projections, combine. Twin of `routed_experts` in reference_impl/experts.py.

Ids: the reference raises InputError for an id outside [-1, N). Kernels cannot raise without waiting for the device:
they treat any id that names no expert as -1, which adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import ExpertsInputs, MLPSpec
from moe_conformance.errors import InputError, Unsupported
from moe_conformance.kernels.combine import combine
from moe_conformance.kernels.dispatch import align
from moe_conformance.kernels.float8 import Quantised, quantised_of
from moe_conformance.kernels.grouped_kernel import Dispatched
from moe_conformance.kernels.grouped_matmul import down, gate_up
from moe_conformance.kernels.tuning import Config, Problem, choose
from moe_conformance.reference_impl.experts import normalised_output
from moe_conformance.reference_impl.operators import arguments, keywords, operator


def parts(spec: MLPSpec) -> tuple[str, str]:
    """The names of an expert's two matrices."""
    return "w13" if spec.gated else "w1", "w2"


def problem_of(x: Tensor, spec: MLPSpec, w2: Tensor, top_k: int, experts: int) -> Problem:
    """The problem that tiles are chosen for, at the weights' widths. experts: how many the ids count."""
    _, hidden, width = w2.shape
    return Problem(len(x), top_k, experts, hidden, width, x.dtype, spec.gated, w2.dtype == torch.float8_e4m3fn)


def compute(
    x: Tensor,
    spec: MLPSpec,
    tensors: Mapping[str, Tensor],
    ids: Tensor,
    weights: Tensor,
    config: Config,
    *,
    identity_experts: int = 0,
    output_scale: float = 1.0,
    added: Tensor | None = None,
    expert_map: Tensor | None = None,
    quantised: Mapping[str, Quantised] | None = None,
    interleaved: bool = False,
) -> Tensor:
    """`routed_experts` with tiles of the caller's choice."""
    first, quantised = "13" if spec.gated else "1", quantised or {}
    w1, w2 = tensors[f"experts.w{first}"], tensors["experts.w2"]
    experts = len(w2) if expert_map is None else len(expert_map)
    ids = ids.contiguous()
    expert_map = None if expert_map is None else expert_map.contiguous()
    aligned = align(ids, experts, config.block_m, expert_map) if config.aligned else None
    dispatched = Dispatched(ids, experts, config.block_m, aligned, expert_map)
    hidden = gate_up(
        x,
        w1,
        spec,
        dispatched,
        config.gate_up,
        bias=tensors.get(f"experts.b{first}"),
        weights=weights,
        quantised=quantised.get(f"w{first}"),
        interleaved=interleaved,
    )  # [T K, F]
    outputs = down(
        hidden, w2, dispatched, config.down, bias=tensors.get("experts.b2"), quantised=quantised.get("w2")
    )  # [T K, D]
    if spec.output_norm:
        outputs = normalised_output(outputs, tensors["experts.output_norm"], spec.output_norm)
    return combine(
        outputs,
        ids,
        weights,
        x,
        experts,
        weighted=spec.weight_on == "output",
        output_scale=output_scale,
        identity_experts=identity_experts,
        added=added,
        expert_map=expert_map,
    )


def _routed_experts(
    x: Tensor,
    names: list[str],
    experts: list[Tensor],
    ids: Tensor,
    weights: Tensor,
    added: Tensor | None,
    expert_map: Tensor | None,
    scales: list[Tensor],
    tiles: list[int],
    stacked: list[bool],
    identity_experts: int,
    output_scale: float,
    interleaved: bool,
    **values: Any,
) -> Tensor:
    spec, tensors = MLPSpec(**values), dict(zip(names, experts, strict=True))
    w2 = tensors["experts.w2"]
    count = len(w2) if expert_map is None else len(expert_map)
    config = choose(problem_of(x, spec, w2, ids.shape[1], count), x.device)
    quantised = {
        name: Quantised(scale, (rows, columns), ends_at_seam)
        for name, scale, rows, columns, ends_at_seam in zip(
            parts(spec), scales, tiles[::2], tiles[1::2], stacked, strict=bool(scales)
        )
    }
    return compute(
        x,
        spec,
        tensors,
        ids,
        weights,
        config,
        identity_experts=identity_experts,
        output_scale=output_scale,
        added=added,
        expert_map=expert_map,
        quantised=quantised,
        interleaved=interleaved,
    )


def _fake(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape)


_operator = operator(
    "routed_experts_triton(Tensor x, str[] names, Tensor[] experts, Tensor ids, Tensor weights, Tensor? added, "
    "Tensor? expert_map, Tensor[] scales, int[] tiles, bool[] stacked, int identity_experts, float output_scale, "
    "bool interleaved, "
    f"{arguments(MLPSpec)}) -> Tensor",
    _routed_experts,
    _fake,
)


def routed_experts(
    x: Tensor,
    spec: MLPSpec,
    tensors: Mapping[str, Tensor],
    ids: Tensor,
    weights: Tensor,
    *,
    identity_experts: int = 0,
    output_scale: float = 1.0,
    added: Tensor | None = None,
    expert_map: Tensor | None = None,
    quantised: Mapping[str, Quantised] | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Sum over each token's experts of weight times expert output, times output_scale, plus added.

    x: [T, D] float32, float16 or bfloat16. tensors: as `spec.tensors("experts", D, (E,))` names and shapes them, in
    x's dtype, or wider: D' >= D for a padded hidden dim, F' >= F for a padded intermediate one. What is summed over in
    the padding of F must be zero; nothing in that of D is read. With expert_map, of this rank's experts alone.
    ids: [T, K] int32 or int64; those from E on are identity experts, which pass x on; any other id that names no
    expert, or one of another rank, adds nothing whatever its weight is. weights: [T, K] float32.
    added: [T, D], what is always on. expert_map: [E] int32, local id of each expert, -1 for those of other ranks.
    quantised: "w13" or "w1", and "w2": scales of float8_e4m3fn weights. interleaved: rows of w13 and b13 alternate gate
    and up.
    returns [T, D] in x's dtype, rounded once. Sums are float32. Raises InputError for shapes and dtypes.
    """
    names = list(spec.tensors("experts", *x.shape[1:]))
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(f"tensors: got no {', '.join(missing)}, want {', '.join(names)}; the spec needs them")
    shapes = {tuple(ids.shape), tuple(weights.shape), (len(x), ids.shape[-1])}
    if ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64) or len(shapes) > 1:
        got = f"{ids.dtype} {list(ids.shape)}, weights {list(weights.shape)}"
        raise InputError(f"ids: got {got}, want int32 or int64 [{len(x)}, K] and weights of that shape")
    first = tensors["experts.w13" if spec.gated else "experts.w1"]
    if len(first) != len(tensors["experts.w2"]):
        raise InputError(f"tensors: got {len(first)} and {len(tensors['experts.w2'])} experts, want as many in both")
    if expert_map is not None and (expert_map.ndim != 1 or expert_map.dtype != torch.int32):
        raise InputError(f"expert_map: got {expert_map.dtype} {list(expert_map.shape)}, want int32 [E]")
    stored = [quantised[part] for part in parts(spec)] if quantised else []
    output: Tensor = _operator(
        x,
        names,
        [tensors[name] for name in names],
        ids,
        weights,
        added,
        expert_map,
        [own.scale for own in stored],
        [side for own in stored for side in own.tile],
        [own.stacked for own in stored],
        identity_experts,
        output_scale,
        interleaved,
        **keywords(spec),
    )
    return output


def experts(inputs: ExpertsInputs) -> Tensor:
    """The routed sum [T, D] in x's dtype; see ExpertsInputs for shapes. An id that names no expert adds nothing.

    Raises Unsupported for adapters, and for stored forms that `quantised_of` does not read.
    """
    if inputs.lora is not None:
        raise Unsupported("experts: got lora, want None: the kernels add no adapters")
    mlp, quantised = inputs.mlp, None
    if inputs.quant is not None:
        quantised = quantised_of(inputs.quant, mlp, inputs.tensors)
    return routed_experts(
        inputs.x,
        mlp,
        inputs.tensors,
        inputs.ids,
        inputs.weights,
        identity_experts=inputs.identity_experts,
        expert_map=inputs.expert_map,
        output_scale=inputs.output_scale,
        quantised=quantised,
    )
