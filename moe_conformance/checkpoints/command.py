"""`moe-conformance checkpoint`: from a folder to a judgement of it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_conformance.checkpoints.engines import unheard_of
from moe_conformance.checkpoints.findings import Findings
from moe_conformance.checkpoints.folder import CONFIG, read_folder
from moe_conformance.checkpoints.model import Model, model_of
from moe_conformance.checkpoints.report import Judgement
from moe_conformance.checkpoints.whole import judge
from moe_conformance.quote import plainly


def judged(path: Path, values: bool = False, engines: Sequence[str] = ()) -> Judgement:
    """engines: against whose own loaders names are held, of transformers, vllm and sglang.

    Raises CheckpointError where there is nothing to judge, DenseModelError for a model without experts, and UsageError
    for an engine that is not installed.
    """
    if engines:
        from moe_conformance.checkpoints import mapped

        mapped.ask(engines)
    findings = Findings()
    # Half a million small tuples, none in a cycle: garbage collection would take as long as reading.
    collects = gc.isenabled()
    gc.disable()
    try:
        folder = read_folder(path, findings)
        model = model_of(folder, findings)
        held = judge(folder, model, findings)
    finally:
        if collects:
            gc.enable()
    if values:
        from moe_conformance.checkpoints.values import Progress, look

        look(folder, model.layout, held, findings, Progress(folder.size, sys.stderr))
    if model.why:
        findings.add(
            "no-record",
            CONFIG,
            got=f"model_type {plainly(model.model_type)}: {model.why}",
            want="a family with a record",
            do="judged by what holds for every model alone; names and shapes were not held against a config",
            level="note",
        )
    unheard_of(folder.config, findings)
    for engine in dict.fromkeys(engines):
        mapped.hold_against(engine, folder, findings)
    return Judgement(
        str(path),
        _said(model),
        model.layout is not None,
        len(folder.tensors),
        len(folder.data),
        folder.size,
        values,
        findings.all(),
    )


def _said(model: Model) -> str:
    scheme = f", {model.scheme.method}" if model.scheme else ""
    if model.layout is None:
        return model.model_type + scheme
    experts = sorted({layer.sizes.experts for layer in model.layout.layers.values()})
    count = str(experts[0]) if len(experts) == 1 else f"{experts[0]} to {experts[-1]}"
    return f"{model.model_type}, {len(model.layout.layers)} layers with {count} experts{scheme}"
