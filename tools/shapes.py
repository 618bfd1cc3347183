"""The shapes of real models at which the launchers of kernels/ are recorded, and on which targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from launches import TARGETS, Launch, Target, recorded
from torch import Tensor

from moe_conformance.engine import FusedShared, MLPSpec, RouteInputs, RoutingSpec
from moe_conformance.reference_impl import operators
from moe_conformance.reference_impl.quantised.tiles import scale_shape

# With meta tensors an operator would call its fake function, which launches nothing; here its launcher is called
# instead.
with patch.object(operators, "operator", lambda schema, launcher, fake: launcher):
    from moe_conformance.kernels.capture import capture
    from moe_conformance.kernels.dispatch import align
    from moe_conformance.kernels.experts import compute, problem_of
    from moe_conformance.kernels.float8 import Quantised
    from moe_conformance.kernels.padding import pad, unpad
    from moe_conformance.kernels.routing import route, route_logits
    from moe_conformance.kernels.tuning import default

ALL = frozenset(target.name for target in TARGETS)
# One target of NVIDIA and one of AMD, for kernels that hardly depend on the target's instructions.
TWO = frozenset({"sm_90", "gfx942"})
H100 = frozenset({"sm_90"})
VOCABULARY = 1 << 17


@dataclass(frozen=True)
class Model:
    """The experts of a model. padded: columns that its weights have instead of `hidden`, 0 for as many."""

    name: str
    hidden: int
    experts: int
    top_k: int
    spec: MLPSpec
    dtype: torch.dtype = torch.bfloat16
    fp8: bool = False
    padded: int = 0
    interleaved: bool = False

    def run(self, tokens: int, target: Target, **options: Any) -> Tensor:
        """All of a routed sum, as `routed_experts` runs it where no tuned configuration is kept."""
        x = torch.empty(tokens, self.hidden, dtype=self.dtype)
        shapes = self.spec.tensors("experts", self.padded or self.hidden, (self.experts,))
        tensors = {name: torch.empty(shape, dtype=self.dtype) for name, shape in shapes.items()}
        quantised = {}
        if self.fp8:
            for name in ("w13", "w2"):
                w = tensors[f"experts.{name}"].to(torch.float8_e4m3fn)
                tensors[f"experts.{name}"] = w
                scales = scale_shape(w.shape[1], w.shape[2], (128, 128), 2 if name == "w13" else 1)
                quantised[name] = Quantised(torch.empty(self.experts, *scales))
        ids = torch.empty(tokens, self.top_k, dtype=torch.int32)
        weights = torch.empty(tokens, self.top_k)
        problem = problem_of(x, self.spec, tensors["experts.w2"], self.top_k, self.experts)
        config = default(problem, target.block_memory, target.gpu.warp_size)
        return compute(
            x, self.spec, tensors, ids, weights, config, quantised=quantised, interleaved=self.interleaved, **options
        )


GEMMA4 = Model("Gemma 4 26B-A4B", 2816, 128, 8, MLPSpec(704, "gelu_tanh"))
QWEN3 = Model("Qwen3-30B-A3B", 2048, 128, 8, MLPSpec(768))
QWEN3_FLOAT32 = Model("Qwen3-30B-A3B float32", 2048, 128, 8, MLPSpec(768), dtype=torch.float32)
DEEPSEEK_V3 = Model("DeepSeek-V3", 7168, 256, 8, MLPSpec(2048))
DEEPSEEK_V3_FP8 = Model("DeepSeek-V3 float8", 7168, 256, 8, MLPSpec(2048), fp8=True)
GPT_OSS = Model(
    "gpt-oss-120b", 2880, 128, 4,
    MLPSpec(2880, clamp="before", limit=7.0, alpha=1.702, up_offset=1.0, bias=True), interleaved=True,
)  # fmt: skip
NANO = Model("Nemotron-3-Nano", 2688, 128, 6, MLPSpec(1856, "relu2", gated=False))
NANO_PADDED = Model("Nemotron-3-Nano padded", 2688, 128, 6, MLPSpec(1856, "relu2", gated=False), padded=2816)
MIXTRAL = Model("Mixtral 8x7B", 4096, 8, 2, MLPSpec(14336))


@dataclass(frozen=True)
class Shape:
    """Launches at one shape, and which of their kernels are looked at on which targets."""

    name: str
    run: Callable[[Target], object]
    kernels: frozenset[str]
    targets: frozenset[str] = field(default=ALL)


MATMULS = frozenset({"gate_up", "down"})


def experts(
    model: Model, tokens: int, targets: frozenset[str] = ALL, also: frozenset[str] = frozenset(), mapped: bool = False
) -> Shape:
    """The grouped products. mapped: with an expert map, something added and identity experts."""

    def run(target: Target) -> object:
        options: dict[str, Any] = {}
        if mapped:
            expert_map = torch.empty(model.experts, dtype=torch.int32)
            added = torch.empty(tokens, model.hidden, dtype=model.dtype)
            options = {"expert_map": expert_map, "added": added, "identity_experts": 16, "output_scale": 2.5}
        return model.run(tokens, target, **options)

    return Shape(f"{model.name}{' mapped' if mapped else ''} T {tokens}", run, MATMULS | also, targets)


def aligned(
    name: str, tokens: int, num_experts: int, top_k: int, block: int, mapped: bool, targets: frozenset[str] = ALL
) -> Shape:
    def run(target: Target) -> object:
        expert_map = torch.empty(num_experts, dtype=torch.int32) if mapped else None
        return align(torch.empty(tokens, top_k, dtype=torch.int32), num_experts, block, expert_map)

    shape = f"{name}{' mapped' if mapped else ''} T {tokens}"
    return Shape(shape, run, frozenset({"count", "sum", "align"}), targets)


def routed(
    name: str,
    dtype: torch.dtype,
    tokens: int,
    classes: int,
    spec: RoutingSpec,
    stride: int = 1,
    targets: frozenset[str] = ALL,
) -> Shape:
    def run(target: Target) -> object:
        logits = torch.empty(tokens, classes * stride, dtype=dtype)[:, ::stride]
        own = classes - spec.shared_classes
        tensors = {
            "router.selection_bias": torch.empty(own),
            "router.per_expert_scale": torch.empty(own, dtype=dtype),
            "router.global_scale": torch.empty(1),
            "router.table": torch.empty(VOCABULARY, spec.top_k, dtype=torch.int64),
        }
        # Ids of tokens are looked at before the launch, which meta tensors do not allow.
        return route_logits(logits, spec, tensors, token_ids=torch.zeros(tokens, dtype=torch.int64, device="cpu"))

    short = str(dtype).removeprefix("torch.")
    return Shape(f"{name} {short} E {classes} K {spec.top_k} T {tokens}", run, frozenset({"route"}), targets)


def padded(name: str, dtype: torch.dtype, tokens: int, classes: int, spec: RoutingSpec, fused: FusedShared) -> Shape:
    """The router of a batch of which half is padding, with slots for shared experts."""

    def run(target: Target) -> object:
        tensors = {
            "router.selection_bias": torch.empty(classes - spec.shared_classes),
            "router.global_scale": torch.empty(1),
        }
        logits = torch.empty(tokens, classes, dtype=dtype)
        return route(RouteInputs(logits, spec, tensors, valid_rows=tokens // 2, fused_shared=fused))

    short = str(dtype).removeprefix("torch.")
    return Shape(f"{name} padded {short} E {classes} K {spec.top_k} T {tokens}", run, frozenset({"route"}), TWO)


def resized(name: str, dtype: torch.dtype, tokens: int, source: int, width: int) -> Shape:
    def run(target: Target) -> object:
        x = torch.empty(tokens, source, dtype=dtype)
        return pad(x, width) if width > source else unpad(x, width)

    return Shape(
        f"{name} {str(dtype).removeprefix('torch.')} {source} to {width} T {tokens}", run, frozenset({"resize"})
    )


def captured(ids: torch.dtype, buffer: torch.dtype, tokens: int, layers: int, num_experts: int, top_k: int) -> Shape:
    def run(target: Target) -> object:
        room, rejected = torch.empty(tokens, layers, top_k, dtype=buffer), torch.empty(layers, dtype=torch.int32)
        return capture(torch.empty(tokens, top_k, dtype=ids), 0, tokens, room, 0, num_experts, rejected)

    short = [str(dtype).removeprefix("torch.") for dtype in (ids, buffer)]
    return Shape(f"{short[0]} to {short[1]} K {top_k} T {tokens}", run, frozenset({"capture", "capture check"}))


BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
DEEPSEEK_V3_ROUTING = RoutingSpec(
    8, score="sigmoid", selection_bias=True, groups=8, top_groups=4, group_score="top2_sum", group_mask=0.0,
    renormalize="sum", epsilon=1e-20, scale=2.5,
)  # fmt: skip
SUPER_ROUTING = RoutingSpec(22, score="sigmoid", selection_bias=True, renormalize="sum", epsilon=1e-20, scale=5.0)
KIMI_K2_ROUTING = RoutingSpec(8, score="sigmoid", selection_bias=True, renormalize="sum", epsilon=1e-20, scale=2.827)
SIXTEEN_ROUTING = RoutingSpec(16, score="sigmoid", selection_bias=True, renormalize="sum", epsilon=1e-20, scale=2.5)
DEEPSEEK_V4_ROUTING = RoutingSpec(6, score="sqrt_softplus", renormalize="sum", epsilon=1e-20, scale=1.5)
INPUT_ROUTING = RoutingSpec(4, select_on="logits", score_dtype="input")
PHIMOE_ROUTING = RoutingSpec(2, selector="sparsemixer", select_on="logits", score_dtype="input", jitter=0.01)
ERNIE_ROUTING = RoutingSpec(6, selection_bias=True, renormalize="sum", floor=1e-12)
LONGCAT_ROUTING = RoutingSpec(12, selection_bias=True, scale=6.0, identity_experts=256)
ZAYA_ROUTING = RoutingSpec(1, selection_bias=True, score_dtype="input", skip_expert=True)
INKLING_ROUTING = RoutingSpec(
    6, score="sigmoid", selection_bias=True, scale=8.0, global_scale=True, shared_classes=2
)  # fmt: skip
LAGUNA_ROUTING = RoutingSpec(
    8, score="sigmoid", selection_bias=True, renormalize="sum", logit_scale=0.5, logit_softcap=30.0
)  # fmt: skip
SHAPES = (
    routed("Gemma 4", BFLOAT16, 64, 128, RoutingSpec(8, renormalize="sum", per_expert_scale=True)),
    routed("Qwen3", FLOAT32, 4096, 128, RoutingSpec(8, renormalize="sum"), targets=TWO),
    routed("Qwen2 every third column", torch.float16, 63, 60, RoutingSpec(4), stride=3, targets=TWO),
    routed("Mixtral", FLOAT32, 1, 8, RoutingSpec(2, renormalize="sum"), targets=TWO),
    routed("DeepSeek-V3", FLOAT32, 64, 256, DEEPSEEK_V3_ROUTING),
    routed("DeepSeek-V2", FLOAT32, 64, 160, RoutingSpec(6, groups=8, top_groups=3, scale=16.0), targets=TWO),
    routed("Nemotron-3-Super", FLOAT32, 64, 512, SUPER_ROUTING),
    routed("gpt-oss", BFLOAT16, 64, 128, RoutingSpec(4, select_on="logits")),
    routed("Kimi-K2", FLOAT32, 64, 384, KIMI_K2_ROUTING, targets=TWO),
    routed("896 of 16", FLOAT32, 64, 896, SIXTEEN_ROUTING, targets=TWO),
    routed("gpt-oss in its dtype", BFLOAT16, 64, 128, INPUT_ROUTING, targets=TWO),
    routed("DeepSeek-V4", FLOAT32, 64, 256, replace(DEEPSEEK_V4_ROUTING, selection_bias=True), targets=TWO),
    routed("DeepSeek-V4 by token", FLOAT32, 64, 256, replace(DEEPSEEK_V4_ROUTING, selector="table"), targets=TWO),
    routed("PhiMoE", BFLOAT16, 64, 16, PHIMOE_ROUTING, targets=TWO),
    routed("DBRX", BFLOAT16, 64, 16, RoutingSpec(4, score_dtype="input", renormalize="norm"), targets=TWO),
    routed("DBRX by squares", BFLOAT16, 64, 16, RoutingSpec(4, renormalize="norm", norm_order=2.0), targets=TWO),
    routed("ERNIE 4.5", FLOAT32, 64, 64, ERNIE_ROUTING, targets=TWO),
    routed("LongCat-Flash", FLOAT32, 64, 768, LONGCAT_ROUTING, targets=TWO),
    routed("ZAYA", BFLOAT16, 64, 17, ZAYA_ROUTING, targets=TWO),
    routed("Inkling", FLOAT32, 64, 130, INKLING_ROUTING, targets=TWO),
    routed("Laguna", FLOAT32, 64, 256, LAGUNA_ROUTING, targets=TWO),
    padded("DeepSeek-V3", FLOAT32, 64, 256, DEEPSEEK_V3_ROUTING, FusedShared(1)),
    padded("DeepSeek-V3 by share", FLOAT32, 64, 256, DEEPSEEK_V3_ROUTING, FusedShared(1, "share")),
    padded("Inkling", FLOAT32, 64, 130, INKLING_ROUTING, FusedShared(2, "router")),
    routed("the limits", FLOAT32, 64, 1024, RoutingSpec(32, renormalize="sum")),
    aligned("Gemma 4", 64, 128, 8, 16, mapped=False, targets=H100),
    aligned("Gemma 4", 64, 128, 8, 16, mapped=True),
    aligned("Gemma 4", 4096, 128, 8, 128, mapped=False),
    aligned("Gemma 4", 4096, 128, 8, 128, mapped=True, targets=H100),
    experts(GEMMA4, 1, also=frozenset({"combine"}), mapped=True),
    experts(GEMMA4, 64),
    experts(GEMMA4, 4096, also=frozenset({"combine"})),
    experts(QWEN3, 64, H100),
    experts(QWEN3, 4096, H100),
    experts(QWEN3_FLOAT32, 64),
    experts(DEEPSEEK_V3, 1, H100),
    experts(DEEPSEEK_V3, 64, H100),
    experts(DEEPSEEK_V3, 4096, H100),
    experts(DEEPSEEK_V3_FP8, 1, H100),
    experts(DEEPSEEK_V3_FP8, 64),
    experts(DEEPSEEK_V3_FP8, 4096),
    experts(GPT_OSS, 1, H100),
    experts(GPT_OSS, 64),
    experts(GPT_OSS, 4096, H100 | {"sm_100", "gfx942"}),
    experts(NANO, 1, H100),
    experts(NANO, 64),
    experts(NANO, 4096, H100),
    experts(NANO_PADDED, 64, H100),
    experts(NANO_PADDED, 4096, H100),
    experts(MIXTRAL, 1, H100),
    experts(MIXTRAL, 64, H100),
    experts(MIXTRAL, 4096, H100),
    resized("pad", BFLOAT16, 4096, 2688, 2816),
    resized("unpad", BFLOAT16, 4096, 2816, 2688),
    resized("pad", torch.int8, 63, 2687, 2816),
    captured(torch.int32, torch.int32, 64, 48, 128, 8),
    captured(torch.int64, torch.int16, 4096, 48, 512, 22),
)  # fmt: skip


def launches(words: str = "", targets: frozenset[str] = ALL) -> Iterator[Launch]:
    """Every launch to be compiled, each specialisation once, by its first shape. words: part of "NAME SHAPE"."""
    for target in TARGETS:
        if target.name not in targets:
            continue
        seen: set[str] = set()
        for shape in SHAPES:
            if target.name not in shape.targets:
                continue
            for launch in recorded(shape.name, target, shape.run):
                if launch.name not in shape.kernels or launch.specialization in seen:
                    continue
                seen.add(launch.specialization)
                if words in f"{launch.name} {launch.shape}":
                    yield launch
