"""What each word of a recipe means, for whoever reads a case without its suite at hand.

A word means the same in every stage, but for those of _OF_STAGE.
"""

from __future__ import annotations

from collections.abc import Mapping

_WORDS: Mapping[str, str] = {
    "D": "hidden width of a token",
    "E": "number of routed experts",
    "F": "intermediate width of an expert",
    "Fs": "intermediate width of the shared expert",
    "K": "experts chosen for each token (top-k)",
    "T": "number of tokens",
    "absent": "experts that adapters leave as they are",
    "answers_each": "how many answers each request gets",
    "arguments": "how arguments are given: their layout in memory, with poison between the values, or their dtype",
    "baseline": "the naming style whose targets this one must share",
    "between": "the larger call that is made between two calls of this one",
    "block": "slots of a block (BLOCK_SIZE_M)",
    "cache_tokens": "tokens that the cache holds at once, fewer than all requests have at their ends",
    "change": "how new parameter values reach the module that is already built",
    "class": "config class of transformers that is built from the keys; without one they are a plain config.json",
    "codes": "format of the weights in the checkpoint",
    "copies": "the logical expert that each physical one is a copy of",
    "counts": "tokens of each data-parallel rank in the step",
    "damage": "what is wrong with the checkpoint",
    "dropped": "of 20 pairs of a token and an expert, how many have the id -1",
    "dtype": "data type of the tensors that the engine is given",
    "expert_id": "the id that is captured although no expert has it",
    "experts": "number of routed experts",
    "family": "model family, and its setting where it is not the usual one",
    "fits": "number of rows that fits this layout on this rank",
    "form": "whose names the checkpoint has: the hub's, or those of transformers' modules",
    "fused_shared": "shared experts that are appended to the chosen ones: how many, by which rule, with which weight",
    "held": "global ids of this rank's experts in the order of their local ids; None: no expert map",
    "hidden": "width of the hidden states that the router gets",
    "hot": "the expert that is every token's first choice",
    "identity_experts": "experts that return their input, with ids behind those of the others",
    "implementation": "which of its ways to compute experts the engine is asked to take; None: its default",
    "keys": "keys and values of the config",
    "input_scales": "whether all experts share the given scale of activations, or each has one",
    "kind": "which rows arrive: of all ranks, of this one, or slices of a tensor-parallel group",
    "kinds": "which rows arrive, layer by layer",
    "layer_id": "the layer that is captured although the model has none of that number",
    "layers": "number of layers",
    "layout": "how the tensor lies in memory; what lies between its values is poison",
    "left": "names of what was not quantised: experts, or projections of all",
    "logits": "which kind of logits: distinct, tied, extreme, not a number",
    "lora": "low-rank adapters of all experts: how many, their rank and scaling",
    "mlp": "what an expert computes; fields that are not named are at their defaults",
    "model": "the small whole model that is served",
    "model_type": "`model_type` of the config",
    "names": "words that the error must have",
    "native_ids": "whether ids reach the engine as they are, instead of as its adapter spells them",
    "needs": "features that the engine must declare, beyond those that the inputs take",
    "none": "of 20 tokens, how many have no adapter",
    "other": "the keys of a second config, which is read between two readings of the first",
    "output_scale": "number by which the routed sum is multiplied (routed_scaling_factor)",
    "outside": "an id that no expert has, put among the others",
    "owners": "the rank of each expert; empty: one rank has all",
    "padded_hidden": "hidden width after padding to what a kernel takes; None: no padding",
    "padded_intermediate": "intermediate width after padding to what a kernel takes; None: no padding",
    "padding_id": "ids of the rows behind the valid ones; None: legal ids that look like any other",
    "padding_rows": "rows behind the valid ones, as a batch has that is padded to the size of a CUDA graph",
    "pieces": "calls that each push comes in",
    "placement": "how experts are dealt out to the ranks: in runs or in turns",
    "poison": "whether pairs of other ranks and of no expert have NaN weights, and tokens without an expert NaN in x",
    "pushed": "data type of what is pushed; None: the block's own",
    "pushes": "what is pushed, one after another: all tensors with new values, a part of them, or those of the start",
    "quant": "how weights are stored and activations quantised; fields that are not named are at their defaults",
    "rank": "the rank that is judged",
    "ranks": "number of ranks: expert-parallel ones, or of a whole model tensor-parallel ones",
    "read": "number of rows that are asked for",
    "replaces": "whether tensors take the place of those that are there, or values are written into them",
    "rotated": "whether local ids rise in another order than global ones",
    "routed": "whether the routed experts are asked for, too",
    "routing": "how experts are chosen and weighed",
    "sequences": "number of sequences that the tokens belong to",
    "shape": "sequences, and tokens of each",
    "shards": "number of files of the checkpoint; 1 has no index",
    "shared": "what the shared expert computes; None: there is none",
    "shares_prefixes": "whether requests begin with the same tokens",
    "shuffled": "whether tensors are dealt out to the files in turns",
    "slot": "the slot that is written and read although the store has none of that number",
    "spec": "what the layer computes; fields that are not named are at their defaults",
    "stale_file": "whether another checkpoint's file lies beside, which the index does not name",
    "step_tokens": "tokens that the scheduler may compute in a step",
    "steps": "what happens step by step: tokens, by rank or in all, and the layers that are captured where they differ",
    "stored": "quantised form of the checkpoint, as who wrote it publishes it",
    "style": "how the checkpoint names its tensors",
    "suffixes": "what the names of an expert's tensors end in",
    "sum": "about what the scores of the experts add up to; 0: anything",
    "tensor": "the parameter that gets new values",
    "times": "factor by which the inputs are larger than usual",
    "tokens": "number of tokens",
    "top_k": "experts chosen for each token",
    "tables": "step by step, for each layer, the logical expert that each physical one is a copy of",
    "tp": "number of tensor-parallel ranks",
    "turns": "whether pairs name the experts in turn, so that all have equally many",
    "unpicked": "experts that no token chooses",
    "want": "the sizes that a capturer must take",
    "widths": "proportions of hidden and intermediate width, which decide what a shape can tell",
    "withdrawn": "requests that are withdrawn after their first new token",
    "wrong": "numbers of rows that fit nothing and must be refused",
    "x": "which values the hidden states have",
}
_OF_STAGE: Mapping[tuple[str, str], str] = {
    ("block", "routing"): "ids and weights that the block is given instead of its router's; empty: the router's own",
    ("capture_session", "padding"): "the id in rows that make slices whole",
    ("capture_session", "draft"): "where the draft model's captures lie, among those of the target",
    ("experts", "between"): "what other calls have that are made between two calls of this one; nothing: other values",
    ("experts", "padding"): "rows at the end that are padding",
    ("layer", "padding"): "rows at the end that are padding",
    ("replicate", "padding"): "rows behind the real ones, whose ids are as legal as any",
    ("route", "between"): "what other calls have that are made between two calls of this one; nothing: other values",
    ("router_module", "logits"): "how the router computes its logits",
    ("shard", "copies"): "the logical expert that each physical one is a copy of, before and after a rearrangement",
}


def meaning(stage: str, word: str) -> str | None:
    """What a key of a recipe of this stage means; None where nobody has said."""
    return _OF_STAGE.get((stage, word)) or _WORDS.get(word)


def unused(used: set[tuple[str, str]]) -> list[str]:
    """Words that no recipe of (stage, word) has."""
    words = {word for _, word in used}
    return sorted(
        [word for word in _WORDS if word not in words] + [" ".join(pair) for pair in _OF_STAGE if pair not in used]
    )
