"""Which record a model type has, and how a config of a model type without one is read by its keys."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping

from moe_conformance.model.families import records
from moe_conformance.model.families.bounds import MOST_SHARED
from moe_conformance.model.families.layers import (
    Rule,
    every_layer,
    leading_dense,
    leading_dense_then_frequency,
    listed,
    period,
    sparse_step,
    typed,
    window,
)
from moe_conformance.model.families.record import DENSE_WIDTH, SHARED_COUNT, WIDTH, Record, Shared, Sizes
from moe_conformance.model.families.scope import Scope

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
HIDDEN = ("hidden_size", "d_model")
# Where a config may hold the model's config: the first of these that has experts, else the level itself.
NESTED = ("text_config", "language_config", "llm_config", "thinker_config", "talker_config")
NESTED_LAST = ("vision_config",)


class Families(Mapping[str, Record]):
    """Records by their own model type, in the order of their slugs.

    A wrapper has the text model's name without "_text", or is listed in the record's `also`.
    Raises ValueError where two records claim one model type or one slug.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._records: dict[str, Record] = {}
        self._names: dict[str, str] = {}
        slugs: dict[str, str] = {}
        for record in sorted(records, key=lambda record: record.slug):
            claims = [(slugs, record.slug), *((self._names, name) for name in (record.model_type, *record.also))]
            if record.model_type.endswith("_text"):
                claims.append((self._names, record.model_type.removesuffix("_text")))
            for table, name in claims:
                if name in table:
                    raise ValueError(
                        f"record of {record.model_type}: got {name!r}, which is that of {table[name]} too, want one "
                        "record for each model type and slug; remove one of them or rename it"
                    )
                table[name] = record.model_type
            self._records[record.model_type] = record

    def __getitem__(self, model_type: str) -> Record:
        return self._records[model_type]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def name_of(self, model_type: str) -> str:
        """The model type of the record that this one is read by; "" if there is none."""
        return self._names.get(model_type, "")

    def record_of(self, model_type: str) -> Record | None:
        return self._records.get(self.name_of(model_type))


def _written() -> Iterator[Record]:
    for module in pkgutil.iter_modules(records.__path__):
        yield importlib.import_module(f"{records.__name__}.{module.name}").RECORD


RECORDS = Families(_written())
# By the names that cases use.
BY_SLUG: Mapping[str, Record] = {record.slug: record for record in RECORDS.values()}


def by_its_keys(scope: Scope) -> Sizes:
    """How a model type without a record spells its sizes, where its keys leave no doubt."""
    said = [rule for keys, rule in RULES.items() if any(scope.get(key) is not None for key in keys)]
    if len(said) > 1:
        names = ", ".join(key for keys in RULES for key in keys if scope.get(key) is not None)
        raise scope.error("MoE layers", f"unknown model type with more than one rule ({names}); keep one of them")
    counted = any(scope.get(key) is not None for key in SHARED_COUNT)
    widths = tuple(key for key in SHARED_WIDTH if scope.get(key) is not None)
    if counted and widths and scope.integer("shared experts", SHARED_COUNT, 0, MOST_SHARED) > 1:
        raise scope.error("shared experts", f"{widths[0]} may be the width of one or of all; drop it or the count")
    plain_width = not said and not counted and scope.get(WIDTH[0]) is None
    return Sizes(
        layers=said[0] if said else every_layer,
        width=DENSE_WIDTH if plain_width else WIDTH,
        shared=Shared(SHARED_COUNT if counted else 1, widths) if counted or widths else None,
        latent="moe_latent_size",
        switch=next((key for key in ("enable_moe_block", "is_moe") if key in scope.values), ""),
    )


SHARED_WIDTH = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_experts_intermediate_size",
    "shared_intermediate_size",
)
RULES: dict[tuple[str, ...], Rule] = {
    ("mlp_layer_types",): typed(None),
    ("first_k_dense_replace", "moe_layer_freq"): leading_dense_then_frequency(0),
    ("num_dense_layers",): leading_dense(0, "num_dense_layers"),
    ("decoder_sparse_step", "mlp_only_layers"): sparse_step(),
    ("moe_layers", "interleave_moe_layer_step"): listed,
    ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"): window,
    ("expert_layer_period", "expert_layer_offset"): period,
}
