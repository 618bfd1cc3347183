"""Whether a checkpoint is whole: every MoE tensor of its config is there once, with its shape, dtype and companions.

Uses only config and headers. Names of tensors are in layout.py, stored forms in forms.py.
"""

from __future__ import annotations

from moe_conformance.checkpoints.coverage import Coverage
from moe_conformance.checkpoints.findings import Findings
from moe_conformance.checkpoints.folder import Folder
from moe_conformance.checkpoints.generic import alike
from moe_conformance.checkpoints.matrices import Judge
from moe_conformance.checkpoints.model import Model
from moe_conformance.checkpoints.sorting import Sorted, sorted_out


def judge(folder: Folder, model: Model, findings: Findings) -> Sorted:
    """Everything that headers say. returns every tensor in its place."""
    is_open = model.scheme is not None and not model.scheme.known
    held = sorted_out(folder.tensors, model.layout, findings, is_open)
    if model.layout is not None:
        # At most a few: more are no draft layers.
        indices = sorted({index for _, index, _ in held.groups}, reverse=True)[:8]
        model.layout.find_drafts(indices, folder.tensors)
    matrices = Judge(folder, model, held.ends, findings)
    for key, group in held.groups.items():
        matrices.group(key, group)
    if model.layout is not None:
        Coverage(folder, model.layout, findings).judge(held.groups, held.strange if is_open else frozenset())
    else:
        alike(held.outside, folder, findings)
    matrices.outside(held.outside)
    matrices.scheme()
    return held
