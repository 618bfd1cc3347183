"""How the parameters of transformers' MoE blocks are made from the canonical tensors of `LayerSpec.tensors`.

Names are relative to the block. Every module orders rows, stacks experts or transposes in its own way. Which way is
listed here by name and class, never guessed from shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import RECORDS

Tensors = Mapping[str, Tensor]
# A canonical tensor, or a half of it, or a parameter, and the block, which is a module of any family.
Form = Callable[[Tensor, Any], Tensor]


def _as_it_is(tensor: Tensor, block: Any) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Source:
    """The canonical tensor behind one parameter, and its layout.

    name: the canonical tensor. half: its gate rows (0) or its up rows (1), None for all. forth: from that to the
    parameter; back: from the parameter to that.
    """

    name: str
    forth: Form = _as_it_is
    back: Form = _as_it_is
    half: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the parameter is the canonical tensor as it is."""
        return self.half is None and self.forth is _as_it_is

    @property
    def dim(self) -> int:
        """Of the rows that the halves are of."""
        return 1 if self.name.startswith("experts.") else 0

    def __call__(self, tensors: Tensors, block: Any) -> Tensor:
        tensor = tensors[self.name]
        if self.is_whole:
            return tensor
        if self.half is not None:
            tensor = tensor.chunk(2, self.dim)[self.half]
        return self.forth(tensor, block).contiguous()


def turned(tensor: Tensor, block: Any) -> Tensor:
    return tensor.mT


def interleaved(tensor: Tensor, block: Any) -> Tensor:
    """Rows, or a bias, as gate, up, gate, up: gpt-oss alone."""
    return torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)


def apart(tensor: Tensor, block: Any) -> Tensor:
    return torch.cat((tensor[:, 0::2], tensor[:, 1::2]), dim=1)


def below(tensor: Tensor, block: Any) -> Tensor:
    """dbrx: the experts below each other, [E F, H]."""
    found: Tensor = tensor.flatten(0, 1)
    return found


def by_expert(tensor: Tensor, block: Any) -> Tensor:
    found: Tensor = tensor.unflatten(0, (block.router.layer.weight.shape[0], -1))
    return found


def with_identity_rows(tensor: Tensor, block: Any) -> Tensor:
    """longcat_flash has rows for its identity experts, too; they must never be read."""
    return torch.cat((tensor, tensor.new_full((block.experts.zero_expert_num, *tensor.shape[1:]), float("nan"))))


def side_by_side(tensor: Tensor, block: Any) -> Tensor:
    """inkling: each shared expert's gate or up rows, [n, F, H]."""
    found: Tensor = tensor.unflatten(0, (block.shared_experts.n_shared_experts, -1))
    return found


def side_by_side_columns(tensor: Tensor, block: Any) -> Tensor:
    found: Tensor = tensor.unflatten(1, (block.shared_experts.n_shared_experts, -1)).transpose(0, 1)
    return found  # [H, n, F] -> [n, H, F]


def whole(name: str) -> Source:
    return Source(name)


def half(name: str, which: int) -> Source:
    return Source(name, half=which)


def transposed(name: str) -> Source:
    return Source(name, turned, turned)


def squeezed(name: str, dim: int) -> Source:
    return Source(name, lambda tensor, _: tensor.squeeze(dim), lambda tensor, _: tensor.unsqueeze(dim))


PROJECTIONS = (
    "gate.weight",
    "gate.wg.weight",
    "gate.router_mlp.out_proj.weight",
    "router.weight",
    "router.gate.weight",
    "router.layer.weight",
    "router.classifier.weight",
    "router.proj.weight",
    "router_gate.weight",
)
SELECTION_BIASES = (
    "e_score_correction_bias",
    "expert_bias",
    "gate.e_score_correction_bias",
    "gate.balancing_biases",
    "router.e_score_correction_bias",
)
SHARED = ("shared_experts", "shared_expert", "shared_mlp")

