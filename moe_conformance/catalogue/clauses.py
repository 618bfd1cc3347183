"""The contract, clause by clause: what an engine must do, and what its breach has cost others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["MUST", "SHOULD"]


@dataclass(frozen=True)
class Clause:
    """text: a full sentence with "must" or "should". upstream: public threads where an engine broke it. origin: where
    it comes from else.

    level: MUST for a wrong result, a crash, a model that does not load; SHOULD for leniency. A broken SHOULD is a
    verdict of its own, which fails a run only with --strict.
    """

    bug_class: str
    text: str
    upstream: tuple[str, ...] = ()
    level: Level = "MUST"
    origin: str = ""


CLAUSES: dict[str, Clause] = {
    "describe.resolve": Clause(
        "config-keys",
        "An engine must find experts, top-k, MoE layers, shared experts, latent size and widths under every name "
        "and nesting that a model family uses.",
        ("vllm#41401", "transformers#45279", "Automodel#1361"),
    ),
    "describe.layers": Clause(
        "config-keys",
        "An engine must find in a config how its MoE layers compute: by the keys that the model reads, under their "
        "names and with their defaults, each layer its own values; a key that the model never reads changes nothing.",
        ("vllm#42855", "sglang#39939", "vllm#24119"),
    ),
    "capture-shape.both-sides": Clause(
        "config-keys",
        "The worker that records routed experts and the reader that serves them must take the same sizes from the "
        "same config.",
        ("vllm#41401",),
    ),
    "config.say-what-is-missing": Clause(
        "config-keys",
        "Where an engine judges configs: one that lacks a key or contradicts itself must be refused with an error that "
        "names every key looked for.",
        ("vllm#41401",),
    ),
    "config.refuse-dense": Clause(
        "config-keys",
        "A dense model must be refused by name before anything of it is loaded.",
        ("vllm#41401",),
    ),
    "router-module.current-values": Clause(
        "closure-capture",
        "A router must use the parameter values its module has at call time, however they got there.",
        ("vllm#42250", "sglang#26717"),
    ),
    "update.current-values": Clause(
        "closure-capture",
        "A block that runs must compute with the weights that were pushed last, whatever was made of earlier ones.",
        ("vllm#42821", "vllm#17915", "sglang#26717"),
    ),
    "update.parts": Clause(
        "weight-coverage",
        "A push of some tensors must change those and no others, however many calls it comes in.",
        ("SkyRL#1680",),
    ),
    "remap.one-target": Clause(
        "double-prefix",
        "Every naming style and suffix of one checkpoint tensor must map to one and the same parameter, and two "
        "tensors to the same only as parts of a fused one: gate and up of an expert or of all, or one part of all "
        "experts.",
        ("vllm#41206", "mobius#239", "vllm#31261", "MoE-Infinity#109"),
    ),
    "remap.idempotent": Clause(
        "double-prefix",
        "Mapping a name twice must equal mapping it once.",
        ("vllm#41206",),
    ),
    "load.whole": Clause(
        "double-prefix",
        "A load must write every parameter with the checkpoint's values and consume every key, or say which not.",
        ("vllm#41206", "sglang#29659", "Megatron-Bridge#4706", "Megatron-LM#5844", "vllm#57484"),
    ),
    "load.stored": Clause(
        "quantised-scales",
        "A quantised checkpoint must load with every weight the number that its code, zero point and scales make, in "
        "every published form: by expert, packed, split by a quantiser, or left as it was in part.",
        ("vllm#49638", "sglang#37679", "vllm#54047"),
    ),
    "load.refuse-broken": Clause(
        "weight-coverage",
        "A truncated, mistyped, incomplete or hostile checkpoint must be refused whole, with nothing half-loaded.",
        ("TensorRT-LLM#15154", "imp#1192"),
        origin="tools/fuzz.py, and what mutated files did to the first loaders",
    ),
    "capture.own-rows": Clause(
        "dp-assertions",
        "A capturer must record, for each token this rank owns, the ids routed for that token, whichever row layout "
        "arrives.",
        ("vllm#37879", "vllm#43737"),
    ),
    "capture.refuse-count": Clause(
        "dp-assertions",
        "A row count that fits no layout must raise, and leave the record as it was.",
        ("vllm#37879",),
    ),
    "capture.name-counts": Clause(
        "dp-assertions",
        "The error for a row count that fits no layout should name what came and what was expected.",
        ("vllm#37879",),
        "SHOULD",
    ),
    "capture.only-real-rows": Clause(
        "capture-replay",
        "Padding rows, another rank's rows and rows of an earlier step must never be readable.",
        ("SkyRL#1908", "sglang#23885", "vllm#48622"),
    ),
    "capture.layers": Clause(
        "capture-replay",
        "Each layer's ids must be read at that layer, whichever other layers of the model route nothing.",
        origin="models whose dense and draft layers lie between those with experts",
    ),
    "capture.draft": Clause(
        "capture-replay",
        "What a draft model's router captures must leave the target's record as it is, whatever layer ids both have, "
        "however often the draft runs in a step, and whichever capturer was made or closed first.",
        ("vllm#48622", "sglang#26980"),
    ),
    "capture.logical": Clause(
        "eplb",
        "Where experts have copies or have moved, the ids that are recorded must be those of experts, by the table "
        "that this layer has at this step.",
        ("vllm#33013", "vllm-ascend#13882", "sglang#25285"),
    ),
    "capture.bounds": Clause(
        "capture-replay",
        "Layer ids out of range, and expert ids that do not fit, must be rejected and must change nothing.",
        origin="findings/vllm_capture_ids.py",
    ),
    "capture.narrow": Clause(
        "capture-replay",
        "Every legal expert id must survive the dtype it is stored in.",
        origin="findings/vllm_capture_ids.py",
    ),
    "capture.other-process": Clause(
        "capture-replay",
        "A reader in another process must get each token's own rows, and shared memory must not outlive its owner.",
        ("vllm#39568",),
    ),
    "layer.cut-before-add": Clause(
        "shape-mismatch",
        "A padded hidden or intermediate dim must be cut before anything of the unpadded width is added or "
        "projected, and nothing in the padding may reach the result.",
        ("vllm#40794", "vllm#40865", "tokenspeed#1322", "aiter#5413"),
    ),
    "layer.sum": Clause(
        "combine-algebra",
        "Routed sum, output scale, latent projections and shared experts must each enter a layer's output once, in "
        "their place, and the shared experts must read the layer's own input.",
        ("vllm#28939", "sglang#35152", "vllm#24119"),
    ),
    "layer.stored-experts": Clause(
        "combine-algebra",
        "What stands around experts must be the same whatever form their weights are stored in: router, limits, scale, "
        "latent projections, padding, shared experts.",
        ("FastDeploy#4449", "vllm#32437", "tokenspeed#1630"),
    ),
    "layer.traceable": Clause(
        "shape-mismatch",
        "Where a layer can be traced: shapes must hold under fake tensors and under torch.compile(fullgraph=True).",
        ("vllm#40794", "vllm#41646"),
    ),
    "routing.method": Clause(
        "routing-semantics",
        "A router must select and weigh exactly by the model's method: order of score, top-k, renormalisation, scale.",
        ("transformers#39581", "PaddleFormers#3452", "megablocks#87"),
    ),
    "routing.precision": Clause(
        "router-precision",
        "Logits, scores, selection and weights must be computed in float32 where the model does, and never narrower "
        "than they are stored, for one token as for many.",
        ("torchtitan#2389", "vllm-ascend#9617"),
    ),
    "route.fused-shared": Clause(
        "shared-experts",
        "Shared experts that are further slots of a routing must stand behind the chosen experts and oust none of "
        "them, each once in every row, with the weight that their rule gives.",
        ("sglang#31475", "sglang#8125"),
    ),
    "route.padding-rows": Clause(
        "token-padding",
        "Where an engine takes rows of padding: those behind the valid ones must not change a bit of a valid row, "
        "whatever they hold.",
        ("SkyRL#1908",),
    ),
    "route.unique-ids": Clause(
        "ties-nan-duplicates",
        "Expert ids must be unique and in range for any row, ties, NaN and infinities included, the same every run.",
        ("vllm#39391", "sglang#30079"),
    ),
    "align.whole-blocks": Clause(
        "permutation",
        "Every pair that names an expert of this rank must stand in exactly one slot, in a block of that expert, and "
        "each expert must have as many blocks as its pairs fill.",
        ("Triton-distributed#181", "TileOPs#640", "vllm-xpu-kernels#453"),
    ),
    "align.no-expert": Clause(
        "permutation",
        "A pair whose id is -1 or another rank's must have no slot; an id out of range must raise or be treated so, "
        "and never wrap to an expert.",
        ("TransformerEngine#2907", "aiter#4839", "vllm#50845"),
    ),
    "align.ids-alone": Clause(
        "permutation",
        "Which pairs an expert gets must follow from their ids alone, not from their place in the batch or from "
        "earlier calls.",
        ("TileOPs#640",),
    ),
    "expert-map.one-place": Clause(
        "expert-map",
        "Every expert must lie on exactly one rank, local ids must count up from 0 in the order of global ids, and no "
        "rank may hold two experts more than another.",
        ("vllm#21497",),
    ),
    "shard.sum": Clause(
        "expert-map",
        "The parts of all ranks must sum to the unsharded layer, whichever experts, and what slice of them, each has.",
        ("vllm-gaudi#1796", "transformers#45473", "transformers#46818"),
    ),
    "shard.nothing-of-others": Clause(
        "expert-map",
        "A pair whose id is -1 or another rank's must contribute exactly zero, whatever its weight.",
        ("vllm#46408", "vllm#48371", "sglang#30387"),
    ),
    "shard.out-of-range": Clause(
        "expert-map",
        "Where an engine checks ids: one out of range must raise or contribute zero; it must never wrap to an expert.",
        ("vllm#46408", "flashinfer#1469"),
    ),
    "exchange.own-tokens": Clause(
        "expert-map",
        "Every rank must get the routed sums of its own tokens, in their order, by its own ids and weights, wherever "
        "the experts lie and whichever are chosen.",
        ("vllm#52639", "torchtitan#1237"),
    ),
    "exchange.counts": Clause(
        "dp-assertions",
        "Ranks that compute together may have any numbers of tokens, none included: each must get its own rows, and "
        "serve the others' whether it has any or not.",
        ("Megatron-LM#1877", "vllm#38999", "vllm#51984", "sgl-kernel-npu#69"),
    ),
    "exchange.no-expert": Clause(
        "expert-map",
        "A pair whose id is -1 must be sent to no expert and add exactly nothing, whatever its weight.",
        ("vllm#46408", "vllm#48371"),
    ),
    "exchange.arrivals": Clause(
        "permutation",
        "What a rank's experts are given must be the rows of the tokens that chose them, of all ranks and bit for bit, "
        "each once under that expert's local id, and nothing else.",
        ("torchtitan#1237", "vllm#52639"),
    ),
    "exchange.shared": Clause(
        "shared-experts",
        "The shared expert's output must be in each token's row once, however many ranks compute it.",
        ("sglang#35535", "sglang#9101"),
    ),
    "experts.function": Clause(
        "activation",
        "Experts must compute the activation, clamps, biases, norm and layout of gate and up that their spec names, "
        "whatever the proportions of their matrices.",
        ("vllm#42855", "sglang#39939", "vllm#51125", "vllm#49096", "sglang#40438", "vllm#14024"),
    ),
    "experts.combine": Clause(
        "combine-algebra",
        "A token's output must be the sum of its experts' outputs, each times its own weight, times the output scale, "
        "each applied once.",
        ("vllm#24119", "vllm#45037", "Automodel#2591", "sglang#12998", "vllm#43694"),
    ),
    "experts.no-expert": Clause(
        "expert-map",
        "A pair whose id is -1, or whose expert another rank has, must add exactly nothing, whatever its weight and "
        "its token hold.",
        ("vllm#46408", "vllm#48371", "sglang#30387", "vllm-gaudi#1796", "vllm#57946"),
    ),
    "experts.stored-weights": Clause(
        "quantised-scales",
        "A stored weight must be read with the scale, zero point and global scale of its own tile, group, row, half "
        "and expert, also where the last tile or group is cut.",
        ("vllm#54974", "sglang#37759", "sglang#38573", "Model-Optimizer#1411"),
    ),
    "experts.quantised-activations": Clause(
        "quantised-scales",
        "Where activations are quantised, what enters either projection must be rounded by the scale of its own row, "
        "group or expert, and multiplied back by the same.",
        ("auto-round#1216", "vllm#26135"),
    ),
    "experts.adapters": Clause(
        "expert-lora",
        "Each token must have the update of its own adapter at each of its experts, scaled once by alpha over the "
        "rank or its root; a token without an adapter, and an expert without an update, must have what the weights "
        "alone give.",
        ("vllm#42120", "vllm#55545", "sglang#24171", "unsloth-zoo#1269"),
    ),
    "experts.out-of-range": Clause(
        "expert-map",
        "Where an engine checks ids: one out of range must raise or add nothing; it must never wrap to an expert.",
        ("vllm#46408", "flashinfer#1469"),
    ),
    "inputs.strides": Clause(
        "dtype-stride-arguments",
        "Whatever strides and offset a tensor has must be honoured or refused: columns of wider rows, a transpose, "
        "rows of stride 0, memory that begins elsewhere.",
        ("Liger-Kernel#1377", "vllm#28841", "torchtitan#3771", "vllm#43190"),
    ),
    "inputs.dtypes": Clause(
        "dtype-stride-arguments",
        "Each dtype of ids and of routing weights must be honoured or refused, beside every dtype of x.",
        ("aiter#5255", "vllm#20166", "vllm#26162", "sglang#25380"),
    ),
    "matrices.orientation": Clause(
        "weight-orientation",
        "Which dim of a matrix is which must follow from what is declared, never from its shape: 2F = D, F = D, E = D, "
        "2F < D, F > D.",
        ("torchtitan#4373", "vllm#47874", "transformers#46818"),
    ),
    "rows.padding": Clause(
        "token-padding",
        "Rows of padding must not change a bit of a token's row, whatever they hold: numbers of any size, NaN, "
        "infinities; nor its value, whichever experts they name.",
        ("vllm#37442", "sglang#10414", "torchtitan#3193"),
    ),
    "calls.inputs-unchanged": Clause(
        "aliasing-compile",
        "A call must leave every tensor that it is given as it was.",
        ("vllm-musa#56",),
    ),
    "outputs.own-memory": Clause(
        "aliasing-compile",
        "What a call returns must be its caller's: no memory of an input, of another output, or of what a later call "
        "returns.",
        ("vllm-musa#56",),
    ),
    "layer.fake-dtypes": Clause(
        "aliasing-compile",
        "Where a layer can be traced: under fake tensors its output must have the shape, dtype and strides of a real "
        "one, in every dtype, and memory of its own.",
        ("vllm#41646", "vllm-ascend#16550"),
    ),
    "inputs.beyond-int32": Clause(
        "index-width",
        "Elements further apart than 2^31 must be addressed as they lie.",
        ("flashinfer#2642", "flashinfer#2853", "vllm#6029", "TensorRT-LLM#15887"),
    ),
    "batches.any-size": Clause(
        "chunking",
        "However many tokens there are, and pairs of one expert, and however they are cut into chunks and tiles: each "
        "token's result must be its own.",
        ("vllm#20392", "sglang#3679", "vllm#21963", "Megatron-LM#4481"),
    ),
    "outputs.written": Clause(
        "unwritten-output",
        "Every element of every output must be written, whatever fresh memory holds: rows without an expert, ranks and "
        "experts without a token, ends that fill no tile, no tokens at all.",
        ("vllm#39510", "flashinfer#3840", "FastDeploy#4102", "sglang#40187", "TransformerEngine#2821"),
    ),
    "calls.same-result": Clause(
        "determinism-state",
        "A call must give the result of its arguments, whatever was called before: other shapes, other dtypes, another "
        "layer of the same shape, nothing at all.",
        ("TileOPs#640", "vllm#20392"),
    ),
    "calls.same-bits": Clause(
        "determinism-state",
        "The same call again should give the same bits.",
        ("vllm#45683",),
        "SHOULD",
    ),
    "rows.batch-invariant": Clause(
        "batch-invariance",
        "A token's row should have the same bits whatever rows are beside it, in whatever order.",
        ("vllm#57016", "sglang#17424"),
        "SHOULD",
    ),
    "shard.same-output": Clause(
        "eplb",
        "Redundant experts, and moving them, must leave the output unchanged.",
        ("vllm-ascend#5311",),
    ),
    "replicate.choice": Clause(
        "eplb",
        "Each pair must go to a copy of the expert that the router chose, and a pair without expert to none.",
        ("vllm-ascend#5311",),
    ),
    "replicate.load": Clause(
        "eplb",
        "Load must count each real pair once, by logical expert.",
        ("vllm#22167", "vllm#38128"),
    ),
    "shard.shared": Clause(
        "shared-experts",
        "The shared expert's output must be in the sum over ranks once, however many ranks there are.",
        ("sglang#31475", "TensorRT-LLM#15922"),
    ),
    "block.routing": Clause(
        "routing-semantics",
        "Every family's router must choose by its own scores, bias and groups, and weigh by its own normalisation and "
        "scale; a selection bias must never enter a weight.",
        ("transformers#39581", "PaddleFormers#3452", "vllm#58076"),
    ),
    "block.combine": Clause(
        "combine-algebra",
        "Routing weights, scales, biases, norms and projections must each be applied exactly once, in their place.",
        ("sglang#31017", "sglang-jax#1282", "vllm#24119", "vllm#45037", "Automodel#2591"),
    ),
    "block.activation": Clause(
        "activation",
        "Experts must compute the activation, clamps and layout of gate and up that the config names, whichever way "
        "their products are computed.",
        ("vllm#42855", "sglang#39939", "tokenspeed#1647", "vllm#51125", "vllm#49096"),
    ),
    "block.dropped": Clause(
        "expert-map",
        "Where an engine takes pairs without an expert: they must contribute exactly zero.",
        ("vllm#46408", "vllm#48371"),
    ),
    "block.no-expert": Clause(
        "expert-map",
        "Where an engine checks ids: one that names no expert must raise or contribute nothing; it must never be taken "
        "for another expert's.",
        ("vllm#46408", "vllm#48371"),
    ),
    "generate.tokens": Clause(
        "determinism-state",
        "A running engine must give each request the tokens that the model gives without any cache, whatever was "
        "served before or beside it, and however its steps are cut.",
        ("vllm#20392", "sglang#3679"),
    ),
    "generate.routed": Clause(
        "capture-replay",
        "The routed experts returned with a request must be those of its own tokens, one row each in their order, the "
        "last token's left out.",
        ("vllm#37879", "vllm#43737"),
    ),
    "block.shared": Clause(
        "shared-experts",
        "What every token passes must be added to the routed sum once, whatever the routing weights are.",
        ("sglang#31475", "TensorRT-LLM#15922"),
    ),
}

BUG_CLASSES = tuple(dict.fromkeys(clause.bug_class for clause in CLAUSES.values()))
