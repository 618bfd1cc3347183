"""from_pretrained on a checkpoint folder, and what then lies in the modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from moe_conformance.errors import CheckpointError

# Module name below a Gemma 4 decoder layer -> canonical name.
CANONICAL = {
    "experts.gate_up_proj": "experts.w13",
    "experts.down_proj": "experts.w2",
    "router.proj.weight": "router.proj",
    "router.scale": "router.scale",
    "router.per_expert_scale": "router.per_expert_scale",
}


def styles() -> frozenset[str]:
    """Gemma 4's classes name tensors as the packed checkpoints do; there is no conversion from other styles."""
    return frozenset({"packed", "multimodal"})


def load(folder: Path) -> Mapping[str, Tensor]:
    """The model's experts and routers by canonical name, as loaded, in the checkpoint's dtype.

    Raises CheckpointError where transformers reports a parameter left unwritten, a key unused or a shape that differs
    (it initialises or ignores those, and only warns); whatever else from_pretrained raises comes out as it is.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]  # it writes to the standard error of whoever runs a suite
    answer: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True
    )
    model, report = answer
    faults = [f"{kind}: {', '.join(sorted(map(str, keys)))}" for kind, keys in report.items() if keys]
    if faults:
        raise CheckpointError(f"{folder.name}: transformers loaded it in part; {'; '.join(faults)}")
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(model.get_decoder().layers):
        tensors = dict(layer.named_parameters())
        found |= {f"layers.{index}.{to}": tensors[name].detach() for name, to in CANONICAL.items() if name in tensors}
    return found
