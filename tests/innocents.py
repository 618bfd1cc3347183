"""Engines that do a legitimate thing in another way than the reference, each with a clause that could accuse it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import (
    Arrived,
    BlockInputs,
    BlockOutput,
    CaptureSession,
    CaptureSpec,
    CaptureStore,
    CheckpointName,
    Exchanged,
    ExchangeInputs,
    ExpertsInputs,
    LayerInputs,
    MoESpec,
    Replicated,
    ReplicateInputs,
    RouteInputs,
    RouterHandle,
    RouterSpec,
    Routing,
    Rows,
    ShardInputs,
    Target,
)
from moe_conformance.engines.mutants.double_prefix import ExtraExpertIgnored, UnknownTensorsSkipped
from moe_conformance.engines.reference import Reference
from moe_conformance.errors import InputError
from moe_conformance.judging.verdict import Verdict
from moe_conformance.model.families.scope import plain
from moe_conformance.reference_impl.block import layer_spec
from moe_conformance.reference_impl.capture import Capturer, local_rows
from moe_conformance.reference_impl.experts import Project, experts, routed_experts
from moe_conformance.reference_impl.lora import merged
from moe_conformance.reference_impl.parallel.exchange import exchange
from moe_conformance.reference_impl.parallel.experts import Part, shard, through_all_gather
from moe_conformance.reference_impl.parallel.ranks import Group
from moe_conformance.reference_impl.quantised.experts import dequantised, stored_experts
from moe_conformance.reference_impl.store import HostStore


class Innocent(Reference):
    """The reference under another name. lacks: features of a stage that it does not offer."""

    lacks: Mapping[str, set[str]]

    def __init_subclass__(cls, lacks: Mapping[str, set[str]] | None = None, **_: object) -> None:
        cls.name = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()
        cls.lacks = lacks or {}

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        return {stage: words - self.lacks.get(stage, set()) for stage, words in super().capabilities().items()}


class SizesOfEachLayer(Innocent):
    """One number for each MoE layer, also where all are equal."""

    def describe(self, config: Any) -> MoESpec:
        spec = super().describe(config)
        layers = len(spec.moe_layers or spec.encoder_moe_layers)

        def each(sizes: int | tuple[int, ...]) -> tuple[int, ...]:
            return (sizes,) * layers if isinstance(sizes, int) else sizes

        return replace(spec, num_experts=each(spec.num_experts), top_k=each(spec.top_k))


class ReadsWhatIsPublished(Innocent):
    """Keys that every published config of these models has are read without a default."""

    def describe(self, config: Any) -> MoESpec:
        values = plain(config)
        if values.get("model_type") in ("deepseek_v3", "dots1", "glm4_moe_lite", "mimo_v2_flash"):
            assert values["topk_method"] == "noaux_tc"
        return super().describe(config)


class ActivationBuiltIn(Innocent):
    """Mixtral's experts are silu, as published, whatever hidden_act says."""

    def describe(self, config: Any) -> MoESpec:
        spec = super().describe(config)
        if plain(config).get("model_type") != "mixtral":
            return spec
        layers = tuple(replace(layer, experts=replace(layer.experts, activation="silu")) for layer in spec.layers)
        return replace(spec, layers=layers)


class TrueIsOne(Innocent):
    """A top-k of true is taken for 1, as Python does."""

    def describe(self, config: Any) -> MoESpec:
        values = plain(config)
        if values.get("num_experts_per_tok") is True:
            return super().describe({**values, "num_experts_per_tok": 1})
        return super().describe(config)


class EveryPairHasAnExpert(Innocent, lacks={"replicate": {"dropped_ids"}, "shard": {"dropped_ids"}}):
    """-1 is no id to it, and it says so."""

    def replicate(self, inputs: ReplicateInputs) -> Replicated:
        if (inputs.ids < 0).any():
            raise InputError("ids: got -1, want an expert")
        return super().replicate(inputs)

    def shard(self, inputs: ShardInputs) -> Tensor:
        if (inputs.whole.ids < 0).any():
            raise InputError("ids: got -1, want an expert")
        return super().shard(inputs)


