"""Stages in plain torch, as short as possible: `new-engine` copies their text into a new adapter.

Each passes the smoke tier with the features that OFFERED declares for it, and is meant to be replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_conformance.engine import (
    Aligned,
    AlignInputs,
    CaptureSession,
    CaptureSpec,
    Engine,
    ExpertMapSpec,
    ExpertsInputs,
    LayerInputs,
    RouteInputs,
    Routing,
    Rows,
)

if TYPE_CHECKING:
    from torch import Tensor

OFFERED = {
    "route": ("not_renormalized", "renormalize", "softmax"),
    "align": ("dropped_ids", "expert_map"),
    "experts": ("dropped_ids", "output_scale"),
    "layer": ("output_scale", "padded_hidden", "renormalize", "same_bits", "shared", "softmax"),
    "capture_session": ("local",),
    "expert_map": ("contiguous", "round_robin"),
}


class Recorder:
    """What a capturer of the engine would keep: the ids of one step."""

    def __init__(self, spec: CaptureSpec) -> None:
        import torch

        self.spec = spec
        # Zero is an expert, and so nothing that may stand where nothing was written.
        self.ids = torch.full((spec.max_tokens, spec.layers, spec.top_k), -1, dtype=torch.int32)
        self.was_read = False

    def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
        own = rows.counts[self.spec.dp_rank]
        if not 0 <= layer_id < self.spec.layers or len(ids) != own:
            raise ValueError(f"got layer {layer_id} and {len(ids)} rows, want {self.spec.layers} layers and {own} rows")
        if self.was_read:  # the first layer of the next step
            self.ids.fill_(-1)
        self.was_read = False
        self.ids[:own, layer_id] = ids

    def read(self, num_tokens: int) -> Tensor:
        self.was_read = True
        return self.ids[:num_tokens].clone()

    def close(self) -> None:
        pass


class Starter(Engine):
    """The stages, by their names."""

    def route(self, inputs: RouteInputs) -> Routing:
        import torch

        # Your router instead of what follows.
        spec = inputs.routing
        weights, ids = inputs.logits.softmax(-1, dtype=torch.float32).topk(spec.top_k)
        if spec.renormalize == "sum":
            weights = weights / (weights.sum(-1, keepdim=True) + spec.epsilon).clamp(min=spec.floor)
        return Routing(ids, weights)

    def align(self, inputs: AlignInputs) -> Aligned:
        import torch

        # Your sort instead of what follows.
        ids, block = inputs.ids.flatten().tolist(), inputs.block
        local = list(range(inputs.experts)) if inputs.expert_map is None else inputs.expert_map.tolist()
        slots: list[int] = []
        blocks: list[int] = []
        for expert in range(max(local) + 1):
            pairs = [pair for pair, chosen in enumerate(ids) if chosen >= 0 and local[chosen] == expert]
            padding = [len(ids)] * (-len(pairs) % block)
            slots += pairs + padding
            blocks += [expert] * (len(pairs + padding) // block)
        made = [torch.tensor(numbers, dtype=torch.int32) for numbers in (slots, blocks, [len(slots)])]
        return Aligned(*made)

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        import torch
        from torch.nn import functional as F

        # Your kernel instead of what follows.
        x, w13, w2 = inputs.x, inputs.tensors["experts.w13"], inputs.tensors["experts.w2"]
        routed = torch.zeros_like(x, dtype=torch.float32)
        for token in range(len(x)):
            for expert, weight in zip(inputs.ids[token].tolist(), inputs.weights[token], strict=True):
                if expert >= 0:
                    gate, up = (w13[expert] @ x[token]).chunk(2)
                    routed[token] += weight * (w2[expert] @ (F.silu(gate) * up))
        return (routed * inputs.output_scale).to(x.dtype)

    def layer(self, inputs: LayerInputs) -> Tensor:
        import torch
        from torch.nn import functional as F

        x, spec, tensors = inputs.x, inputs.spec, inputs.tensors
        weights, ids = inputs.logits.softmax(-1, dtype=torch.float32).topk(spec.routing.top_k)
        weights = weights / weights.sum(-1, keepdim=True)

        # From here on, call your kernel instead.
        width = x.shape[-1]
        extra = (inputs.padded_hidden or width) - width
        w13, w2 = F.pad(tensors["experts.w13"], (0, extra)), F.pad(tensors["experts.w2"], (0, 0, 0, extra))
        wide = F.pad(x, (0, extra))
        routed = torch.zeros_like(wide, dtype=torch.float32)
        for token in range(len(x)):
            for expert, weight in zip(ids[token], weights[token], strict=True):
                gate, up = (w13[expert] @ wide[token]).chunk(2)
                routed[token] += weight * (w2[expert] @ (F.silu(gate) * up))
        routed = routed[..., :width].to(x.dtype) * spec.output_scale

        if spec.shared is None:
            return routed
        gate, up = F.linear(x, tensors["shared.w13"]).chunk(2, dim=-1)
        return routed + F.linear(F.silu(gate) * up, tensors["shared.w2"])

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        # Your capturer instead of Recorder.
        return Recorder(spec)

    def expert_map(self, spec: ExpertMapSpec) -> Tensor:
        import torch

        # Your rule instead of what follows.
        experts, ranks = torch.arange(spec.experts), spec.ranks
        owner = experts % ranks if spec.placement == "round_robin" else experts * ranks // spec.experts
        mine = owner == spec.rank
        return torch.where(mine, mine.cumsum(0) - 1, -1)
