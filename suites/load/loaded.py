"""What a load must give, and its facts for the golden file."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch

from moe_conformance.engine import Engine
from moe_conformance.errors import CheckpointError, Nonconformance
from moe_conformance.judging import compare


def loads_whole(engine: Engine, folder: Path, want: dict[str, Any]) -> dict[str, str]:
    try:
        got = engine.load(folder)
    except CheckpointError as error:
        raise Nonconformance(f"a whole checkpoint: refused ({error}), want every tensor of it") from error
    absent = sorted(set(want) - set(got))
    if absent:
        raise Nonconformance(f"loaded tensors: {', '.join(absent)} not there, got {sorted(got)}")
    for name, tensor in want.items():
        compare.shape_and_type(name, got[name], tensor.shape)
        if not (name.endswith("router.selection_bias") and _shifted(got[name], tensor)):
            compare.equal(name, got[name], tensor)
    return {name: f"{list(got[name].shape)} {_checksum(got[name])}" for name in sorted(want)}


def _shifted(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether it is the same but for one constant, which chooses the same experts: vLLM takes Sarvam's mean away."""
    if got.shape != want.shape or not got.is_floating_point():
        return False
    # What is left may be twice as large, and each entry is rounded once, by half an ulp; two of them may part.
    apart = got.double() - want.double()
    return bool(apart.max() - apart.min() <= 2 * torch.finfo(got.dtype).eps * want.double().abs().max())


def _checksum(tensor: torch.Tensor) -> str:
    return f"{zlib.crc32(tensor.detach().float().contiguous().numpy().tobytes()):08x}"