class SlotsInItsOwnOrder(Innocent):
    """Ids int32 in the order that its search leaves, ties to the highest id, and padding rows as they come."""

    def route(self, inputs: RouteInputs) -> Routing:
        spec, last = inputs.routing, inputs.logits.shape[1] - 1
        if spec.selector == "topk" and not spec.capacity and spec.classes(0) == 0:
            tensors = {name: tensor.flip(0) for name, tensor in inputs.tensors.items()}
            ids, weights = super().route(replace(inputs, logits=inputs.logits.flip(-1), tensors=tensors))
            ids[:, : spec.top_k] = last - ids[:, : spec.top_k]
        else:
            ids, weights = super().route(inputs)
        order = torch.arange(spec.top_k - 1, -1, -1).tolist() + list(range(spec.top_k, ids.shape[1]))
        ids, weights = ids[:, order].int(), weights[:, order]
        if inputs.valid_rows is not None:
            ids[inputs.valid_rows :], weights[inputs.valid_rows :] = 12345, float("nan")
        return Routing(ids, weights)


class NeverOnMeta(Innocent, lacks={"router_module": {"from_meta"}}):
    """Its modules are made with their weights, and never without."""

    def router_module(self, spec: RouterSpec) -> RouterHandle:
        handle = super().router_module(spec)
        move = handle.module.to

        def to(*place: Any, **named: Any) -> Any:
            if "meta" in place:
                raise NotImplementedError("got device meta, want one with memory")
            return move(*place, **named)

        handle.module.to = to  # type: ignore[method-assign]
        return handle


class HasNoScale(Innocent, lacks={"layer": {"output_scale"}, "experts": {"output_scale"}}):
    """Its models scale the routing weights, if anything."""

    def layer(self, inputs: LayerInputs) -> Tensor:
        assert inputs.spec.output_scale == 1
        return super().layer(inputs)


class ScalesAfterTheExperts(Innocent):
    """It multiplies the routed sum, so the weights that its experts get are without the scale."""

    def block(self, inputs: BlockInputs) -> BlockOutput:
        output, routing = super().block(inputs)
        spec = layer_spec(inputs.config, inputs.layer).routing
        if routing is not None and not spec.shared_classes:
            routing = Routing(routing.ids, routing.weights / spec.scale)
        return BlockOutput(output, routing)


class AddsInAnyOrder(Innocent, lacks={"experts": {"same_bits"}}):
    """As the next one, where the experts are by themselves."""

    def __init__(self) -> None:
        self.calls = torch.Generator().manual_seed(0)

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        total = torch.zeros(inputs.x.shape)
        for k in torch.randperm(inputs.ids.shape[1], generator=self.calls).tolist():
            own = replace(inputs, x=inputs.x.float(), ids=inputs.ids[:, [k]], weights=inputs.weights[:, [k]])
            wide = inputs.tensors if inputs.quant else {name: t.float() for name, t in inputs.tensors.items()}
            total += experts(replace(own, tensors=wide))
        return total.to(inputs.x.dtype)


class DequantisesIntoTheDtypeOfX(Innocent):
    """Weights are made numbers of x's dtype on load, and lie transposed in memory; then nothing is stored any more."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        quant, x = inputs.quant, inputs.x
        if quant is None or quant.activations != "no" or inputs.lora is not None:
            return super().experts(inputs)
        plain = dequantised(quant, inputs.mlp, inputs.tensors, x.shape[1], x.dtype)
        turned = {name: t.mT.contiguous().mT if t.dim() == 3 else t for name, t in plain.items()}
        return super().experts(replace(inputs, quant=None, tensors=turned))


class ScalesTheSums(Innocent):
    """Codes are multiplied as they are, and an output is scaled by its row; activations are codes before that, too."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        quant, mlp, tensors = inputs.quant, inputs.mlp, inputs.tensors
        if quant is None or quant.granularity != "channel" or quant.zero_points or mlp.bias:
            return super().experts(inputs)
        ones = {name: torch.ones_like(t) if name.endswith(".scale") else t for name, t in tensors.items()}
        plain, around = stored_experts(quant, mlp, ones, inputs.x.shape[1], torch.float32)

        def scaled(base: Project) -> Project:
            def project(name: str, expert: int, token: Tensor, rows: Tensor) -> Tensor:
                output = base(name, expert, token, rows.float()) * tensors[f"experts.{name}.scale"][expert]
                return output.to(rows.dtype)

            return project

        return routed_experts(
            inputs.x,
            mlp,
            plain,
            inputs.ids,
            inputs.weights,
            expert_map=inputs.expert_map,
            output_scale=inputs.output_scale,
            around=[*around, scaled],
        )


