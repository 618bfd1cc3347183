"""Names that the installed transformers would not map, by its own classes and rules: torch is imported, no value read.

Of every tensor of the model, not of its experts alone. Only for folders of plain floats: what a quantiser's tensors
are put into depends on the kernels that are installed.
"""

from __future__ import annotations

import re
from typing import Any

from moe_conformance.checkpoints.findings import Findings
from moe_conformance.checkpoints.folder import CONFIG, Folder
from moe_conformance.errors import CheckpointError, Unsupported


def hold_against_transformers(folder: Folder, findings: Findings) -> None:
    import torch

    from moe_conformance.engines.transformers.skeleton import built, sources

    if folder.config.get("quantization_config") or folder.modelopt:
        _not_judged("the folder is quantised", findings)
        return
    try:
        model = built(folder.path, folder.config, torch.bfloat16)
    except (Unsupported, CheckpointError) as error:
        _not_judged(str(error), findings)
        return
    filled = sources(model, folder.tensors)
    state = model.state_dict()
    for target, names in filled.items():
        if target not in state and not _is_ignored(model, "unexpected", target):
            findings.add(
                "unmapped",
                folder.tensors[names[0]].file,
                names,
                got="a tensor that transformers' model has no place for, and leaves out",
                want="names that its class maps",
                do="rename it, or see that nothing needs it, as a draft layer",
                level="note",
            )
    if not folder.whole:
        return  # what is in a shard that could not be read is not missing
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name in state:
        if name not in filled and name not in tied and not _is_ignored(model, "missing", name):
            findings.add(
                "unfilled",
                CONFIG,
                name,
                got="no tensor that transformers would put there",
                want="one for every parameter of the model, which is drawn at random otherwise",
                do="mend the export, or take config.json from where the tensors come from",
            )


def _is_ignored(model: Any, what: str, name: str) -> bool:
    """By the model's class itself: positions, draft layers, tied weights."""
    patterns = getattr(model, f"_keys_to_ignore_on_load_{what}", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _not_judged(why: str, findings: Findings) -> None:
    findings.add(
        "engine",
        CONFIG,
        got=f"names that were not held against transformers: {why}",
        want="a folder of floats, of a model that it has",
        do="see what it says of missing and unexpected keys when it loads the folder",
        level="note",
    )
