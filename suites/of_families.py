"""Cases of every family for the two stages that read checkpoints. No torch here."""

from __future__ import annotations

from moe_conformance.catalogue.case import Case
from moe_conformance.model.families.families import RECORDS
from moe_conformance.model.families.record import Record
from moe_conformance.oracle.naming import Form, pieces_of

MODULES = "published checkpoints have the hub's names; those of transformers' modules are known to transformers alone"
TRANSPOSED = "published checkpoints have packed experts transposed; so transformers 5 writes them no more"
RENAMED = "published checkpoints spell a tensor otherwise, which transformers 5 reads and does not write"
IDENTITY = "published checkpoints have no tensors of identity experts; transformers writes some, which nothing reads"


def of_families(stage: str, clause: str) -> tuple[Case, ...]:
    """One case for each spelling of each family: as on the hub, and as the modules are called where that is otherwise.

    form: see oracle/naming.py. The few that stand for the others are tried in core, in either form.
    """
    forms: tuple[Form, ...] = ("hub", "modules")
    return tuple(
        Case(
            f"{stage}-{record.slug}-{form}",
            stage,
            clause,
            {"family": record.slug, "model_type": record.model_type, "form": form},
            "core" if record.sample == "smoke" else "full",
            _lenient(record, form),
        )
        for record in RECORDS.values()
        for form in forms
        if pieces_of(record, form)
    )


def _lenient(record: Record, form: Form) -> str:
    """Why an engine that knows published checkpoints alone breaks no more than a SHOULD."""
    if form != "hub":
        return MODULES
    assert record.names is not None
    if record.names.published:
        return RENAMED
    return TRANSPOSED if record.names.once_transposed else IDENTITY if record.names.identity_written else ""
