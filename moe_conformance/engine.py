"""What an engine is: a name, its capabilities and the stages it implements.

An adapter is one class. It need not inherit from `Engine`; a stage it lacks is simply not there. Letters:
T tokens, E experts, K experts per token, H hidden, F expert intermediate, D the width the experts work in
(H, or the latent width), L layers, P padded slots. All tensors are torch, on the device that `info` declares.

This module imports no torch: an adapter's file must be importable without its engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from moe_conformance.errors import Unsupported
from moe_conformance.model.specs import LayerSpec, MLPSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class EngineInfo:
    """name: as listed; version: of the engine judged, not of the adapter; device: "cpu", "cuda", ..."""

    name: str
    version: str
    device: str = "cpu"


@dataclass(frozen=True)
class MoESpec:
    """What a config says about its Mixture-of-Experts layers.

    num_layers: decoder layers, MoE or not. moe_layers: their indices that have routed experts.
    num_experts, top_k: one number, or one for each entry of moe_layers where the model varies them. num_experts
    counts every id a router can give, identity (zero) experts included.
    shared_experts: how many always-on experts a layer has (0: none). shared_intermediate_size: the summed
    width of the shared experts. latent_size: width the routed experts work in when it is not hidden_size.
    encoder_moe_layers: as moe_layers, for the encoder of an encoder-decoder.
    layers: what each layer computes, one entry for each of moe_layers (for an encoder with experts alone, of
    encoder_moe_layers); empty where the engine does not say.
    """

    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int | tuple[int, ...]
    top_k: int | tuple[int, ...]
    hidden_size: int
    moe_intermediate_size: int | tuple[int, ...]
    shared_experts: int = 0
    shared_intermediate_size: int | None = None
    latent_size: int | None = None
    encoder_moe_layers: tuple[int, ...] = ()
    layers: tuple[LayerSpec, ...] = ()

    @property
    def max_top_k(self) -> int:
        """The K that a capture buffer of this model needs."""
        return self.top_k if isinstance(self.top_k, int) else max(self.top_k)

    @property
    def max_experts(self) -> int:
        """The E that a captured id must be below."""
        return self.num_experts if isinstance(self.num_experts, int) else max(self.num_experts)


class CaptureShape(NamedTuple):
    """Sizes of a routed-experts buffer as one side of an engine derives them from a config.

    experts is None where the engine does not use it.
    """

    layers: int
    top_k: int
    experts: int | None


class Routing(NamedTuple):
    """ids: [T, K] integer. weights: [T, K] float32, weights[t, k] belongs to ids[t, k]."""

    ids: Tensor
    weights: Tensor


Method = Literal["softmax_topk", "softmax_topk_renorm", "gemma4"]


@dataclass(frozen=True)
class RouteInputs:
    """logits: [T, E] float32, bfloat16 or float16. per_expert_scale: [E], gemma4 only."""

    logits: Tensor
    top_k: int
    method: Method
    per_expert_scale: Tensor | None = None


@dataclass(frozen=True)
class RouterSpec:
    """The router to build. hidden_size and norm_eps matter only to engines whose router takes hidden states.

    norm_eps: of Gemma 4's RMSNorm before the projection; its config's default.
    """

    method: Method
    num_experts: int
    top_k: int
    hidden_size: int
    dtype: torch.dtype
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class RouterHandle:
    """A router as the engine has it.

    module: an nn.Module; `module(x)` returns (weights [T, K], ids [T, K]).
    takes: whether x is router logits [T, E] or hidden states [T, H].
    tensors: canonical name -> name in `module.named_parameters()`. Canonical names are "per_expert_scale" [E];
    for takes="hidden" also "proj" [E, H] and "scale" [H].
    """

    module: nn.Module
    takes: Literal["logits", "hidden"]
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class AlignInputs:
    """Pairs to be sorted by expert, each expert's into whole blocks.

    ids: [T, K] int32 or int64, not always contiguous: an expert in [0, experts), or -1 for a pair that no expert takes.
    expert_map: [E] int32, this rank's local id of each expert, in any order, or -1 where another rank has it; None:
    local ids are global ids.
    """

    ids: Tensor
    experts: int
    block: int
    expert_map: Tensor | None = None


class Aligned(NamedTuple):
    """Which pair each slot holds: slots come in blocks, and all pairs of a block are of one expert.

    slot_to_pair: [P] int32, pair t K + k; T K marks padding. expert_of_block: [P / block] int32, the local expert of
    each block, -1 behind the last used one. padded_count: [1] int32, slots in use, a multiple of block; those behind
    hold T K. P follows from shapes alone. Pairs of other ranks get no slot.

    An engine may return more slots than that, leave anything behind those in use, mark padding by any number from T K
    up but the dtype's largest (which fresh memory holds while cases run), put experts, and pairs within one, in any
    order, give pairs of other ranks slots in blocks of expert -1 (as vLLM does by default), which then count as not
    there, and give the count as a 0-d tensor or an int.
    """

    slot_to_pair: Tensor
    expert_of_block: Tensor
    padded_count: Tensor


@dataclass(frozen=True)
class LayerInputs:
    """One MoE layer and its input.

    x: [T, H]. logits: [T, E]. w13: [E, 2F, D], gate rows above up rows. w2: [E, D, F].
    shared_w13: [2Fs, H] and shared_w2: [H, Fs], or None without a shared expert (silu, gated).
    latent_in: [D, H] and latent_out: [H, D], or None when D = H; the router and the shared expert see H.
    padded_hidden, padded_intermediate: the widths the engine's expert kernel must run at (>= D, F), or None.
    Whatever the kernel leaves in the padded columns of its output is garbage and must not be seen again.
    scale: the routed scaling factor, applied once to the routed sum.
    """

    x: Tensor
    logits: Tensor
    w13: Tensor
    w2: Tensor
    top_k: int
    method: Method
    activation: Literal["silu", "gelu_tanh"] = "silu"
    scale: float = 1.0
    per_expert_scale: Tensor | None = None
    shared_w13: Tensor | None = None
    shared_w2: Tensor | None = None
    latent_in: Tensor | None = None
    latent_out: Tensor | None = None
    padded_hidden: int | None = None
    padded_intermediate: int | None = None


@dataclass(frozen=True)
class BlockInputs:
    """The MoE block of one layer of a model, by its config, and its input.

    config: as in config.json, a plain dict with model_type. layer: decoder layer. tensors: canonical name -> tensor of
    that layer, as `LayerSpec.tensors` names and shapes them, in x's dtype (router.selection_bias in float32, table in
    int64). x: [B, S, H], what the block's router sees. token_ids: [B, S] int64, for models that route by token id.
    state: [B, S, R], the previous MoE layer's router state, where the model passes it on; None in the first.
    routing: ids [T, K] and weights to use instead of the router's, T = B S; id E marks a dropped pair.
    implementation: the engine's own name for a way to compute the experts, None for its default.
    """

    config: Mapping[str, Any]
    layer: int
    tensors: Mapping[str, Tensor]
    x: Tensor
    token_ids: Tensor | None = None
    state: Tensor | None = None
    routing: Routing | None = None
    implementation: str | None = None


class BlockOutput(NamedTuple):
    """output: [T, H] in x's dtype, shared experts and parallel dense MLP included, residual not.

    routing: ids and weights [T, K] as the experts got them, in any order within a row; None where `inputs.routing` was
    given or the engine cannot tell.
    """

    output: Tensor
    routing: Routing | None


@dataclass(frozen=True)
class ExpertMapSpec:
    """Experts to divide among ranks. rank: whose map is asked for. contiguous: each rank has a run of ids, in rank
    order; round_robin: rank r has the ids that are r modulo the number of ranks."""

    experts: int
    rank: int
    ranks: int
    placement: Literal["contiguous", "round_robin"] = "contiguous"


@dataclass(frozen=True)
class ReplicateInputs:
    """Which of several copies of its expert each pair goes to.

    ids: [T, K] integer, logical ids in [0, E), or -1 for a pair that no expert takes. physical_to_logical: [P] int64,
    the expert that each physical one is a copy of. experts: E. tokens: rows that are real; those behind are padding.
    """

    ids: Tensor
    physical_to_logical: Tensor
    experts: int
    tokens: int


class Replicated(NamedTuple):
    """ids: [T, K] integer, physical ids, -1 where they were. load: [E] integer, real pairs of each logical expert."""

    ids: Tensor
    load: Tensor


@dataclass(frozen=True)
class ShardInputs:
    """A batch that every rank has, all experts, and one rank's place: which of them it holds, and what slice of each.

    x: [T, D]. ids: [T, K] int64 in [0, E), or -1 for a pair that no expert takes. weights: [T, K] float32.
    experts: what each expert computes. tensors: canonical name -> tensor, whole, in x's dtype, as
    `MLPSpec.tensors("experts", D, (E,))` and, of `shared`, `MLPSpec.tensors("shared", D)` name and shape them.
    expert_map: [E] int32, this rank's local id of each expert, in any order, or -1 where another rank has it; with
    physical_to_logical [P], the expert that each physical one is a copy of, [P] local ids of physical experts.
    ep_rank, ep_size: among the ranks that divide the experts. tp_rank, tp_size: among those that have the same experts
    and divide their width F, not always evenly. shared: an MLP of all tokens, added once to the routed sum.
    """

    x: Tensor
    ids: Tensor
    weights: Tensor
    experts: MLPSpec
    tensors: Mapping[str, Tensor]
    expert_map: Tensor
    ep_rank: int = 0
    ep_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    shared: MLPSpec | None = None
    physical_to_logical: Tensor | None = None


RowKind = Literal["concatenated", "local", "sequence_shard", "sequence_gathered"]


@dataclass(frozen=True)
class Rows:
    """Which rows an ids tensor holds.

    counts: tokens of each data-parallel rank in this step.
    kind: "concatenated", all ranks' rows in rank order; "local", this rank's rows; "sequence_shard", this
    tensor-parallel rank's slice of the local rows, each slice ceil(count / tp) rows, the last ones padding;
    "sequence_gathered", every rank's slices with their padding, data-parallel rank major, then tensor-parallel.
    gather: the engine's all-gather, given in every layout; for "sequence_shard" it concatenates every tensor-parallel
    rank's slice along dim 0 in rank order.
    """

    kind: RowKind
    counts: tuple[int, ...]
    gather: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class CaptureSpec:
    """The capturer to build: buffer sizes and this process's place among the ranks."""

    max_tokens: int
    layers: int
    top_k: int
    experts: int
    dp_rank: int = 0
    dp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1


