"""How the parameters of transformers' MoE blocks are made of the canonical tensors of `LayerSpec.tensors`.

Names are relative to the block. Every module orders rows, stacks experts or transposes in its own way; which way is
said here by name and class, never read off shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import RECORDS

Tensors = Mapping[str, Tensor]
# Canonical tensors and the block, a module of any family -> the value of one parameter.
Source = Callable[[Tensors, Any], Tensor]


@dataclass(frozen=True)
class Whole:
    """The canonical tensor of this name as it is."""

    name: str

    def __call__(self, tensors: Tensors, block: Any) -> Tensor:
        return tensors[self.name]


def transposed(name: str) -> Source:
    return lambda tensors, block: tensors[name].transpose(1, 2).contiguous()


def half(name: str, which: int) -> Source:
    """The gate rows (0) or the up rows (1) of a w13."""
    return lambda tensors, block: tensors[name].chunk(2)[which].contiguous()


def interleaved(name: str) -> Source:
    """Rows, or a bias, as gate, up, gate, up: gpt-oss alone."""
    return lambda tensors, block: torch.stack(tensors[name].chunk(2, dim=1), dim=2).flatten(1, 2)


def interleaved_columns(name: str) -> Source:
    return lambda tensors, block: interleaved(name)(tensors, block).transpose(1, 2).contiguous()


def row(name: str) -> Source:
    return lambda tensors, block: tensors[name].unsqueeze(0)


def stacked_half(which: int) -> Source:
    """dbrx: the experts' gate (0) or up (1) rows below each other, [E F, H]."""
    return lambda tensors, block: (
        tensors["experts.w13"].chunk(2, dim=1)[which].reshape(-1, tensors["experts.w2"].shape[1])
    )


def stacked_down(tensors: Tensors, block: Any) -> Tensor:
    return tensors["experts.w2"].transpose(1, 2).flatten(0, 1)


def with_identity_rows(tensors: Tensors, block: Any) -> Tensor:
    """longcat_flash has rows for its identity experts too, which nothing may read."""
    w13 = tensors["experts.w13"]
    unread = w13.new_full((block.experts.zero_expert_num, *w13.shape[1:]), float("nan"))
    return torch.cat((w13, unread))


def side_by_side_half(which: int) -> Source:
    """inkling: each shared expert's gate or up rows, [n, F, H]."""

    def source(tensors: Tensors, block: Any) -> Tensor:
        rows = tensors["shared.w13"].chunk(2)[which]
        return rows.reshape(block.shared_experts.n_shared_experts, -1, rows.shape[1])

    return source


def side_by_side_down(tensors: Tensors, block: Any) -> Tensor:
    down = tensors["shared.w2"]
    columns = down.reshape(down.shape[0], block.shared_experts.n_shared_experts, -1)  # [H, n, F]
    return columns.transpose(0, 1).contiguous()


def shared_up(kind: str) -> Source:
    """nemotron_h's shared expert has no gate."""

    def source(tensors: Tensors, block: Any) -> Tensor:
        alone = f"shared.{kind}1"
        return tensors[alone] if alone in tensors else half(f"shared.{kind}13", 1)(tensors, block)

    return source