class MergesAdapters(Innocent, lacks={"experts": {"same_bits"}}):
    """The tokens of one adapter are a batch, whose weights have the update in them."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        lora = inputs.lora
        if lora is None or inputs.quant is not None:
            return super().experts(inputs)
        output = torch.zeros_like(inputs.x)
        for adapter in lora.adapters.unique().tolist():
            rows = lora.adapters == adapter
            tensors = merged(inputs.mlp, inputs.tensors, lora, adapter) if adapter >= 0 else inputs.tensors
            batch = replace(inputs, x=inputs.x[rows], ids=inputs.ids[rows], weights=inputs.weights[rows])
            output[rows] = super().experts(replace(batch, tensors=tensors, lora=None))
        return output


class SendsEveryPair(Innocent):
    """A row comes once for each of its experts here, sorted by them, the last rank's first."""

    def exchange(self, ranks: Sequence[ExchangeInputs]) -> Sequence[Exchanged]:
        return [Exchanged(got.output, self.by_pair(got.arrived)) for got in super().exchange(ranks) if got.arrived]

    def by_pair(self, arrived: Arrived) -> Arrived:
        rows = arrived.rows.flip(0).repeat_interleave(arrived.ids.shape[1], 0)
        ids = arrived.ids.flip(0).flatten()
        order = ids.argsort(stable=True)
        order = order[ids[order] >= 0]
        return Arrived(rows[order], ids[order][:, None])


class GathersEverything(Innocent):
    """Every rank sees all tokens, and those without an expert there, too."""

    def exchange(self, ranks: Sequence[ExchangeInputs]) -> Sequence[Exchanged]:
        def gathered(x: Tensor, ids: Tensor, weights: Tensor, maps: Tensor, part: Part, group: Group) -> Tensor:
            return through_all_gather(x, ids, weights, part, group)

        return exchange(ranks, gathered)


class SumsInAnyOrder(Innocent, lacks={"shard": {"same_bits"}}):
    """Each call adds a token's experts in another order, as atomics do."""

    def __init__(self) -> None:
        self.calls = torch.Generator().manual_seed(0)

    def shard(self, inputs: ShardInputs) -> Tensor:
        def own_sum(inputs: ExpertsInputs) -> Tensor:
            total = torch.zeros(inputs.x.shape)
            for k in torch.randperm(inputs.ids.shape[1], generator=self.calls).tolist():
                own = replace(inputs, x=inputs.x.float(), ids=inputs.ids[:, [k]], weights=inputs.weights[:, [k]])
                wide = {name: tensor.float() for name, tensor in inputs.tensors.items()}
                total += experts(replace(own, tensors=wide))
            return total.to(inputs.x.dtype)

        return shard(inputs, own_sum)


class OneLayout(Innocent, lacks={"capture_session": {"local", "sequence_shard", "sequence_gathered"}}):
    """Its server was started for the concatenated layout; it knows no other."""

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        class Session(Capturer):
            def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
                if rows.kind != "concatenated":
                    raise InputError(f"rows.kind: got {rows.kind}, want concatenated")
                super().capture(layer_id, ids, rows)

        return Session(spec)


class PlainBuffer(Innocent, lacks={"capture_session": {"unwritten", "expert_bounds", "physical_ids"}}):
    """Ids are kept as they came; what was not captured reads as what was there before, at first 0."""

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        return _Buffer(spec)


class _Buffer:
    def __init__(self, spec: CaptureSpec) -> None:
        self.spec = spec
        self.held = torch.zeros(spec.max_tokens, spec.layers, spec.top_k, dtype=torch.int64)

    def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
        own = local_rows(ids, rows, self.spec)
        if not 0 <= layer_id < self.spec.layers:
            raise InputError(f"layer_id: got {layer_id}, want 0 to {self.spec.layers - 1}")
        self.held[: len(own), layer_id] = own

    def read(self, num_tokens: int) -> Tensor:
        return self.held[:num_tokens].clone()

    def close(self) -> None:
        pass


class CountsPadding(PlainBuffer, lacks={"capture_session": {"unwritten", "expert_bounds", "physical_ids"}}):
    """A rank's tokens are those of the batch as it is padded to the size of a graph; nothing tells them apart.

    So it looks at no id: those of padding may be anything.
    """

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        offered = dict(super().capabilities())
        return offered | {"capture_session": offered["capture_session"] | {"counted_padding"}}

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        class Session(_Buffer):
            def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
                if rows.valid_rows is not None:
                    raise InputError("valid_rows: got a number, want None")
                super().capture(layer_id, ids, rows)

        return Session(spec)