class CaptureSession(Protocol):
    """A routed-experts capturer. `capture` gets ids [rows, K]; `read` gives [n, L, K] for the last step."""

    def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None: ...

    def read(self, num_tokens: int) -> Tensor: ...

    def close(self) -> None: ...


class CaptureStore(Protocol):
    """The host side: rows kept by slot, read from another process through the picklable `address`."""

    @property
    def address(self) -> object: ...

    def write(self, slots: Sequence[int], rows: Tensor) -> None: ...

    def close(self) -> None: ...


class CaptureReader(Protocol):
    def read(self, slots: Sequence[int]) -> Tensor: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class CheckpointName:
    """A tensor of a checkpoint: its name and shape."""

    name: str
    shape: tuple[int, ...] = field(default=())


class Engine:
    """Base with every stage unsupported. Adapters may derive from it, or only look like it.

    `capabilities` maps each stage offered to the optional features of it that are offered:

    describe          "refusals": a config is checked for what is missing or contradicts itself; "layers":
                      MoESpec.layers says what each MoE layer computes
    capture_shape     "worker", "reader"
    route             the methods
    router_module     the methods
    align             "expert_map"; "dropped_ids": ids may be -1; "expert_bounds": ids may name no expert
    layer             "shared", "latent", "padded_hidden", "padded_intermediate", "scale", "gelu_tanh", the methods;
                      "traceable": `layer` itself can be traced (an adapter that builds modules in it cannot)
    block             the model types; "dropped_ids"; "expert_bounds": given ids may name no expert; the names of
                      further implementations, as "implementation:NAME"
    capture_session   the row kinds; "layer_bounds", "expert_bounds": ids outside the buffer's layers, or outside
                      [0, E), are rejected; "unwritten": what this step did not capture reads as -1 or raises
    capture_store     "bounds": slots outside the store are rejected; "unwritten": as above
    expert_map        the placements; "idle_ranks": more ranks than experts
    replicate         nothing
    shard             "not_gated", "bias", the activations other than silu; "tensor_parallel", "uneven_width": a width
                      that tp_size does not divide; "idle_ranks": a rank without experts; "shared"; "replicas":
                      physical_to_logical
    remap             the naming styles of suites/weights
    load              the naming styles of suites/weights
    """

    name: str = ""

    @classmethod
    def environment(cls) -> Mapping[str, str]:
        """Environment variables that the engine's process needs before anything is imported."""
        return {}

    @classmethod
    def missing(cls) -> str | None:
        """Why the engine cannot start here, or None. Must be cheap: no heavy import."""
        return None

    @property
    def info(self) -> EngineInfo:
        raise NotImplementedError

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        raise NotImplementedError

    def describe(self, config: Any) -> MoESpec:
        """config: a transformers config, nested or flat, or its plain dict."""
        raise Unsupported("describe")

    def capture_shape(self, config: Any, side: Literal["worker", "reader"]) -> CaptureShape:
        """The buffer sizes that one side of the capturer takes from the config."""
        raise Unsupported("capture_shape")

    def route(self, inputs: RouteInputs) -> Routing:
        raise Unsupported("route")

    def router_module(self, spec: RouterSpec) -> RouterHandle:
        raise Unsupported("router_module")

    def align(self, inputs: AlignInputs) -> Aligned:
        """Sort pairs by expert, each expert's into whole blocks."""
        raise Unsupported("align")

    def layer(self, inputs: LayerInputs) -> Tensor:
        """Return the layer's output [T, H], in x's dtype."""
        raise Unsupported("layer")

    def block(self, inputs: BlockInputs) -> BlockOutput:
        """Compute the MoE block of a layer as the model of this config does."""
        raise Unsupported("block")

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        raise Unsupported("capture_session")

    def capture_store(self, spec: CaptureSpec) -> CaptureStore:
        """A store of spec.max_tokens slots."""
        raise Unsupported("capture_store")

    def capture_reader(self, address: object) -> CaptureReader:
        """Open, in any process, what `capture_store` made."""
        raise Unsupported("capture_reader")

    def expert_map(self, spec: ExpertMapSpec) -> Tensor:
        """[E] integer: the rank's local id of each expert, -1 for those of other ranks."""
        raise Unsupported("expert_map")

    def replicate(self, inputs: ReplicateInputs) -> Replicated:
        """Choose a physical expert for each pair and count the load."""
        raise Unsupported("replicate")

    def shard(self, inputs: ShardInputs) -> Tensor:
        """Return this rank's part [T, D], in x's dtype: summed over all ranks it is the layer's output."""
        raise Unsupported("shard")

    def remap(self, config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str, ...]]:
        """The engine's own name, or names, for each checkpoint tensor of a model with this config (a plain dict)."""
        raise Unsupported("remap")

    def load(self, folder: Path) -> Mapping[str, Tensor]:
        """Load a checkpoint folder (config.json, safetensors with an index) and return what now lies in the model.

        Keys: layers.I.experts.w13 [E, 2F, H] with gate above up, layers.I.experts.w2 [E, H, F],
        layers.I.router.proj [E, H], layers.I.router.scale [H], layers.I.router.per_expert_scale [E].
        Raises if a parameter is left unwritten or a key unconsumed, naming which.
        """
        raise Unsupported("load")


STAGES = (
    "describe",
    "capture_shape",
    "route",
    "router_module",
    "align",
    "layer",
    "block",
    "capture_session",
    "capture_store",
    "expert_map",
    "replicate",
    "shard",
    "remap",
    "load",
)
