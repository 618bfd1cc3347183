"""Which decoder layers have routed experts: one small rule a config style.

A rule takes the config level and the number of layers, and returns the indices of the MoE layers. If a plain dict lacks
a key of the rule, the default of the model's own config class counts, because the pattern belongs to the architecture.
Sizes have no defaults.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from moe_conformance.model.families.bounds import MOST_LAYERS
from moe_conformance.model.families.scope import Scope
from moe_conformance.quote import few, quoted

Rule = Callable[[Scope, int], tuple[int, ...]]

WHAT = "MoE layers"
MOE_TYPES = frozenset({"sparse", "moe", "hash_moe"})
HYBRID_PATTERN = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


def every_layer(scope: Scope, total: int) -> tuple[int, ...]:
    return tuple(range(total))


def leading_dense(dense: int, key: str = "") -> Rule:
    """`dense` layers without experts come first, or as many as `key` says."""

    def rule(scope: Scope, total: int) -> tuple[int, ...]:
        return tuple(range(scope.optional(WHAT, key, dense) if key else dense, total))

    return rule


def typed(otherwise: Rule | None) -> Rule:
    """mlp_layer_types names each layer; a config without it follows `otherwise`, or lacks a key if that is None."""

    def rule(scope: Scope, total: int) -> tuple[int, ...]:
        if otherwise is not None and scope.get("mlp_layer_types") is None:
            return otherwise(scope, total)
        key, found = scope.find(WHAT, ("mlp_layer_types",))
        types = scope.for_each_layer(WHAT, key, found, total)
        unknown = [entry for entry in types if not isinstance(entry, str) or entry not in (*MOE_TYPES, "dense")]
        if unknown:
            raise scope.error(WHAT, f"{key} has {few(unknown)}; want dense or {', '.join(sorted(MOE_TYPES))}")
        return tuple(i for i, entry in enumerate(types) if entry in MOE_TYPES)

    return rule


def leading_dense_then_frequency(dense: int) -> Rule:
    """first_k_dense_replace, then every moe_layer_freq-th layer (a number, or 0 or 1 for each layer)."""

    def rule(scope: Scope, total: int) -> tuple[int, ...]:
        first = scope.optional(WHAT, "first_k_dense_replace", dense)
        frequency = scope.get("moe_layer_freq")
        if isinstance(frequency, list | tuple):
            return tuple(i for i in flagged(scope, total) if i >= first)
        step = scope.optional(WHAT, "moe_layer_freq", 1, least=1)
        return tuple(i for i in range(total) if i >= first and i % step == 0)

    return rule


def flagged(scope: Scope, total: int) -> tuple[int, ...]:
    """moe_layer_freq holds 0 or 1 for each layer; without it every layer has experts."""
    flags = scope.get("moe_layer_freq")
    if flags is None:
        return every_layer(scope, total)
    flags = scope.for_each_layer(WHAT, "moe_layer_freq", flags, total)
    if wrong := [flag for flag in flags if not isinstance(flag, int) or flag not in (0, 1)]:
        raise scope.error(WHAT, f"moe_layer_freq has {few(wrong)}; want 0 or 1 for each layer")
    return tuple(i for i, flag in enumerate(flags) if flag)


def sparse_step(skip: Sequence[int] = ()) -> Rule:
    """Every decoder_sparse_step-th layer but those in mlp_only_layers (Qwen2-MoE and its descendants)."""

    def rule(scope: Scope, total: int) -> tuple[int, ...]:
        step = scope.optional(WHAT, "decoder_sparse_step", 1, least=1)
        indices = scope.get("mlp_only_layers")
        dense = frozenset(skip if indices is None else _indices(scope, "mlp_only_layers", indices, total))
        return tuple(i for i in range(total) if i not in dense and (i + 1) % step == 0)

    return rule


def window(scope: Scope, total: int) -> tuple[int, ...]:
    """Every moe_layer_interval-th layer from a start to an end index, both included (ERNIE 4.5)."""
    start = scope.optional(WHAT, "moe_layer_start_index", 1)
    end = scope.optional(WHAT, "moe_layer_end_index", -1, least=-1)
    step = scope.optional(WHAT, "moe_layer_interval", 1, least=1)
    end = total - 1 if end == -1 else end
    return tuple(i for i in range(total) if (i + 1) % step == 0 and start <= i <= end)


def period(scope: Scope, total: int) -> tuple[int, ...]:
    """Every expert_layer_period-th layer from expert_layer_offset on (Jamba)."""
    step = scope.optional(WHAT, "expert_layer_period", 2, least=1)
    offset = scope.optional(WHAT, "expert_layer_offset", 1)
    return tuple(i for i in range(total) if i % step == offset)


def listed(scope: Scope, total: int) -> tuple[int, ...]:
    """moe_layers, or every interleave_moe_layer_step-th layer (Llama 4)."""
    step = scope.optional(WHAT, "interleave_moe_layer_step", 1, least=1)
    indices = scope.get("moe_layers")
    return tuple(range(step - 1, total, step)) if indices is None else _indices(scope, "moe_layers", indices, total)


def enumerated(scope: Scope, total: int) -> tuple[int, ...]:
    """moe_layers_enum, indices in a list or joined by commas; without it all but the first three (Step 3)."""
    key = "moe_layers_enum"
    indices = scope.get(key)
    if indices is None:
        return tuple(range(3, total))
    if isinstance(indices, str):
        entries = [entry.strip() for entry in indices.split(",") if entry.strip()]
        # At most six digits: a longer number is not an index but an attack on int().
        indices = [int(entry) if re.fullmatch("[0-9]{1,6}", entry) else entry for entry in entries]
    return _indices(scope, key, indices, total)


def blocks(scope: Scope, total: int) -> tuple[int, ...]:
    """layers_block_type names each layer's one block (Nemotron-H)."""
    return tuple(i for i, block in enumerate(block_types(scope)) if block == "moe")


