"""The layers that are timed: sizes and methods of public models, and their weights made on the spot.

Sizes and methods: each model's config.json and modelling code. Shared experts, dense MLPs and the norms around them are
left out: they are plain products of all tokens, in which no kernel of this package takes part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_conformance.kernels.float8 import Quantised
from moe_conformance.model.specs import LayerSpec, LogitsSpec, MLPSpec, RoutingSpec
from moe_conformance.reference_impl.quantised.tiles import BLOCK_128, scale_shape, spread

TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)


@dataclass(frozen=True)
class Model:
    """One MoE layer. layers: MoE layers in the model, for the capture buffer. padded: hidden width of the weights.

    fp8: weights are float8_e4m3fn with a float32 scale for each 128 x 128. interleaved: rows of w13 and b13 are gate
    and up in turn, as the checkpoint has them.
    """

    name: str
    title: str
    hidden: int
    experts: int
    layers: int
    mlp: MLPSpec
    routing: RoutingSpec
    padded: int = 0
    fp8: bool = False
    interleaved: bool = False

    @property
    def top_k(self) -> int:
        return self.routing.top_k

    @property
    def width(self) -> int:
        return self.mlp.width

    @property
    def columns(self) -> int:
        """The hidden width at which weights lie in memory."""
        return self.padded or self.hidden

    @property
    def halves(self) -> int:
        """Matrices in the first projection: gate and up, or one."""
        return 2 if self.mlp.gated else 1

    @property
    def first(self) -> str:
        return "experts.w13" if self.mlp.gated else "experts.w1"

    @property
    def dtype(self) -> str:
        return "bf16, fp8 weights" if self.fp8 else "bf16"

    @property
    def weight_size(self) -> float:
        """Bytes of one weight, its share of a scale included."""
        return 1 + 4 / (BLOCK_128[0] * BLOCK_128[1]) if self.fp8 else 2

    @property
    def weight_bytes(self) -> float:
        return self.experts * (self.halves + 1) * self.width * self.columns * self.weight_size

    @property
    def layer(self) -> LayerSpec:
        logits = LogitsSpec(bias=self.mlp.bias, dtype="float32" if self.routing.score == "sigmoid" else "input")
        return LayerSpec(self.hidden, self.experts, logits, self.routing, self.mlp)


_SOFTMAX = RoutingSpec(8, renormalize="sum")
_NEMOTRON = Model(
    "nemotron",
    "Nemotron-3-Nano",
    hidden=2688,
    experts=128,
    layers=23,
    mlp=MLPSpec(1856, "relu2", gated=False),
    routing=RoutingSpec(6, score="sigmoid", selection_bias=True, renormalize="sum", epsilon=1e-20, scale=2.5),
)
_DEEPSEEK = Model(
    "deepseek",
    "DeepSeek-V3",
    hidden=7168,
    experts=256,
    layers=58,
    mlp=MLPSpec(2048),
    routing=RoutingSpec(
        8,
        score="sigmoid",
        selection_bias=True,
        groups=8,
        top_groups=4,
        group_score="top2_sum",
        renormalize="sum",
        epsilon=1e-20,
        scale=2.5,
    ),
)

# The most important first: a run that is short of time ends somewhere in this list.
MODELS = (
    Model("gemma4", "Gemma 4 26B-A4B", 2816, 128, 30, MLPSpec(704, "gelu_tanh"),
          replace(_SOFTMAX, per_expert_scale=True)),
    Model("qwen3", "Qwen3-30B-A3B", 2048, 128, 48, MLPSpec(768), _SOFTMAX),
    replace(_DEEPSEEK, name="deepseek-fp8", title="DeepSeek-V3 fp8", fp8=True),
    _NEMOTRON,
    replace(_NEMOTRON, name="nemotron-padded", title="Nemotron-3-Nano padded", padded=2816),
    Model("gpt-oss", "gpt-oss-120b", 2880, 128, 36,
          MLPSpec(2880, clamp="before", limit=7.0, alpha=1.702, up_offset=1.0, bias=True),
          RoutingSpec(4, select_on="logits"), interleaved=True),
    Model("mixtral", "Mixtral 8x7B", 4096, 8, 32, MLPSpec(14336), replace(_SOFTMAX, top_k=2)),
    _DEEPSEEK,
)  # fmt: skip


def tiny(model: Model) -> Model:
    """The same layer with sizes that the interpreter computes in milliseconds, no power of two among the widths."""
    routing = replace(model.routing, top_k=min(model.top_k, 3))
    return replace(
        model,
        hidden=56,
        experts=min(model.experts, 32),
        layers=3,
        mlp=replace(model.mlp, width=40),
        routing=routing,
        padded=64 if model.padded else 0,
    )


@dataclass(frozen=True)
class Weights:
    """tensors: by the names of `LayerSpec.tensors`, experts at the padded width; scales: of float8 ones, by "w13"."""

    model: Model
    tensors: Mapping[str, Tensor]
    scales: Mapping[str, Quantised]

    def unpadded(self, name: str) -> Tensor:
        """A tensor of the experts without its padding, a view."""
        tensor, hidden = self.tensors[f"experts.{name}"], self.model.hidden
        return tensor[:, :hidden] if name == "w2" else tensor[..., :hidden] if name.startswith("w") else tensor

    def exact(self, experts: Tensor) -> dict[str, Tensor]:
        """The tensors of these experts alone in float64, gate above up, without padding, scales multiplied in."""
        names = [name.removeprefix("experts.") for name in self.tensors if name.startswith("experts.")]
        found = {name: _rows(self.unpadded(name), experts).double() for name in names}
        for name, quantised in self.scales.items():
            stacked = 2 if name == "w13" else 1
            found[name] *= spread(quantised.scale[experts], found[name].shape, quantised.tile, stacked)
        if self.model.interleaved:
            for name in ("w13", "b13"):
                found[name] = torch.cat([found[name][:, ::2], found[name][:, 1::2]], dim=1)
        return {f"experts.{name}": tensor for name, tensor in found.items()}


def _rows(tensor: Tensor, experts: Tensor) -> Tensor:
    """tensor[experts]; float8 by its bits, for not every torch indexes it."""
    return tensor.view(torch.uint8)[experts].view(tensor.dtype) if tensor.itemsize == 1 else tensor[experts]


def make_weights(model: Model, device: str) -> Weights:
    """Random weights that keep the spread of what they multiply, and scales around 1."""
    torch.manual_seed(0)
    tensors, scales = {}, {}
    for name, shape in model.layer.tensors().items():
        if model.padded and name in ("experts.w1", "experts.w13", "experts.w2"):
            rows = model.padded if name == "experts.w2" else shape[1]
            shape = (shape[0], rows, shape[2] if name == "experts.w2" else model.padded)
        if model.fp8 and name in ("experts.w13", "experts.w2"):
            own = name.removeprefix("experts.")
            tensors[name], scales[own] = _quantised(shape, 2 if own == "w13" else 1, device)
        elif name.startswith("router.") and name != "router.proj":
            tensors[name] = torch.rand(shape, device=device) + 0.5
        else:
            dtype = torch.float32 if name.startswith("router.") and model.layer.logits.dtype == "float32" else None
            tensors[name] = torch.empty(shape, dtype=dtype or torch.bfloat16, device=device)
            # In place, for the largest is 15 GB.
            tensors[name].normal_(std=shape[-1] ** -0.5 if len(shape) > 2 or name == "router.proj" else 0.1)
    if model.padded:
        tensors[model.first][..., model.hidden :] = 0
        tensors["experts.w2"][:, model.hidden :] = 0
    return Weights(model, tensors, scales)


def _quantised(shape: tuple[int, ...], stacked: int, device: str) -> tuple[Tensor, Quantised]:
    experts, rows, columns = shape
    codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    for own in codes:
        own.copy_(torch.randn(rows, columns, device=device))
    scale = (torch.rand(experts, *scale_shape(rows, columns, BLOCK_128, stacked), device=device) + 0.5) * columns**-0.5
    return codes, Quantised(scale, BLOCK_128)
