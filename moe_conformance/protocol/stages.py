"""The stages an engine may have, in data order."""

from __future__ import annotations

# Raised with the first change that breaks an adapter; docs/migrating.md says what changed.
PROTOCOL_VERSION = 2

STAGES = (
    "describe",
    "capture_shape",
    "route",
    "router_module",
    "align",
    "experts",
    "layer",
    "block",
    "capture_session",
    "capture_store",
    "expert_map",
    "replicate",
    "shard",
    "exchange",
    "remap",
    "load",
    "update",
    "generate",
)
