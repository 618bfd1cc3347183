"""Weights pushed into a model of SGLang that runs: by its `update_weights_from_tensor`, under the names of the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import CheckpointError, UpdateInputs
from moe_conformance.engines import servers
from moe_conformance.engines.sglang import block, built, device, models, runtime
from moe_conformance.engines.sglang.refusing import refusals
from moe_conformance.errors import Unsupported


def features() -> frozenset[str]:
    import sglang.srt.model_executor.model_runner_components.weight_updater  # noqa: F401

    return models.model_types() | {"other_dtype", "parts"}


@torch.no_grad()
def update(inputs: UpdateInputs) -> tuple[list[Tensor], str]:
    """Outputs before any push, and after each; and what computed them."""
    if inputs.replaces:
        raise Unsupported("update: SGLang's loaders write into the tensors that are there")
    runtime.start()
    given = inputs.block
    record, values = models.as_published(given.config)
    running = block.loaded(json.loads(json.dumps(dict(given.config))), given.layer, given.x.dtype, given.tensors)
    held = dict(given.tensors)
    outputs = [_output(running, inputs)]
    for push in inputs.pushes:
        held |= push
        named = list(servers.pushed(record, values, inputs, held, push))
        for piece in range(inputs.pieces):
            _push(running, named[piece :: inputs.pieces], given.x.dtype)
        outputs.append(_output(running, inputs))
    return outputs, f"{running.name}, {built.NAMES['native']}"


def _output(running: block.Block, inputs: UpdateInputs) -> Tensor:
    given = inputs.block
    ids = None if given.token_ids is None else given.token_ids.flatten()
    x = given.x.flatten(0, -2)
    with runtime.building(x.dtype), refusals():
        return running(x.clone(), ids).reshape(x.shape).clone()


def _push(running: block.Block, named: list[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """One call of a trainer's. SGLang answers whether it was loaded, and why not."""
    with runtime.building(dtype), refusals():
        done, said = _updater(running.model).update_weights_from_tensor(named)
    if not done:
        raise CheckpointError(f"update_weights_from_tensor: {said}")


def _updater(model: Any) -> Any:
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    nothing: Mapping[str, Any] = {
        "tp_rank": 0, "device": device.kind(), "gpu_id": 0, "model_config": None, "custom_weight_loaders": {},
        "update_model_fields": None, "recapture_cuda_graph": None, "get_model_runner": None,
    }  # fmt: skip
    return WeightUpdater(**nothing, get_model=lambda: model)