class StoresUnsigned(Innocent, lacks={"capture_store": {"expert_bounds"}}):
    """Ids are kept in 16 bits without a sign, as they come: -1 is 65535, which no expert is."""

    def capture_store(self, spec: CaptureSpec) -> CaptureStore:
        class Store(HostStore):
            def write(self, slots: Sequence[int], rows: Tensor) -> None:
                super().write(slots, torch.where(rows < 0, 2**16 - 1, rows))

        return Store(replace(spec, experts=2**16))


class GathersBeforeItCuts(Innocent):
    """Slices are gathered with the padding behind them, which is cut from each afterwards."""

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        class Session(Capturer):
            def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
                valid, gather = rows.valid_rows, rows.gather
                if rows.kind == "sequence_shard" and valid is not None and gather is not None:
                    padded = gather(ids)
                    slices = padded.unflatten(0, (spec.tp_size, -1))[:, :valid].flatten(0, 1)
                    rows, ids = replace(rows, valid_rows=None, gather=lambda _: slices), ids[:valid]
                super().capture(layer_id, ids, rows)

        return Session(spec)


class FusedParts(Innocent):
    """All experts of a layer are one parameter, w13 or w2; a tensor is a part of it."""

    def remap(self, config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str | Target, ...]]:  # type: ignore[override]
        mapped = super().remap(config, names)
        return {name: tuple(dict.fromkeys(map(self.fused, targets))) for name, targets in mapped.items()}

    def fused(self, target: str) -> str | Target:
        if not (found := re.fullmatch(r"(layers\.\d+\.experts)\.(\d+)\.(\w+)_proj\.(\w+)", target)):
            return target
        owner, expert, part, suffix = found.groups()
        return self.place(f"{owner}.{'w2' if part == 'down' else 'w13'}_{suffix}", int(expert), part)

    def place(self, parameter: str, expert: int, part: str) -> str | Target:
        return Target(parameter, expert, part)


class FusedNames(FusedParts):
    """The same, and each tensor has the parameter's name."""

    def place(self, parameter: str, expert: int, part: str) -> str | Target:
        return parameter


class FusedByExpert(FusedParts):
    """Gate and up of one expert are one parameter."""

    def place(self, parameter: str, expert: int, part: str) -> str | Target:
        owner, _, name = parameter.rpartition(".")
        return f"{owner}.{expert}.{name}"


@dataclass(frozen=True)
class Accused:
    """engine, and the (case id, check) of a clause that could accuse it; verdict: what it gets there instead."""

    engine: type[Reference]
    clause: str
    cleared_by: tuple[str, str]
    verdict: Verdict = Verdict.PASS


_SHOULD = Verdict.BROKEN_SHOULD
_LAYERS = "a_config_says_how_its_layers_compute"
_SHARED = "two_tensors_never_share_a_target"
_TWICE = "mapping_twice_equals_mapping_once"
_BROKEN = "a_broken_checkpoint_is_refused"
_DENSE = "layers_that_route_nothing_disturb_no_other"
_OWN = "stored_weights_take_their_own_scales"
_METHOD = "ids_and_weights_are_those_of_the_method"
_PADDING = "padding_rows_change_no_token"
_CUT = "padding_never_reaches_the_output"
_GIVEN = "experts_are_given_the_rows_that_chose_them"
_OWN_TOKENS = "each_rank_gets_its_own_tokens_sums"
_PLAIN = "remap-gemma4-plain-every-suffix"

