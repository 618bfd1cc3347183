"""SGLang's own model of a folder without memory for its parameters, for `checkpoint --sglang`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from moe_conformance.engine import Unsupported
from moe_conformance.engines.sglang import models, runtime
from moe_conformance.engines.sglang.refusing import said
from moe_conformance.engines.traced import Server


def built(folder: Path, config: Mapping[str, Any]) -> Server:
    """Raises Unsupported, in SGLang's words, where it builds no such model on this machine."""
    runtime.start()
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader import loader

    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        if name in models.known():
            models.register(name)
    made = models.model_config(folder, "auto")

    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        with runtime.building(made.dtype), torch.device("meta"):
            yield

    with inside():
        try:
            model = loader._initialize_model(made, LoadConfig())
        except Exception as error:
            raise Unsupported(
                f"SGLang does not build this model here: {type(error).__name__}: {said(error)}"
            ) from error
    return Server(model, inside, said, release=runtime.release())
