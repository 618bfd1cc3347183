"""Tile sizes of the grouped products: kept per device, dtype and model where `benchmarks/tune.py` measured them.

kernels/tuned/DEVICE.json holds what was measured; where it says nothing, defaults follow from the shape alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
import triton

from moe_conformance.errors import InputError
from moe_conformance.kernels.launch import interpreted

# Programs that keep the memory of the largest target busy: two on each of an H200's 132 multiprocessors.
ENOUGH_PROGRAMS = 264
# Below one pair for every four experts, pairs are not sorted: nearly each would have its own block anyway.
SPARSE = 4
# The factor by which numbers of tokens may differ and still share a kept configuration: measured numbers are a factor
# of 4 to 8 apart.
NEAR = 4
# Bytes of shared memory from which on the matrix units read operands there, not in registers: sm_90 and sm_100.
WIDE = 200 * 1024


@dataclass(frozen=True)
class Tile:
    """One product's tile: columns, depth of a step, blocks of pairs side by side; warps and stages of the pipeline."""

    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Config:
    """block_m: pairs in a block, common to both products. aligned: whether pairs are sorted at all."""

    block_m: int
    gate_up: Tile
    down: Tile
    aligned: bool = True


@dataclass(frozen=True)
class Problem:
    """The problem that tiles are chosen for. dtype: of x. fp8: weights are float8. gated: w13, not w1."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    width: int
    dtype: torch.dtype
    gated: bool = True
    fp8: bool = False

    @property
    def key(self) -> str:
        """The key in kept files: everything but the number of tokens."""
        dtype = str(self.dtype).removeprefix("torch.") + ("-fp8" if self.fp8 else "")
        return f"{dtype} E{self.experts} K{self.top_k} H{self.hidden} F{self.width}{'' if self.gated else ' plain'}"


def power(number: float, low: int, high: int) -> int:
    """The power of two at or above number, within [low, high]."""
    above: int = triton.next_power_of_2(max(1, int(-(-number // 1))))
    return max(low, min(high, above))


def default(problem: Problem, shared_memory: int, lanes: int = 32) -> Config:
    """Tiles by shape alone. `tools/aot.py` guards the result on each target: no spills, matrix instructions, occupancy.

    shared_memory: bytes that one block of threads may have. lanes: of a warp, 32, or 64 on AMD.
    Blocks are as tall as twice an expert's share of pairs, for experts are not chosen evenly, and a second block reads
    the weights again. Low blocks are bound by those weights: deep steps, and half of the memory, so that two blocks
    are at work on each multiprocessor. Tall ones, from 64 pairs on, are bound by the matrix units: wide, and with all
    of the memory unless half holds three stages. Tiles that vLLM measured on an H200 are like that, 128 x 256 x 64 with
    8 warps and 4 stages from 1024 tokens on (fused_moe/configs, E=128,N=768 and E=8,N=14336).
    """
    pairs = problem.tokens * problem.top_k
    aligned = pairs * SPARSE > problem.experts
    block_m = power(2 * pairs / problem.experts, 16, 128) if aligned else 16
    blocks = max(min(pairs, problem.experts), pairs // block_m)  # as if pairs were spread evenly over the experts
    size, tall = problem.dtype.itemsize, block_m >= 64
    wide = shared_memory >= WIDE and size == 2 and not problem.fp8
    # float8 is converted in registers, where each step's sums wait for their scale too: more threads for a tile of it,
    # and a narrower one where the operands of the matrix units are registers.
    crowded = problem.fp8 and lanes == 32

    def tile(width: int, depth: int, halves: int) -> Tile:
        columns = 128
        if wide and block_m == 128 and -width % (256 // halves) * 32 <= width:
            columns = 256
        if crowded and tall and shared_memory < WIDE:
            columns = 64
        warps = 8 if block_m * columns >= (32 * 128 if crowded else 128 * 128) else 4
        block_n = columns // halves * 2 // size
        while block_n > 32 and blocks * -(-width // block_n) < ENOUGH_PROGRAMS:
            block_n //= 2
        block_k = power(depth, 16, (32 if tall else 64) * 4 // size)
        stage = (block_m + halves * block_n) * block_k * size  # bytes
        half = shared_memory // 2 - 1024  # CUDA takes 1 KiB for each block
        while stage > (shared_memory if tall else half):
            block_k, stage = block_k // 2, stage // 2
        two_blocks = not tall or (half // stage >= 3 and not problem.fp8)
        stages = max(2, min(4 if tall else 5, (half if two_blocks else shared_memory) // stage))
        return Tile(block_n, block_k, num_warps=warps, num_stages=stages)

    down = tile(problem.hidden, problem.width, 1)
    return Config(block_m, tile(problem.width, problem.hidden, 2 if problem.gated else 1), down, aligned)


def interpreter_config(problem: Problem) -> Config:
    """Few, large programs, for the interpreter's cost is per operation."""
    pairs = problem.tokens * problem.top_k

    def tile(width: int, depth: int) -> Tile:
        return Tile(power(width, 16, 128), power(depth, 16, 512), group_m=2)

    sparse = pairs * SPARSE <= problem.experts
    block_m = 16 if sparse else power(pairs / problem.experts, 16, 64)
    return Config(block_m, tile(problem.width, problem.hidden), tile(problem.hidden, problem.width), not sparse)


