"""The optional features of each stage: one table, from which documentation, validation and the needs of cases come.

A feature is something that engines legitimately differ in offering. What every engine must do is a clause, and cannot
be declined here. `needs` computes from a case's recipe which features it takes; nobody writes them by hand.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType
from typing import Any

from moe_conformance.catalogue.aliases import renamed_word
from moe_conformance.model.specs import LayerSpec, LogitsSpec, MLPSpec, RoutingSpec
from moe_conformance.model.storage import QuantSpec
from moe_conformance.protocol.stages import STAGES


@dataclass(frozen=True)
class Feature:
    """word: what `capabilities()` declares; a word in capitals stands for a set of words. meaning: of declaring it.

    without: what is not judged where it is not declared.
    """

    stages: tuple[str, ...]
    word: str
    meaning: str
    without: str


_ROUTES = ("route", "router_module", "layer")
_EXPERTS = ("experts", "layer", "shard")


def _routing(word: str, meaning: str) -> Feature:
    return Feature(_ROUTES, word, meaning, "models that route so")


FEATURES: tuple[Feature, ...] = (
    Feature(("describe",), "refusals", "a config that lacks a key or contradicts itself is refused", "such configs"),
    Feature(("describe",), "layers", "MoESpec.layers says what each MoE layer computes", "what layers compute"),
    Feature(("capture_shape",), "worker", "sizes as the recording side takes them", "that side"),
    Feature(("capture_shape",), "reader", "sizes as the serving side takes them", "that side"),
    # How scores are made, chosen among and weighed: a word for each field of RoutingSpec, where it acts.
    _routing("softmax", "scores are a softmax of the logits"),
    _routing("sigmoid", "scores are sigmoids"),
    _routing("sqrt_softplus", "scores are square roots of softplus (DeepSeek-V4)"),
    _routing("score_of_chosen", "experts are chosen by logit, and the chosen ones' logits alone are scored"),
    _routing("input_precision", "scores are computed in the logits' dtype, not in float32"),
    _routing("not_renormalized", "weights are scores as they are"),
    _routing("renormalize", "weights are divided by their sum"),
    _routing("renormalize_norm", "weights are divided by another norm than their sum (DBRX)"),
    _routing("selection_bias", "a bias [E] chooses, and never enters a weight"),
    _routing("groups", "only experts of the best groups compete"),
    _routing("group_top2", "a group's score is the sum of its two best (DeepSeek-V3), not its best"),
    _routing("group_mask", "experts of other groups count as a number (0 in DeepSeek-V2), not as minus infinity"),
    _routing("routed_scale", "weights are multiplied by a scaling factor"),
    _routing("per_expert_scale", "each weight is multiplied by its expert's own scale (Gemma 4)"),
    _routing("global_scale", "weights are multiplied by a trained number"),
    _routing("softcap", "logits are capped by tanh"),
    _routing("logit_scale", "logits are multiplied by a number"),
    _routing("sparsemixer", "SparseMixer (PhiMoE)"),
    _routing("table", "experts are looked up by token id (DeepSeek-V4)"),
    _routing("product_keys", "experts are sums of two halves of the logits (Doge)"),
    _routing("identity_experts", "ids beyond E pass their input on (LongCat)"),
    _routing("skip_expert", "the last class is no expert (ZAYA)"),
    _routing("shared_classes", "the router weighs the shared experts, too (Inkling)"),
    _routing("capacity", "an expert takes so many tokens (Switch, NLLB)"),
    Feature(("route",), "padding_rows", "rows behind the valid ones are padding", "batches with padding rows"),
    Feature(("route",), "fused_shared", "shared experts are further slots", "such answers"),
    Feature(("router_module",), "gemma4_input", "the router normalises and scales its input (Gemma 4)", "such routers"),
    Feature(("router_module",), "zaya_input", "the router is an MLP (ZAYA)", "such routers"),
    Feature(("router_module",), "proj_bias", "the projection has a bias", "such routers"),
    Feature(("router_module",), "float32_logits", "logits are computed in float32", "such routers in other dtypes"),
    Feature(
        ("router_module",),
        "from_meta",
        "the module may be moved to the meta device and filled again",
        "values that reach the module so",
    ),
    Feature(("align", "experts"), "expert_map", "experts of other ranks, by a map of ids", "such calls"),
    Feature(
        ("align", "experts", "block", "replicate", "shard", "exchange"),
        "dropped_ids",
        "pairs without an expert",
        "batches with such pairs",
    ),
    Feature(
        ("align", "experts", "block", "capture_session", "capture_store", "shard"),
        "expert_bounds",
        "ids that name no expert are checked, and refused or ignored; an engine may trust its own router instead",
        "ids outside [0, E)",
    ),
    Feature(("exchange",), "one_process", "one process may play all ranks", "ranks in one process"),
    Feature(("exchange",), "processes", "each rank may be a process of its own", "ranks in processes"),
    Feature(("exchange",), "uneven_counts", "ranks may have different numbers of tokens, also none", "such batches"),
    Feature(
        ("exchange",), "any_placement", "experts lie on any rank; otherwise in equal runs, in rank order", "other maps"
    ),
    Feature(("exchange",), "arrivals", "the rows that came to a rank are returned", "what travels"),
    *(
        Feature(_EXPERTS, word, f"experts compute {meaning}", "such experts")
        for word, meaning in (
            ("gelu", "gelu, exact"),
            ("gelu_tanh", "gelu in its tanh form"),
            ("relu", "relu"),
            ("relu2", "the square of relu"),
            ("clamp", "gate and up clamped or capped (gpt-oss, DeepSeek-V4)"),
            ("swiglu_oai", "silu with alpha, and an offset of up (gpt-oss)"),
            ("not_gated", "one projection without a gate"),
            ("bias", "biases of both projections"),
            ("weight_on_input", "weights that multiply the expert's input (Llama 4)"),
            ("output_norm", "a norm of each expert's output (MuseSpark)"),
        )
    ),
    Feature(_EXPERTS, "output_scale", "the routed sum is multiplied by a number", "layers that have one"),
    Feature(
        ("experts", "shard"), "identity_experts", "ids beyond E pass their input on (LongCat)", "models that have them"
    ),
    *(
        Feature(("experts", "layer"), f"quantised:{name}", f"weights stored as {name}", "such weights")
        for name in ("fp8_e4m3", "int8", "int4", "mxfp4", "nvfp4")
    ),
    *(
        Feature(("load",), f"quantised:{name}", f"checkpoints of {name} weights are read", "such checkpoints")
        for name in ("fp8_e4m3", "int8", "int4", "mxfp4", "nvfp4", "nf4")
    ),
    Feature(("experts", "layer"), "quantised_activations", "activations are quantised, too", "such layers"),
    Feature(("experts",), "lora", "LoRA adapters of experts", "such calls"),
    Feature(
        ("experts", "layer", "shard", "block"),
        "same_bits",
        "a call repeated gives the same bits; an engine that sums with atomics gives the same within rounding",
        "equal bits; results are compared within the error bound instead",
    ),
    Feature(
        ("route", "experts", "layer"),
        "batch_invariant",
        "a row has the same bits whatever rows are beside it; most engines choose a kernel by the number of rows",
        "bits of a row in other batches",
    ),
    Feature(("layer", "shard", "exchange"), "shared", "a shared expert", "layers that have one"),
    Feature(
        ("layer",), "shared_gate", "a gate multiplies the shared expert's output (Qwen2-MoE)", "layers that have one"
    ),
    Feature(("layer",), "shared_average", "routed and shared sums are averaged (Cohere2-MoE)", "layers that do"),
    Feature(("layer",), "latent", "experts work in a latent width (Nemotron-H)", "layers that do"),
    Feature(("layer",), "latent_norm", "what enters them is normalised there (MuseSpark)", "layers that do"),
    Feature(("layer",), "latent_bias", "both projections have biases (Nemotron-H)", "layers that have them"),
    Feature(("layer",), "dense", "a dense MLP beside the experts", "layers that have one"),
    Feature(("layer",), "padded_hidden", "the expert kernel runs at a wider hidden dim", "such kernels"),
    Feature(("layer",), "padded_intermediate", "the expert kernel runs at a wider intermediate dim", "such kernels"),
    Feature(("layer",), "traceable", "`layer` can be traced; one that builds modules cannot", "fake tensors, compile"),
    Feature(("block", "remap", "load", "update", "generate"), "MODEL_TYPE", "models of this type", "this model"),
    Feature(("block",), "implementation:NAME", "NAME computes the experts where it is asked for", "this way"),
    *(
        Feature(("capture_session",), word, f"ids come as {meaning}", "this layout")
        for word, meaning in (
            ("concatenated", "all data-parallel ranks' rows in rank order"),
            ("local", "this rank's rows"),
            ("sequence_shard", "a tensor-parallel rank's slice of the local rows"),
            ("sequence_gathered", "every rank's slices with their padding"),
        )
    ),
    Feature(("capture_session",), "physical_ids", "ids come as those of copies (EPLB) with a table", "such ids"),
    Feature(("capture_session",), "padding_rows", "rows behind the valid ones are padding", "such batches"),
    Feature(
        ("capture_session",),
        "counted_padding",
        "padding rows lie behind each rank's own and count among its tokens; fewer are read than were counted",
        "batches padded rank by rank; those with all padding behind all valid rows are judged instead",
    ),
    Feature(
        ("capture_session", "capture_store"),
        "unwritten",
        "what was not captured reads as -1, or as that in unsigned bits where no expert has that id, or raises",
        "what is read there",
    ),
    Feature(("expert_map",), "contiguous", "each rank has a run of ids", "this placement"),
    Feature(("expert_map",), "round_robin", "rank r has the ids that are r modulo the ranks", "this placement"),
    Feature(("expert_map", "shard", "exchange"), "idle_ranks", "a rank may have no expert", "such ranks"),
    Feature(("shard",), "tensor_parallel", "ranks divide the experts' width", "such ranks"),
    Feature(("update",), "parts", "a push may hold some of a block's tensors", "such pushes"),
    Feature(("update",), "other_dtype", "a push may come in another dtype than the block's", "such pushes"),
    Feature(("update",), "replaced", "tensors may take the place of those that are there", "such pushes"),
    Feature(("generate",), "ranks", "several processes divide the model (tensor parallelism)", "such processes"),
    Feature(("generate",), "answers_each", "a request is answered more than once", "such requests"),
    Feature(("generate",), "preemption", "the cache is limited, and requests are interrupted", "such interruptions"),
    Feature(("generate",), "withdrawn", "requests may be withdrawn while others run", "such requests"),
    Feature(("generate",), "bfloat16", "the model computes in bfloat16", "models in bfloat16"),
    Feature(("shard",), "uneven_width", "a width that the ranks do not divide evenly", "such widths"),
    Feature(("shard",), "replicas", "several copies of an expert", "such layers"),
    Feature(("generate",), "routed_experts", "the experts of each token are returned", "what is returned of them"),
    Feature(("generate",), "step_tokens", "a step takes a limited number of tokens", "prompts that are split"),
    Feature(("generate",), "prefix_cache", "requests with a common prefix share its cache", "such requests"),
    *(
        Feature(("remap", "load"), word, f"checkpoints that name tensors {meaning}", "such checkpoints")
        for word, meaning in (
            ("plain", "by expert, below the layer"),
            ("moe", "by expert, below `moe`"),
            ("packed", "with all experts in one"),
            ("multimodal", "behind a multimodal prefix"),
        )
    ),
)


@cache
def words(stage: str) -> Mapping[str, Feature]:
    """The features of a stage by word; capitals stand for further words (see `is_known`)."""
    return MappingProxyType({feature.word: feature for feature in FEATURES if stage in feature.stages})


def feature(stage: str, word: str) -> Feature:
    """The entry of a word that the stage has."""
    if word in words(stage):
        return words(stage)[word]
    return words(stage)["implementation:NAME" if word.startswith("implementation:") else "MODEL_TYPE"]


def is_known(stage: str, word: str) -> bool:
    """Whether a stage has a feature of this word."""
    if stage == "block" and word.startswith("implementation:"):
        return not word.endswith((":", ":NAME"))
    return word in _spelled_out(stage)


def complaints(capabilities: object) -> list[str]:
    """What is wrong with an adapter's capabilities, each with the near match; empty where nothing is."""
    if not isinstance(capabilities, Mapping):
        return [f"capabilities: got {type(capabilities).__name__}, want a mapping of stage to a set of features"]
    found = []
    for stage, declared in capabilities.items():
        if stage not in STAGES:
            found.append(f"capabilities: got stage {stage!r}, want one of {', '.join(STAGES)}{near(stage, STAGES)}")
        elif isinstance(declared, (str, Mapping)) or not isinstance(declared, Collection):
            found.append(f"capabilities[{stage!r}]: got {declared!r}, want a set of words, frozenset() for none")
        else:
            strangers = sorted(str(word) for word in declared if not is_known(stage, str(word)))
            found += [renamed_word(stage, word) or unknown(stage, word) for word in strangers]
    return found


