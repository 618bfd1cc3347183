"""LoRA on experts: each expert has its own pair of thin matrices beside each projection, each token its own adapter.

y = W x + scaling * B (A x), or (W + scaling * B A) x where the update is merged. LoRA, https://arxiv.org/abs/2106.09685.
Tensors as `LoraSpec.tensors` names them: lora.w13.a [A, E, r, D], which gate and up share; lora.w13.b [A, E, 2F, r].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_conformance.engine import Lora, LoraSpec, MLPSpec
from moe_conformance.errors import InputError
from moe_conformance.reference_impl.parallel.expert_map import even_split

if TYPE_CHECKING:
    from moe_conformance.reference_impl.experts import Project

Tensors = Mapping[str, Tensor]


def scaling(spec: LoraSpec) -> float:
    """What the update is multiplied by."""
    return spec.alpha / (math.sqrt(spec.rank) if spec.rslora else spec.rank)


def with_adapters(base: Project, lora: Lora) -> Project:
    """`base` plus each token's adapter update; the adapter sees the rows before `base` quantises them.

    A token without an adapter has the bits of `base`. Raises InputError for tensors that do not fit the spec, and for
    an adapter that does not exist.
    """
    spec, tensors, adapters = lora.spec, lora.tensors, lora.adapters
    for name, tensor in tensors.items():
        side = 2 if name.endswith(".a") else 3
        if tensor.ndim != 4 or len(tensor) != spec.adapters or tensor.shape[side] != spec.rank:
            raise InputError(
                f"{name}: got {list(tensor.shape)}, want {spec.adapters} adapters of rank {spec.rank}; "
                "LoraSpec.tensors says the shapes"
            )
    known = (adapters >= -1) & (adapters < spec.adapters)
    if not known.all():
        raise InputError(f"lora.adapters: got {adapters[~known].tolist()}, want -1 or 0 to {spec.adapters - 1}")

    def project(name: str, expert: int, token: Tensor, rows: Tensor) -> Tensor:
        output, adapter = base(name, expert, token, rows), adapters[token]
        for index in adapter[adapter >= 0].unique().tolist():
            own = (adapter == index).nonzero().flatten()
            update = scaling(spec) * low_rank(
                rows[own], tensors[f"lora.{name}.a"][index, expert], tensors[f"lora.{name}.b"][index, expert]
            )
            output[own] = (output[own] + update).to(output.dtype)
        return output

    return project


def low_rank(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """B (A x) of rows [n, in], in float32 or wider: [n, out]."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return F.linear(F.linear(rows.to(wide), a.to(wide)), b.to(wide))


def merged(spec: MLPSpec, tensors: Tensors, lora: Lora, adapter: int) -> dict[str, Tensor]:
    """The experts' tensors with one adapter in their weights, new where they have an update."""
    found = dict(tensors)
    for matrix in ("w13" if spec.gated else "w1", "w2"):
        a, b = (lora.tensors[f"lora.{matrix}.{side}"][adapter] for side in ("a", "b"))
        found[f"experts.{matrix}"] = tensors[f"experts.{matrix}"] + scaling(lora.spec) * (b @ a)  # [E, out, in]
    return found


def side_by_side(gate: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Updates (a [.., r, D], b [.., F, r]) of gate and up as one of the fused w13, whose rank is the sum of theirs.

    The fused update has its own scaling: give LoraSpec an alpha that keeps theirs.
    """
    (gate_a, gate_b), (up_a, up_b) = gate, up
    above = F.pad(gate_b, (0, up_b.shape[-1]))  # gate's rows do not see up's ranks
    below = F.pad(up_b, (gate_b.shape[-1], 0))
    return torch.cat([gate_a, up_a], dim=-2), torch.cat([above, below], dim=-2)


def from_peft(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """a [E, r, in] and b [E, out, r] of what PEFT keeps for a fused weight (LoraConfig.target_parameters).

    a: [E r, in], the ranks of an expert side by side. b: [out, r E], the experts of a rank side by side.
    Source: ParamWrapper of PEFT 0.21, for parameters whose last dim is the input. Raises InputError for other shapes.
    """
    if a.ndim != 2 or b.ndim != 2 or len(a) % experts or b.shape[1] != len(a):
        raise InputError(
            f"from_peft: got a {list(a.shape)}, b {list(b.shape)}, want [{experts} r, in], [out, r {experts}]"
        )
    return a.reshape(experts, -1, a.shape[1]), b.reshape(len(b), -1, experts).permute(2, 0, 1)


def tensor_parallel(spec: MLPSpec, lora: Lora, rank: int, ranks: int) -> Lora:
    """The share of a rank that holds a slice of the width F, as `slice_width` divides it.

    w13 keeps all of a, and its gate and up rows of b. w2 keeps its slice of a and all of b, so that partial outputs,
    including those of the update, add up over ranks.
    """
    widths = even_split(spec.width, ranks)
    start, width = sum(widths[:rank]), widths[rank]
    first, blocks = ("w13", 2) if spec.gated else ("w1", 1)
    rows: Tensor = lora.tensors[f"lora.{first}.b"].unflatten(2, (blocks, spec.width))  # [A, E, 2, F, r]
    own = {
        f"lora.{first}.b": rows.narrow(3, start, width).flatten(2, 3),
        "lora.w2.a": lora.tensors["lora.w2.a"].narrow(3, start, width),
    }
    return replace(lora, tensors={**lora.tensors, **own})


def expert_parallel(lora: Lora, held: Tensor) -> Lora:
    """The share of a rank that holds these experts: held [n] int64, global ids in local order."""
    return replace(lora, tensors={name: tensor[:, held] for name, tensor in lora.tensors.items()})
