"""vLLM's own model of a folder without memory for its parameters, for `checkpoint --vllm`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from moe_conformance.engine import Unsupported
from moe_conformance.engines.traced import Server
from moe_conformance.engines.vllm import models, runtime
from moe_conformance.engines.vllm.refusing import said


def built(folder: Path, config: Mapping[str, Any]) -> Server:
    """Raises Unsupported, in vLLM's words, where it builds no such model on this machine."""
    from vllm.model_executor.model_loader.utils import initialize_model

    runtime.start()
    made = models.engine_config(folder, "auto")

    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        with runtime.building(made, made.model_config.dtype), torch.device("meta"):
            yield

    with inside(), models._beside_experts():
        try:
            model = initialize_model(made)
        except Exception as error:
            raise Unsupported(f"vLLM does not build this model here: {type(error).__name__}: {said(error)}") from error
    # Models are built for text alone, and those for images stand by a stand-in.
    absent = {name for name, module in model.named_modules() if type(module).__name__ == "StageMissingLayer"}
    return Server(model, inside, said, frozenset(name.rpartition(".")[2] for name in absent), runtime.release())