SOURCES: dict[str, Source] = {
    **dict.fromkeys(PROJECTIONS, whole("router.proj")),
    **dict.fromkeys(SELECTION_BIASES, whole("router.selection_bias")),
    "gate.moe_statics.e_score_correction_bias": Source(
        "router.selection_bias", lambda bias, _: bias[None], lambda rows, _: rows[0]
    ),
    "router.bias": whole("router.bias"),
    "router.classifier.bias": whole("router.bias"),
    "router.scale": whole("router.scale"),
    "router.per_expert_scale": whole("router.per_expert_scale"),
    "gate.global_scale": whole("router.global_scale"),
    "gate.tid2eid": whole("router.table"),
    # zaya
    "gate.down_proj.weight": whole("router.down.weight"),
    "gate.down_proj.bias": whole("router.down.bias"),
    "gate.router_states_scale": whole("router.state_scale"),
    "gate.router_mlp.norm.weight": whole("router.norm"),
    **{
        f"gate.router_mlp.{fc}.{kind}": whole(f"router.{fc}.{kind}")
        for fc in ("fc1", "fc2")
        for kind in ("weight", "bias")
    },
    # routed experts
    "experts.gate_up_proj": whole("experts.w13"),
    "experts.gate_up_proj_bias": whole("experts.b13"),
    "experts.up_proj": whole("experts.w1"),
    "experts.down_proj": whole("experts.w2"),
    "experts.down_proj_bias": whole("experts.b2"),
    "experts.post_expert_norm.weight": whole("experts.output_norm"),
    "experts.mlp.w1": Source("experts.w13", below, by_expert, 0),
    "experts.mlp.v1": Source("experts.w13", below, by_expert, 1),
    "experts.mlp.w2": Source(
        "experts.w2", lambda w2, _: below(w2.mT, _), lambda rows, block: by_expert(rows, block).mT
    ),
    "input_linear.weight": whole("experts.w13"),
    "output_linear.weight": whole("experts.w2"),
    "down_embed.weight": squeezed("experts.w1", 1),
    "up_embed.weight": squeezed("experts.w2", 2),
    # shared experts
    **{f"{name}.gate_proj.weight": half("shared.w13", 0) for name in SHARED},
    **{f"{name}.up_proj.weight": half("shared.w13", 1) for name in SHARED},
    **{f"{name}.down_proj.weight": whole("shared.w2") for name in SHARED},
    **{f"{name}.gate_proj.bias": half("shared.b13", 0) for name in SHARED},
    **{f"{name}.up_proj.bias": half("shared.b13", 1) for name in SHARED},
    **{f"{name}.down_proj.bias": whole("shared.b2") for name in SHARED},
    "shared_experts.gate_up_proj.weight": whole("shared.w13"),
    "shared_mlp.input_linear.weight": whole("shared.w13"),
    "shared_mlp.output_linear.weight": whole("shared.w2"),
    "shared_expert_gate.weight": whole("shared.gate"),
    "shared_experts.gate_proj": Source("shared.w13", side_by_side, lambda rows, _: rows.flatten(0, 1), 0),
    "shared_experts.up_proj": Source("shared.w13", side_by_side, lambda rows, _: rows.flatten(0, 1), 1),
    "shared_experts.down_proj": Source(
        "shared.w2", side_by_side_columns, lambda columns, _: columns.transpose(0, 1).flatten(1, 2)
    ),
    # latent width
    "fc1_latent_proj.bias": whole("latent.in_bias"),
    "fc2_latent_proj.bias": whole("latent.out_bias"),
    "fc1_latent_proj.weight": whole("latent.in"),
    "fc2_latent_proj.weight": whole("latent.out"),
    "pre_expert_proj.weight": whole("latent.in"),
    "pre_expert_norm.weight": whole("latent.norm"),
    "post_expert_proj.weight": whole("latent.out"),
    # a dense MLP beside the experts, and the end of the block
    **{f"{prefix}gate_proj.weight": half("dense.w13", 0) for prefix in ("mlp.", "")},
    **{f"{prefix}up_proj.weight": half("dense.w13", 1) for prefix in ("mlp.", "")},
    **{f"{prefix}down_proj.weight": whole("dense.w2") for prefix in ("mlp.", "")},
    "gate_proj.bias": half("dense.b13", 0),
    "up_proj.bias": half("dense.b13", 1),
    "down_proj.bias": whole("dense.b2"),
    "pre_feedforward_layernorm.weight": whole("dense.norm"),
    "post_feedforward_layernorm_1.weight": whole("dense.sum_norm"),
    "pre_feedforward_layernorm_2.weight": whole("experts.norm"),
    "post_feedforward_layernorm_2.weight": whole("experts.sum_norm"),
    "post_mlp_layernorm.weight": whole("output.norm"),
    "bias": whole("output.bias"),
}

COLUMNS: dict[str, Source] = {
    "experts.gate_up_proj": transposed("experts.w13"),
    "experts.down_proj": transposed("experts.w2"),
}
# By class of `experts`: the layouts that differ.
OWN_LAYOUTS: dict[str, dict[str, Source]] = {
    "AriaExperts": COLUMNS,
    "Llama4TextExperts": COLUMNS,
    "OpenAIPrivacyFilterExperts": COLUMNS,
    "GptOssExperts": COLUMNS
    | {
        "experts.gate_up_proj": Source(
            "experts.w13", lambda w13, _: interleaved(w13, _).mT, lambda columns, _: apart(columns.mT, _)
        ),
        "experts.gate_up_proj_bias": Source("experts.b13", interleaved, apart),
    },
    "LongcatFlashExperts": {
        "experts.gate_up_proj": Source(
            "experts.w13", with_identity_rows, lambda rows, block: rows[: len(block.experts.down_proj)]
        )
    },
}
# If shared experts have no gate.
UNGATED: dict[str, Source] = {
    f"{name}.up_proj.{kind}": whole(f"shared.{to}1") for name in SHARED for kind, to in (("weight", "w"), ("bias", "b"))
}
# Experts that are modules of their own: what follows "experts.expert_N." -> canonical name, whose row N it is.
SEPARATE = {
    "fc1.weight": "experts.w1",
    "fc1.bias": "experts.b1",
    "fc2.weight": "experts.w2",
    "fc2.bias": "experts.b2",
    "wi.weight": "experts.w1",
    "wo.weight": "experts.w2",
}
# Families whose block is nested in a module that also holds the shared experts: these prefixes are stripped from names.
PREFIXES = ("block_sparse_moe.", "text_moe.")

# Every family whose blocks a config describes.
MODEL_TYPES = frozenset(name for name, record in RECORDS.items() if record.block is not None)
