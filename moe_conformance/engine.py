"""The door for adapters: everything an adapter needs is imported from here.

An adapter is one class. It need not inherit from `Engine`; a stage it lacks is simply not there. Letters:
T tokens, E experts, K experts per token, H hidden, F expert intermediate, D the width the experts work in
(H, or the latent width), L layers, P padded slots. All tensors are torch, on the device that `info` declares.
-1 is "no expert" in every tensor of ids; adapters translate it to the engine's own.

This module imports no torch: an adapter's file must be importable without its engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moe_conformance.errors import (
    Absent,
    CheckpointError,
    ConfigError,
    DenseModelError,
    InputError,
    MoEConformanceError,
    Unavailable,
    Unsupported,
)
from moe_conformance.model.description import CaptureShape, MoESpec
from moe_conformance.model.specs import (
    Activation,
    Capacity,
    DenseSpec,
    LatentSpec,
    LayerSpec,
    LogitsSpec,
    MLPSpec,
    Precision,
    RoutingSpec,
    Shape,
    SharedSpec,
)
from moe_conformance.model.storage import LoraSpec, QuantSpec
from moe_conformance.protocol.align import Aligned, AlignInputs
from moe_conformance.protocol.capture import CaptureReader, CaptureSession, CaptureSpec, CaptureStore, RowKind, Rows
from moe_conformance.protocol.checkpoint import CheckpointName, Loaded, Target
from moe_conformance.protocol.engine import Engine, EngineInfo, Repro, called_by_engine
from moe_conformance.protocol.exchange import Arrived, Exchanged, ExchangeInputs
from moe_conformance.protocol.experts import ExpertsInputs, Lora
from moe_conformance.protocol.generate import Generated, GenerateInputs
from moe_conformance.protocol.layer import BlockInputs, BlockOutput, LayerInputs
from moe_conformance.protocol.limits import Limits
from moe_conformance.protocol.ranks import ExpertMapSpec, Replicated, ReplicateInputs, ShardInputs
from moe_conformance.protocol.routing import FusedShared, RouteInputs, RouterHandle, RouterSpec, Routing
from moe_conformance.protocol.stages import PROTOCOL_VERSION, STAGES
from moe_conformance.protocol.update import UpdateInputs

if TYPE_CHECKING:
    from moe_conformance.judging.inputs import (
        bits,
        distinct_logits,
        integers,
        normal,
        poison_,
        poisoned_allocations,
        windows,
    )
    from moe_conformance.model.families import inverse
    from moe_conformance.model.families.describe import layer_of
    from moe_conformance.model.families.families import RECORDS
    from moe_conformance.oracle.stored import checkpoint_of

# fmt: off
__all__ = [
    "PROTOCOL_VERSION", "RECORDS", "STAGES", "Absent", "Activation", "AlignInputs", "Aligned", "Arrived", "BlockInputs",
    "BlockOutput", "Capacity", "CaptureReader", "CaptureSession", "CaptureShape", "CaptureSpec", "CaptureStore",
    "CheckpointError", "CheckpointName", "ConfigError", "DenseModelError", "DenseSpec", "Engine", "EngineInfo",
    "ExchangeInputs", "Exchanged", "ExpertMapSpec", "ExpertsInputs", "FusedShared", "GenerateInputs", "Generated",
    "InputError", "LatentSpec", "LayerInputs", "LayerSpec", "Limits", "Loaded", "LogitsSpec", "Lora", "LoraSpec",
    "MLPSpec", "MoEConformanceError", "MoESpec", "Precision", "QuantSpec", "ReplicateInputs", "Replicated", "Repro",
    "RouteInputs", "RouterHandle", "RouterSpec", "Routing", "RoutingSpec", "RowKind", "Rows", "Shape", "ShardInputs",
    "SharedSpec", "Target", "Unavailable", "Unsupported", "UpdateInputs", "bits", "called_by_engine", "checkpoint_of",
    "distinct_logits", "integers", "inverse", "layer_of", "normal", "poison_", "poisoned_allocations", "windows",
]
# fmt: on

# Inputs that the suites are made of, for adapters' own tests; they take torch. RECORDS: what is known of each model
# family, by model type; inverse: from what a layer computes to a config of a family that says so. Reading them takes
# a moment. layer_of: what a layer of a config computes. checkpoint_of: a block's tensors as published checkpoints have
# them.
_INPUTS = ("poison_", "poisoned_allocations", "normal", "integers", "bits", "distinct_logits", "windows")

# What the first protocol had, and what took its place (docs/migrating.md).
_GONE = {
    "Method": 'RoutingSpec: softmax_topk is RoutingSpec(K), softmax_topk_renorm RoutingSpec(K, renormalize="sum"), '
    'gemma4 RoutingSpec(K, renormalize="sum", per_expert_scale=True)',
}


def __getattr__(name: str) -> Any:
    if name in _INPUTS:
        return getattr(importlib.import_module("moe_conformance.judging.inputs"), name)
    if name == "RECORDS":
        return importlib.import_module("moe_conformance.model.families.families").RECORDS
    if name == "checkpoint_of":
        return importlib.import_module("moe_conformance.oracle.stored").checkpoint_of
    if name == "layer_of":
        return importlib.import_module("moe_conformance.model.families.describe").layer_of
    if name == "inverse":
        return importlib.import_module("moe_conformance.model.families.inverse")
    if name in _GONE:
        raise ImportError(f"moe_conformance.engine.{name} is gone since protocol 2; use {_GONE[name]}")
    raise AttributeError(f"module 'moe_conformance.engine' has no attribute {name!r}")