def absent_complaints(absent: object, capabilities: Mapping[str, Collection[str]]) -> list[str]:
    """The same of what an adapter says that its engine has nothing of: `Engine.absent`."""
    if not isinstance(absent, Mapping) or not all(isinstance(said, Mapping) for said in absent.values()):
        return [f"absent: got {absent!r:.200}, want a mapping of stage to a mapping of feature to reason"]
    found = complaints({stage: list(said) for stage, said in absent.items()})
    for stage, said in absent.items():
        for word, reason in said.items():
            if word in capabilities.get(stage, ()):
                found.append(f"absent[{stage!r}]: got {word!r}, which capabilities() declares; take it out of one")
            if not isinstance(reason, str) or not reason:
                found.append(f"absent[{stage!r}][{word!r}]: got {reason!r}, want the reason")
    return found


def unknown(stage: str, word: str) -> str:
    """The message for a feature that a stage does not have."""
    there = sorted(words(stage))
    return f"{stage}: got feature {word!r}, want one of {', '.join(there) or 'none'}{near(word, _spelled_out(stage))}"


@cache
def _spelled_out(stage: str) -> tuple[str, ...]:
    """The words of a stage, and in place of one in capitals those that it stands for."""
    from moe_conformance.model.families.families import RECORDS

    return (*(word for word in words(stage) if word.islower()), *(RECORDS if "MODEL_TYPE" in words(stage) else ()))