ACCUSED = tuple(
    Accused(engine, clause, (case, check), verdict)
    for engine, clause, case, check, verdict in (
        (SizesOfEachLayer, "describe.resolve", "config-qwen3-moe", "a_config_says_what_the_model_is", Verdict.PASS),
        (ReadsWhatIsPublished, "describe.layers", "config-layers-deepseek-v3-hub", _LAYERS, Verdict.PASS),
        (ActivationBuiltIn, "describe.layers", "config-layers-mixtral-published", _LAYERS, Verdict.PASS),
        (ActivationBuiltIn, "describe.layers", "config-layers-mixtral", _LAYERS, _SHOULD),
        (
            TrueIsOne,
            "config.say-what-is-missing",
            "config-mixtral-boolean-top-k",
            "a_config_without_answer_is_refused_with_the_keys",
            _SHOULD,
        ),
        (
            EveryPairHasAnExpert,
            "replicate.choice",
            "replicate-choice-two-copies",
            "each_pair_goes_to_a_copy_of_its_expert",
            Verdict.PASS,
        ),
        (SendsEveryPair, "exchange.arrivals", "exchange-arrivals-dropped", _GIVEN, Verdict.PASS),
        (SendsEveryPair, "exchange.own-tokens", "exchange-repeated-rows", _OWN_TOKENS, Verdict.PASS),
        (GathersEverything, "exchange.arrivals", "exchange-arrivals", _GIVEN, Verdict.PASS),
        (GathersEverything, "exchange.own-tokens", "exchange-ep3-bf16", _OWN_TOKENS, Verdict.PASS),
        (EveryPairHasAnExpert, "shard.sum", "shard-ep3-scattered", "parts_sum_to_the_layer", Verdict.PASS),
        (
            SumsInAnyOrder,
            "shard.nothing-of-others",
            "shard-nothing-of-others",
            "pairs_of_others_contribute_exactly_zero",
            Verdict.PASS,
        ),
        (SlotsInItsOwnOrder, "routing.method", "route-gemma4-e128-k8-t7-bf16-distinct", _METHOD, Verdict.PASS),
        (SlotsInItsOwnOrder, "route.padding-rows", "route-renorm-padding-rows", _PADDING, Verdict.PASS),
        (
            NeverOnMeta,
            "router-module.current-values",
            "closure-gemma4-proj-from-meta",
            "routing_uses_the_values_at_call_time",
            Verdict.UNSUPPORTED,
        ),
        (HasNoScale, "layer.cut-before-add", "layer-narrow-shared-latent-padded-hidden", _CUT, Verdict.PASS),
        (
            ScalesAfterTheExperts,
            "block.routing",
            "family-deepseek-v3-route",
            "a_block_routes_as_its_model_does",
            Verdict.PASS,
        ),
        (
            AddsInAnyOrder,
            "calls.same-result",
            "experts-after-others",
            "another_call_between_leaves_no_trace",
            Verdict.PASS,
        ),
        (DequantisesIntoTheDtypeOfX, "experts.stored-weights", "experts-stored-int8-channel-fp16", _OWN, Verdict.PASS),
        (ScalesTheSums, "experts.stored-weights", "experts-stored-int8-channel-fp16", _OWN, Verdict.PASS),
        (
            ScalesTheSums,
            "experts.quantised-activations",
            "experts-stored-fp8-channel-token",
            "activations_are_quantised_by_their_own_scales",
            Verdict.PASS,
        ),
        (
            MergesAdapters,
            "experts.adapters",
            "experts-lora-fp16",
            "tokens_have_the_update_of_their_own_adapter",
            Verdict.PASS,
        ),
        (OneLayout, "capture.only-real-rows", "capture-steps-shrink", "each_step_shows_its_own_rows", Verdict.PASS),
        (PlainBuffer, "capture.layers", "capture-dense-between", _DENSE, Verdict.PASS),
        (
            PlainBuffer,
            "capture.bounds",
            "capture-expert-two-to-8",
            "expert_ids_that_do_not_fit_are_refused",
            Verdict.PASS,
        ),
        (
            CountsPadding,
            "capture.own-rows",
            "capture-concatenated-padding-rows-legal",
            "every_rank_records_its_own_rows",
            Verdict.PASS,
        ),
        (
            CountsPadding,
            "capture.refuse-count",
            "capture-sequence-gathered-wrong-valid-count",
            "wrong_row_counts_are_refused_by_number",
            Verdict.PASS,
        ),
        (
            StoresUnsigned,
            "capture.narrow",
            "store-minus-one-e128",
            "no_expert_survives_the_store_beside_every_id",
            Verdict.PASS,
        ),
        (
            GathersBeforeItCuts,
            "capture.own-rows",
            "capture-sequence-shard-padding-rows-legal",
            "every_rank_records_its_own_rows",
            Verdict.PASS,
        ),
        (FusedParts, "remap.one-target", _PLAIN, _SHARED, Verdict.PASS),
        (FusedParts, "remap.idempotent", "remap-gemma4-twice-plain", _TWICE, Verdict.PASS),
        (FusedNames, "remap.one-target", _PLAIN, _SHARED, Verdict.PASS),
        (FusedNames, "remap.idempotent", "remap-gemma4-twice-plain", _TWICE, Verdict.PASS),
        (FusedByExpert, "remap.one-target", _PLAIN, _SHARED, Verdict.PASS),
        (UnknownTensorsSkipped, "load.refuse-broken", "load-gemma4-packed-unknown-tensor", _BROKEN, _SHOULD),
        (ExtraExpertIgnored, "load.refuse-broken", "load-gemma4-plain-extra-expert", _BROKEN, _SHOULD),
    )
)