def block_types(scope: Scope) -> Sequence[str]:
    key, types = scope.find(WHAT, ("layers_block_type", "layer_types", "hybrid_override_pattern"))
    if key != "hybrid_override_pattern":
        return scope.sequence(WHAT, key, types)
    if not isinstance(types, str) or len(types) > MOST_LAYERS:
        raise scope.error(WHAT, f"{key}: got {quoted(types)}, want a text of at most {MOST_LAYERS} letters")
    if unknown := sorted(set(types) - set(HYBRID_PATTERN)):
        raise scope.error(WHAT, f"{key} has {few(unknown)}; want {''.join(HYBRID_PATTERN)}")
    return [HYBRID_PATTERN[letter] for letter in types]


def step_from_one(step_key: str, count_key: str) -> Rule:
    """Layers 1, 1 + step, ...; step is layers // count unless the config stores it (Switch Transformers)."""

    def rule(scope: Scope, total: int) -> tuple[int, ...]:
        count = scope.optional(WHAT, count_key, 3)
        step = scope.optional(WHAT, step_key, total // count if count else total)
        return tuple(i for i in range(total) if step > 0 and (step == 1 or i % step == 1))

    return rule


def looped(scope: Scope, total: int) -> tuple[int, ...]:
    """The layer of each run: the layers from a start to an end run in order, once a pass (Inkling 2)."""
    older = scope.below(WHAT, "loop_config")  # used if it is set
    start = older.optional(WHAT, "core_start", scope.optional(WHAT, "loop_layer_index_start", 6))
    end = older.optional(WHAT, "core_end", scope.optional(WHAT, "loop_layer_index_end", 18))
    passes = older.optional(WHAT, "num_passes", scope.optional(WHAT, "loop_num_passes", 3, least=1), least=1)
    if not start <= end <= total or passes * (end - start) > MOST_LAYERS:
        raise scope.error(
            WHAT,
            f"got {passes} passes of the layers from {start} to {end}, want some of the {total} layers, "
            f"and at most {MOST_LAYERS} runs",
        )
    return (*range(start), *(layer for _ in range(passes) for layer in range(start, end)), *range(end, total))


def step_to_last(step_key: str) -> Rule:
    """Every step-th layer, none for 0 (NLLB-MoE)."""

    def rule(scope: Scope, total: int) -> tuple[int, ...]:
        step = scope.optional(WHAT, step_key, 4)
        return tuple(i for i in range(total) if step > 0 and (i + 1) % step == 0)

    return rule


def _indices(scope: Scope, key: str, indices: Any, total: int) -> tuple[int, ...]:
    """The listed layers that the model has: a truncated model keeps its original list."""
    indices = scope.sequence(WHAT, key, indices)
    wrong = [i for i in indices if isinstance(i, bool) or not isinstance(i, int) or i < 0]
    if wrong:
        raise scope.error(WHAT, f"{key} has {few(wrong)}; want layer indices")
    return tuple(sorted({i for i in indices if i < total}))