def near(word: object, there: Iterable[str]) -> str:
    """The end of a message about an unknown word: the most similar one there is, if any is similar."""
    found = get_close_matches(str(word), list(there), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def of_routing(spec: RoutingSpec) -> set[str]:
    """The features that a routing method takes."""
    renormalize = {"no": "not_renormalized", "sum": "renormalize", "norm": "renormalize_norm"}
    conditions = {
        spec.score: spec.selector in ("topk", "table"),
        "score_of_chosen": spec.select_on == "logits" and spec.selector == "topk" and not spec.shared_classes,
        "input_precision": spec.score_dtype == "input",
        "selection_bias": spec.selection_bias,
        "groups": spec.groups > 1,
        "group_top2": spec.groups > 1 and spec.group_score == "top2_sum",
        "group_mask": spec.groups > 1 and spec.group_mask != float("-inf"),
        "routed_scale": spec.scale != 1,
        "per_expert_scale": spec.per_expert_scale,
        "global_scale": spec.global_scale,
        "softcap": bool(spec.logit_softcap),
        "logit_scale": spec.logit_scale != 1,
        "identity_experts": bool(spec.identity_experts),
        "skip_expert": spec.skip_expert,
        "shared_classes": bool(spec.shared_classes),
        "capacity": spec.capacity is not None,
    }
    found = {word for word, taken in conditions.items() if taken}
    if spec.selector != "topk":
        found.add(spec.selector)
    if spec.selector != "sparsemixer":
        found.add(renormalize.get(spec.renormalize, spec.renormalize))
    return found


def of_mlp(spec: MLPSpec) -> set[str]:
    """The features that an expert's function takes."""
    conditions = {
        spec.activation: spec.activation != "silu",
        "clamp": spec.clamp != "no",
        "swiglu_oai": spec.alpha != 1 or spec.up_offset != 0,
        "not_gated": not spec.gated,
        "bias": spec.bias,
        "weight_on_input": spec.weight_on != "output",
        "output_norm": spec.output_norm != 0,
    }
    return {word for word, taken in conditions.items() if taken}


def of_layer(spec: LayerSpec) -> set[str]:
    """The features that a layer behind its logits takes."""
    conditions = {
        "shared": spec.shared is not None,
        "shared_gate": spec.shared is not None and spec.shared.gate,
        "shared_average": spec.shared is not None and spec.shared.combine == "average",
        "latent": spec.latent is not None,
        "latent_norm": spec.latent is not None and spec.latent.norm_eps != 0,
        "latent_bias": spec.latent is not None and spec.latent.bias,
        "dense": spec.dense is not None,
        "output_scale": spec.output_scale != 1,
    }
    found = {word for word, taken in conditions.items() if taken}
    beside = [part.mlp for part in (spec.shared, spec.dense) if part is not None]
    return found.union(of_routing(spec.routing), *map(of_mlp, (spec.experts, *beside)))


def of_logits(spec: LogitsSpec) -> set[str]:
    """The features that a router's way to logits takes."""
    conditions = {
        "gemma4_input": spec.kind == "gemma4",
        "zaya_input": spec.kind == "zaya",
        "proj_bias": spec.bias,
        "float32_logits": spec.dtype == "float32",
    }
    return {word for word, taken in conditions.items() if taken}


def of_quant(spec: QuantSpec | None) -> set[str]:
    """The features that a stored form of weights takes."""
    if spec is None:
        return set()
    return {f"quantised:{spec.format}"} | ({"quantised_activations"} if spec.activations != "no" else set())


def needs(stage: str, clause: str, recipe: Mapping[str, Any]) -> frozenset[str]:
    """The features that a case of this stage takes, from its clause and the specs and switches in its recipe.

    Specs count by their type, whatever key they stand under, and for what the stage has to do with; of the other keys,
    those listed here. Words that the recipe itself spells are all returned, for `Case` to refuse those unknown.
    """
    if isinstance(recipe.get("needs"), str):
        raise ValueError(f"needs: got {recipe['needs']!r}, want a set of words")
    found: set[str] = set()
    spelled: set[str] = {*_OF_EVERY.get((stage, ""), ()), *_OF_EVERY.get((stage, clause), ())}
    for key, value in recipe.items():
        if isinstance(value, LayerSpec):
            found |= of_layer(value)
        elif isinstance(value, RoutingSpec):
            found |= of_routing(value)
        elif isinstance(value, LogitsSpec) and stage == "router_module":
            found |= of_logits(value)
        elif isinstance(value, MLPSpec):
            found |= of_mlp(value) | ({"shared"} if key == "shared" else set())
        elif isinstance(value, QuantSpec):
            found |= of_quant(value)
        elif key in _SWITCHES:
            found |= _SWITCHES[key](value)
        elif key in _SPELLED:
            spelled |= _SPELLED[key](value)
    # A word that no stage has is a value of a spec that no model has.
    for word in sorted(found - _of_any_stage()):
        raise ValueError(f"specs: got {word!r}, which no stage has a feature for{near(word, _of_any_stage())}")
    return frozenset(spelled | found & words(stage).keys())


@cache
def _of_any_stage() -> frozenset[str]:
    return frozenset(word for stage in STAGES for word in words(stage))


def _if(word: str) -> Any:
    return lambda value: {word} if value else set()


def _of_owners(owners: Sequence[int]) -> set[str]:
    """The features that experts on these ranks take; ranks between may have none."""
    ranks = max(owners) + 1
    in_runs = [expert * ranks // len(owners) for expert in range(len(owners))]
    found = {"expert_map"}
    if len(set(owners)) < ranks:
        found.add("idle_ranks")
    if list(owners) != in_runs or len(owners) % ranks:
        found.add("any_placement")
    return found


# What every case of a stage takes, or every one of a clause of it.
_OF_EVERY: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("block", "block.dropped"): ("dropped_ids",),
    ("block", "block.no-expert"): ("expert_bounds",),
    ("capture_shape", ""): ("worker", "reader"),
    ("describe", "config.say-what-is-missing"): ("refusals",),
    ("describe", "describe.layers"): ("layers",),
    ("exchange", "exchange.arrivals"): ("arrivals",),
    ("layer", "layer.fake-dtypes"): ("traceable",),
    ("layer", "layer.traceable"): ("traceable",),
    ("shard", "shard.out-of-range"): ("dropped_ids",),
    **{(stage, "rows.batch-invariant"): ("batch_invariant",) for stage in ("route", "experts", "layer")},
    **{(stage, "calls.same-bits"): ("same_bits",) for stage in ("experts", "layer", "shard", "block")},
}
# Keys of a recipe that stand for a feature, by stage-independent names.
_SWITCHES: dict[str, Any] = {
    "padded_hidden": _if("padded_hidden"),
    "padded_intermediate": _if("padded_intermediate"),
    "output_scale": lambda value: {"output_scale"} if value != 1 else set(),
    "expert_map": _if("expert_map"),
    "identity_experts": _if("identity_experts"),
    "fused_shared": _if("fused_shared"),
    "padding_rows": _if("padding_rows"),
    "dropped": _if("dropped_ids"),
    "held": lambda value: {"expert_map"} if value is not None else set(),  # a rank may hold none
    "codes": lambda value: {f"quantised:{value}"},
    "lora": _if("lora"),
    "outside": lambda value: {"expert_bounds"},
    "pushes": lambda value: {"parts"} if set(value) - {"all", "first"} else set(),
    "pushed": _if("other_dtype"),
    "replaces": _if("replaced"),
    "routed": _if("routed_experts"),
    "step_tokens": _if("step_tokens"),
    "shares_prefixes": _if("prefix_cache"),
    "answers_each": lambda value: {"answers_each"} if value > 1 else set(),
    "cache_tokens": _if("preemption"),
    "withdrawn": _if("withdrawn"),
    "ranks": lambda value: {"ranks"} if value > 1 else set(),
    "tp": lambda value: {"tensor_parallel"} if value > 1 else set(),
    "copies": _if("replicas"),
    "tables": _if("physical_ids"),
    "change": lambda value: {"from_meta"} if value == "from-meta" else set(),
    "counts": lambda value: {"uneven_counts"} if len(set(value)) > 1 or not all(value) else set(),
    "processes": lambda value: {"processes" if value else "one_process"},
    "owners": lambda value: _of_owners(value) if value else set(),
}
# Keys whose values are features, or are made of them.
_SPELLED: dict[str, Any] = {
    "model_type": lambda value: {value},
    "implementation": lambda value: {f"implementation:{value}"} if value else set(),
    "kind": lambda value: {value},
    "kinds": set,
    "placement": lambda value: {value},
    "style": lambda value: set(value.split("-")),
    "baseline": lambda value: set(value.split("-")) if value else set(),
    "needs": set,  # what no single key says
}