def squeezed(name: str, dim: int) -> Source:
    return lambda tensors, block: tensors[name].squeeze(dim)


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
    **dict.fromkeys(PROJECTIONS, Whole("router.proj")),
    **dict.fromkeys(SELECTION_BIASES, Whole("router.selection_bias")),
    "gate.moe_statics.e_score_correction_bias": row("router.selection_bias"),
    "router.bias": Whole("router.bias"),
    "router.classifier.bias": Whole("router.bias"),
    "router.scale": Whole("router.scale"),
    "router.per_expert_scale": Whole("router.per_expert_scale"),
    "gate.global_scale": Whole("router.global_scale"),
    "gate.tid2eid": Whole("router.table"),
    # zaya
    "gate.down_proj.weight": Whole("router.down.weight"),
    "gate.down_proj.bias": Whole("router.down.bias"),
    "gate.router_states_scale": Whole("router.state_scale"),
    "gate.router_mlp.norm.weight": Whole("router.norm"),
    **{
        f"gate.router_mlp.{fc}.{kind}": Whole(f"router.{fc}.{kind}")
        for fc in ("fc1", "fc2")
        for kind in ("weight", "bias")
    },
    # routed experts
    "experts.gate_up_proj": Whole("experts.w13"),
    "experts.gate_up_proj_bias": Whole("experts.b13"),
    "experts.up_proj": Whole("experts.w1"),
    "experts.down_proj": Whole("experts.w2"),
    "experts.down_proj_bias": Whole("experts.b2"),
    "experts.post_expert_norm.weight": Whole("experts.output_norm"),
    "experts.mlp.w1": stacked_half(0),
    "experts.mlp.v1": stacked_half(1),
    "experts.mlp.w2": stacked_down,
    "input_linear.weight": Whole("experts.w13"),
    "output_linear.weight": Whole("experts.w2"),
    "down_embed.weight": squeezed("experts.w1", 1),
    "up_embed.weight": squeezed("experts.w2", 2),
    # shared experts
    **{f"{name}.gate_proj.weight": half("shared.w13", 0) for name in SHARED},
    **{f"{name}.up_proj.weight": shared_up("w") for name in SHARED},
    **{f"{name}.down_proj.weight": Whole("shared.w2") for name in SHARED},
    **{f"{name}.gate_proj.bias": half("shared.b13", 0) for name in SHARED},
    **{f"{name}.up_proj.bias": shared_up("b") for name in SHARED},
    **{f"{name}.down_proj.bias": Whole("shared.b2") for name in SHARED},
    "shared_experts.gate_up_proj.weight": Whole("shared.w13"),
    "shared_mlp.input_linear.weight": Whole("shared.w13"),
    "shared_mlp.output_linear.weight": Whole("shared.w2"),
    "shared_expert_gate.weight": Whole("shared.gate"),
    "shared_experts.gate_proj": side_by_side_half(0),
    "shared_experts.up_proj": side_by_side_half(1),
    "shared_experts.down_proj": side_by_side_down,
    # latent width
    "fc1_latent_proj.bias": Whole("latent.in_bias"),
    "fc2_latent_proj.bias": Whole("latent.out_bias"),
    "fc1_latent_proj.weight": Whole("latent.in"),
    "fc2_latent_proj.weight": Whole("latent.out"),
    "pre_expert_proj.weight": Whole("latent.in"),
    "pre_expert_norm.weight": Whole("latent.norm"),
    "post_expert_proj.weight": Whole("latent.out"),
    # a dense MLP beside the experts, and the end of the block
    **{f"{prefix}gate_proj.weight": half("dense.w13", 0) for prefix in ("mlp.", "")},
    **{f"{prefix}up_proj.weight": half("dense.w13", 1) for prefix in ("mlp.", "")},
    **{f"{prefix}down_proj.weight": Whole("dense.w2") for prefix in ("mlp.", "")},
    "gate_proj.bias": half("dense.b13", 0),
    "up_proj.bias": half("dense.b13", 1),
    "down_proj.bias": Whole("dense.b2"),
    "pre_feedforward_layernorm.weight": Whole("dense.norm"),
    "post_feedforward_layernorm_1.weight": Whole("dense.sum_norm"),
    "pre_feedforward_layernorm_2.weight": Whole("experts.norm"),
    "post_feedforward_layernorm_2.weight": Whole("experts.sum_norm"),
    "post_mlp_layernorm.weight": Whole("output.norm"),
    "bias": Whole("output.bias"),
}

COLUMNS: dict[str, Source] = {
    "experts.gate_up_proj": transposed("experts.w13"),
    "experts.down_proj": transposed("experts.w2"),
}
# By class of `experts`: what is laid out otherwise.
OWN_LAYOUTS: dict[str, dict[str, Source]] = {
    "AriaExperts": COLUMNS,
    "Llama4TextExperts": COLUMNS,
    "OpenAIPrivacyFilterExperts": COLUMNS,
    "GptOssExperts": COLUMNS
    | {
        "experts.gate_up_proj": interleaved_columns("experts.w13"),
        "experts.gate_up_proj_bias": interleaved("experts.b13"),
    },
    "LongcatFlashExperts": {"experts.gate_up_proj": with_identity_rows},
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
# Families whose block is nested in what also holds the shared experts: names without these prefixes.
PREFIXES = ("block_sparse_moe.", "text_moe.")

# Every family whose blocks a config describes.
MODEL_TYPES = frozenset(name for name, record in RECORDS.items() if record.block is not None)