@cache
def kept(device: str) -> Mapping[str, Mapping[int, Config]]:
    """Measured configurations of a device by `Problem.key` and number of tokens; empty where none are kept.

    Raises InputError for a file that is not one that `benchmarks/tune.py` writes.
    """
    file = files("moe_conformance.kernels") / "tuned" / file_name(device)
    if not file.is_file():
        return {}
    try:
        return {
            key: {int(tokens): read(entry) for tokens, entry in by_tokens.items()}
            for key, by_tokens in json.loads(file.read_text())["configs"].items()
        }
    except (KeyError, AttributeError, ValueError) as error:
        raise InputError(f"{file}: {error!r}; write it anew with benchmarks/tune.py, or remove it") from error


def file_name(device: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", device) + ".json"


def read(entry: Mapping[str, Any]) -> Config:
    """A kept entry; further keys, such as the time measured, are ignored. Raises InputError for an invalid entry."""
    try:
        config = Config(entry["block_m"], Tile(**entry["gate_up"]), Tile(**entry["down"]), entry["aligned"])
    except (KeyError, TypeError) as error:
        raise InputError(f"tuned configuration: got {entry}, want the fields of Config ({error})") from error
    numbers = {"block_m": config.block_m} | {
        f"{part}.{name}": number
        for part in ("gate_up", "down")
        for name, number in asdict(getattr(config, part)).items()
    }
    for name, number in numbers.items():
        # Tiles and warps are powers of two; a bool is an int, and none of these is one.
        power_of_two = type(number) is int and number > 0 and not number & (number - 1)
        if not (power_of_two or (name.endswith(("num_stages", "group_m")) and type(number) is int and number > 0)):
            raise InputError(f"tuned configuration: got {name} {number!r}, want a power of two (stages, group: from 1)")
    if type(config.aligned) is not bool:
        raise InputError(f"tuned configuration: got aligned {config.aligned!r}, want true or false")
    return config


def write(config: Config) -> dict[str, Any]:
    """An entry for `read`."""
    return asdict(config)


def limits(device: torch.device) -> tuple[int, int]:
    """Bytes of shared memory that one block of threads may have, and lanes of a warp; as Triton's driver says."""
    with torch.cuda.device(device):
        driver = triton.runtime.driver.active
        properties = driver.utils.get_device_properties(driver.get_current_device())
        return properties["max_shared_mem"], driver.get_current_target().warp_size


def choose(problem: Problem, device: torch.device) -> Config:
    """The kept configuration of the nearest number of tokens, by ratio; the default where none is near."""
    if interpreted():
        return interpreter_config(problem)
    by_tokens = kept(torch.cuda.get_device_name(device)).get(problem.key, {})

    def ratio(tokens: int) -> float:
        return max(tokens, problem.tokens) / max(1, min(tokens, problem.tokens))

    nearest = min(by_tokens, key=ratio, default=0)
    if not nearest or ratio(nearest) > NEAR:
        return default(problem, *limits(device))
    return by_tokens[nearest]
