"""Weights pushed into a model of vLLM that runs: by its own reload, under the names of the hub.

As its weight transfer does: a session is begun, load_weights called for each bucket that comes, and the session ended,
upon which layers are laid out for their kernels again. A session has all tensors of a layer ("the number of weights
loaded is the same as at model init"). Releases without it have load_weights alone, which is what trainers call there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moe_conformance.engine import UpdateInputs
from moe_conformance.engines import servers
from moe_conformance.engines.vllm import block, models, runtime
from moe_conformance.engines.vllm.refusing import refusals
from moe_conformance.errors import Unsupported

Tensors = Mapping[str, Tensor]


def features() -> frozenset[str]:
    return models.model_types() | {"other_dtype"} | ({"parts"} if _reload() is None else set())


def _reload() -> Any:
    """What begins and ends a session, or None."""
    try:
        return import_module("vllm.model_executor.model_loader.reload")
    except ImportError:
        return None


@torch.no_grad()
def update(inputs: UpdateInputs) -> tuple[list[Tensor], str]:
    """Outputs before any push, and after each; and the kernel that computed them."""
    if inputs.replaces:
        raise Unsupported("update: vLLM's loaders write into the tensors that are there")
    runtime.start()
    given = inputs.block
    key = block.Key(json.dumps(dict(given.config)), given.layer, given.x.dtype, given.tensors, "native")
    running = block._built(key)
    held = dict(given.tensors)
    record, values = models.as_published(given.config)
    outputs = [_output(running, inputs)]
    for push in inputs.pushes:
        held |= push
        names = dict(servers.pushed(record, values, inputs, held, push))
        _load(running, [dict(list(names.items())[piece :: inputs.pieces]) for piece in range(inputs.pieces)])
        outputs.append(_output(running, inputs))
    return outputs, block.kernel_of(running.experts)


def _output(running: block.Block, inputs: UpdateInputs) -> Tensor:
    from vllm.forward_context import create_forward_context, override_forward_context

    x = inputs.block.x.flatten(0, -2)
    ids = None if inputs.block.token_ids is None else inputs.block.token_ids.flatten()
    context = override_forward_context(create_forward_context(None, running.config))
    with running.running(), context, refusals():
        return running(x.clone(), ids).reshape(x.shape).clone()


def _load(running: block.Block, buckets: Sequence[Tensors]) -> None:
    """A session of the block alone: the rest of the model was never loaded, and cannot be laid out."""
    model: Any = running.model
    session = _reload()
    with running.running():
        if session is not None:
            session.initialize_layerwise_reload(running.root)
        for named in buckets:
            model.load_weights(iter(named.items()))
        if session is not None:
            session.finalize_layerwise_reload(running.root, running.config.model_config)
