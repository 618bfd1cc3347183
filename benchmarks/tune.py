"""Measure tile sizes on this GPU and keep them where the kernels look: kernels/tuned/DEVICE.json.

    python benchmarks/tune.py --model gemma4 --seconds 600
    python benchmarks/tune.py --model gemma4 --tokens 64 --dry-run      # prints what it would keep

For each model and number of tokens: each height of a block, sorted pairs or not; for each of these the fastest tile of
either projection, timed apart; the heights compared by the sum of both and of the sorting. What is kept is the
winner, whose answer must be right, or the tiles that follow from the shape alone where the whole is faster by those.
Other entries of the file stay. Without a GPU, --dry-run goes through two candidates of a toy in the interpreter.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from datetime import UTC, datetime
from functools import partial
from itertools import product as combinations
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.resolve()
# This file's own folder must go: kernels.py in it would pass for Hugging Face's package `kernels`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (HERE, HERE.parent)]
sys.path.append(str(HERE / "timed"))
os.environ["TRITON_DEFAULT_FP_FUSION"] = os.environ.get("TRITON_DEFAULT_FP_FUSION", "1")

import click

from moe_conformance.running.devices import gpu_count

if not gpu_count():
    # Before triton is imported, which reads it then.
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from clock import Budget, Rotating, timed, versions
from compilers import Compilers
from kernel_cases import fault, product
from kernel_inputs import Batch, make_batch, problem
from model_shapes import MODELS, TOKENS, Model, Weights, make_weights, tiny
from torch import Tensor

from moe_conformance.kernels.dispatch import align
from moe_conformance.kernels.experts import compute
from moe_conformance.kernels.interpreter import make_light
from moe_conformance.kernels.tuning import (
    SPARSE,
    Config,
    Problem,
    Tile,
    default,
    file_name,
    interpreter_config,
    limits,
    power,
    write,
)

# Milliseconds of one candidate's launches: enough to tell 3 %.
MILLISECONDS = 2.0
# Of the time for some candidates, what compiling them may take: what is compiled must be timed, too.
COMPILING = 0.7
# Accumulators that one thread holds: above 128 float32 the other half of its 255 registers does not do.
ACCUMULATORS = 128
PROJECTIONS = ("gate_up", "down")


@click.command()
@click.option("--model", "names", multiple=True, type=click.Choice([model.name for model in MODELS]))
@click.option("--tokens", "sizes", multiple=True, type=click.IntRange(1), default=TOKENS, show_default=True)
@click.option("--seconds", default=600.0, help="shared evenly among models and numbers of tokens")
@click.option("--jobs", default=os.cpu_count() or 1, help="processes that compile")
@click.option("--out", default=HERE.parent / "kernels" / "tuned", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="write nothing")
@torch.no_grad()
def main(
    names: tuple[str, ...], sizes: tuple[int, ...], seconds: float, jobs: int, out: Path, dry_run: bool
) -> None:  # fmt: skip
    """Tune MODELs (default: all) for numbers of tokens."""
    make_light()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        if not dry_run:
            raise click.UsageError("no GPU: the interpreter's times say nothing; add --dry-run to try the path")
        names, sizes = names or (MODELS[0].name,), (5,)
    models = [model if device == "cuda" else tiny(model) for model in MODELS if model.name in names or not names]
    budget, left = Budget(seconds), len(models) * len(sizes)
    compilers = Compilers(jobs) if device == "cuda" else None
    for model in models:
        weights = make_weights(model, device)
        for tokens in sizes:
            entry = tune(model, tokens, weights, device, Budget(budget.left / left), compilers)
            left -= 1
            if entry and not dry_run:
                keep(out, problem(model, tokens).key, tokens, entry)
        del weights
    if dry_run:
        click.echo("nothing written")


def tune(
    model: Model, tokens: int, weights: Weights, device: str, budget: Budget, compilers: Compilers | None
) -> dict[str, Any] | None:  # fmt: skip
    """The entry to keep, or None where nothing could be measured in time."""
    torch.manual_seed(tokens)
    asked = problem(model, tokens)
    shared, usual = 0, interpreter_config(asked)
    if device == "cuda":
        shared, lanes = limits(torch.device(device))
        usual = default(asked, shared, lanes)
    batches = [make_batch(model, tokens, device, usual) for _ in range(2)]
    seen: Counter[str] = Counter()
    # The default's own height first, should time end before the others'.
    variants = sorted(heights(asked), key=lambda pair: pair != (usual.block_m, usual.aligned))
    if device == "cpu":
        variants = variants[:1]
    ranked: list[tuple[float, Config]] = []
    for number, (block_m, aligned) in enumerate(variants):
        here = [replace(batch, config=replace(usual, block_m=block_m, aligned=aligned)) for batch in batches]
        total = 0.0
        if aligned:
            sort = Rotating(lambda batch: align(batch.ids, model.experts, batch.config.block_m), here)
            total = timed(sort, False, MILLISECONDS)[0]
        best: dict[str, Tile] = {}
        for projection in PROJECTIONS:
            share = Budget(budget.left / (2 * (len(variants) - number) - len(best)))
            nearest = partial(distance, getattr(usual, projection))
            # What is most like the default first, should time end before the others.
            tiles = [getattr(usual, projection), *sorted(candidates(asked, projection, block_m, shared), key=nearest)]
            times = fastest(product(projection, model, weights), tiles, here, share, compilers, seen)
            if times:
                spent, best[projection] = min(times, key=lambda pair: pair[0])
                total += spent
        if len(best) == len(PROJECTIONS):
            ranked.append((total, Config(block_m, best["gate_up"], best["down"], aligned)))
    return winner(model, tokens, weights, batches, usual, sorted(ranked, key=lambda pair: pair[0]), seen)


def heights(asked: Problem) -> Iterator[tuple[int, bool]]:
    """Rows of a block and whether pairs are sorted: around an expert's share of the pairs."""
    pairs = asked.tokens * asked.top_k
    if pairs <= SPARSE * asked.experts:
        yield 16, False
    share = power(pairs / asked.experts, 16, 128)
    yield from ((block_m, True) for block_m in (share // 2, share, share * 2) if 16 <= block_m <= 128)


def candidates(asked: Problem, projection: str, block_m: int, shared_memory: int) -> list[Tile]:
    """The grid without what spills, does not fit or leaves threads idle. Interpreted: one more than the default."""
    halves = 2 if projection == "gate_up" and asked.gated else 1
    width, depth = (asked.width, asked.hidden) if projection == "gate_up" else (asked.hidden, asked.width)
    if not shared_memory:
        return [Tile(16, 16)]
    # Which blocks run side by side matters only where an expert has several.
    groups = (1, 8, 32) if asked.tokens * asked.top_k > 2 * block_m * asked.experts else (8,)
    found = []
    for block_n, block_k, warps, group_m in combinations((32, 64, 128, 256), (32, 64, 128), (4, 8), groups):
        accumulators = block_m * block_n * halves / (32 * warps)
        stage = (block_m * asked.dtype.itemsize + halves * block_n * (1 if asked.fp8 else 2)) * block_k
        most = min(5, shared_memory // stage)
        if most < 2 or not 4 <= accumulators <= ACCUMULATORS or block_n >= 2 * width or block_k >= 2 * depth:
            continue
        found += [Tile(block_n, block_k, group_m, warps, stages) for stages in {most, max(2, most - 2)}]
    return found


def distance(one: Tile, other: Tile) -> float:
    """Doublings between two tiles, a stage counted as one."""
    pairs = zip(astuple(one)[:-1], astuple(other)[:-1], strict=True)
    return sum(abs(math.log2(own / its)) for own, its in pairs) + abs(one.num_stages - other.num_stages)


def fastest(
    call: Callable[[Batch, Tile], Tensor], tiles: list[Tile], batches: list[Batch], budget: Budget,
    compilers: Compilers | None, seen: Counter[str],
) -> list[tuple[float, Tile]]:  # fmt: skip
    """Microseconds of each tile that compiles and runs, as far as time goes; what does not is counted."""
    for batch in batches:
        _ = batch.dispatched, batch.hidden  # launched here, and not as a part of what is timed
    if compilers:
        compilers.compile((partial(call, batches[0], tile) for tile in tiles), COMPILING * budget.left)
    times = []
    for tile in tiles:
        failure = None
        if budget.left <= 0:
            failure = "out of time"
        else:
            try:
                rotating = Rotating(lambda b, tile=tile: call(b, tile), batches)
                times.append((timed(rotating, False, MILLISECONDS)[0], tile))
            except Exception as error:  # a compiler's errors have no common base
                failure = type(error).__name__
        seen[failure or "timed"] += 1
    return times


def winner(
    model: Model, tokens: int, weights: Weights, batches: list[Batch], usual: Config,
    ranked: list[tuple[float, Config]], seen: Counter[str],
) -> dict[str, Any] | None:  # fmt: skip
    """The first of the ranking whose answer is right, or the usual tiles where all together is faster by them."""

    def whole(config: Config, batch: Batch) -> Tensor:
        return compute(
            batch.x, model.mlp, weights.tensors, batch.ids, batch.weights, config, quantised=weights.scales,
            interleaved=model.interleaved,
        )  # fmt: skip

    counted = ", ".join(f"{number} {what}" for what, number in seen.items())
    for _, config in ranked:
        call = partial(whole, config)
        if wrong := fault("experts", call(batches[0]), batches[0], weights):
            click.echo(f"{model.name} T={tokens}: WRONG by {config}: {wrong}")
            continue
        graph = tokens <= 256
        us, usual_us = (timed(Rotating(c, batches), graph, MILLISECONDS)[0] for c in (call, partial(whole, usual)))
        click.echo(f"{model.name} T={tokens}: {us:.1f} us, default {usual_us:.1f}; {counted}; {config}")
        chosen = config if us < usual_us else usual
        return {**write(chosen), "us": round(min(us, usual_us), 2), "default_us": round(usual_us, 2)}
    click.echo(f"{model.name} T={tokens}: nothing measured; {counted}")
    return None


def keep(folder: Path, key: str, tokens: int, entry: dict[str, Any]) -> None:
    """Add to the device's file, or replace there; facts are those of the last run."""
    facts = versions()
    path = folder / file_name(facts["device"])
    configs = json.loads(path.read_text())["configs"] if path.is_file() else {}
    by_tokens = configs.get(key, {}) | {str(tokens): entry}
    configs[key] = dict(sorted(by_tokens.items(), key=lambda item: int(item[0])))
    command = shlex.join(["python", "benchmarks/tune.py", *sys.argv[1:]])
    facts |= {"date": datetime.now(UTC).date().isoformat(), "command": command}
    folder.mkdir(parents=True, exist_ok=True)
    # At once: a run that is killed here must not leave half a file, which the kernels refuse.
    half = path.with_suffix(".tmp")
    half.write_text(json.dumps({**facts, "configs": configs}, indent=1) + "\n")
    half.replace(path)


if __name__ == "__main__":
    main()
