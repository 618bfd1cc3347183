"""How long each kernel and the whole layer take on this GPU: against a floor, torch, transformers and vLLM.

    python benchmarks/kernels.py --out results/benchmarks      # all models; stops after 240 s
    python benchmarks/kernels.py --quick                       # Gemma 4 alone; stops after 60 s
    python benchmarks/kernels.py --targets                     # what the targets name, and whether they are met
    python benchmarks/kernels.py --model qwen3 --tokens 64 --kernel experts

Writes OUT/kernels.md and OUT/kernels.json after each row, and prints the former at the end. What each column means:
benchmarks/README.md.
Where there is no GPU, everything runs at tiny sizes in Triton's interpreter: a test of this program, whose times say
nothing about a kernel.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.resolve()
# This file's own folder must go: in it, this file would pass for Hugging Face's package `kernels`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (HERE, HERE.parent)]
sys.path.append(str(HERE / "timed"))
os.environ["TRITON_DEFAULT_FP_FUSION"] = os.environ.get("TRITON_DEFAULT_FP_FUSION", "1")

import click

from moe_conformance.running.devices import gpu_count

if not gpu_count():
    # Before triton is imported, which reads it then.
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from clock import Budget, Rotating, launches, measured_rates, recorded_clocks, timed, versions
from contenders import Contender, contenders
from floors import Rates, works
from kernel_cases import KERNELS, applies, fault, ours
from kernel_inputs import Batch, make_batches
from model_shapes import MODELS, TOKENS, Model, Weights, make_weights, tiny
from table import MET, RIVALS, TARGETS, markdown, targets

from moe_conformance.kernels.interpreter import make_light

# Larger batches are launched one by one, as engines do; up to here they are recorded in a CUDA graph.
GRAPH_TOKENS = 256
# One replay of a graph; ten are made. Long enough that the clock of events (0.5 us) is below a thousandth.
MILLISECONDS = 4.0
QUICK_TOKENS, INTERPRETED_TOKENS = (8, 64, 4096, 1), (1, 3)
ORDER = tuple(sorted(TOKENS, key=lambda tokens: (tokens not in (8, 64, 4096), tokens)))
# What must stay free beside weights: activations of T = 16384 at DeepSeek-V3's width several times over.
ROOM = 12 * 2**30

Row = dict[str, Any]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="folder for kernels.md and kernels.json")
@click.option("--model", "names", multiple=True, type=click.Choice([model.name for model in MODELS]))
@click.option("--tokens", "sizes", multiple=True, type=click.IntRange(1))
@click.option("--kernel", "kernels", multiple=True, type=click.Choice(KERNELS))
@click.option("--seconds", type=float, help="in which all is to be timed; what did not fit is listed  [240, quick 60]")
@click.option("--quick", is_flag=True, help=f"Gemma 4 at T = {', '.join(map(str, sorted(QUICK_TOKENS)))}")
@click.option("--targets", "targeted", is_flag=True, help="what the targets name alone; exit code 1 if one is not met")
@torch.no_grad()
def main(
    out: Path | None,
    names: tuple[str, ...],
    sizes: tuple[int, ...],
    kernels: tuple[str, ...],
    seconds: float | None,
    quick: bool,
    targeted: bool,
) -> None:
    """Time the kernels; without options all of them."""
    if targeted and (names or sizes or kernels or quick):
        raise click.UsageError(
            "--targets: got other rows too, want none; leave out --model, --tokens, --kernel, --quick"
        )
    make_light()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # a pool of threads is slower than one at these sizes
    budget = Budget(seconds or (60 if quick or targeted else 240))
    names = names or (("gemma4",) if quick or targeted else tuple(model.name for model in MODELS))
    models = [model if device == "cuda" else tiny(model) for model in MODELS if model.name in names]
    order = sizes or (INTERPRETED_TOKENS if device == "cpu" else QUICK_TOKENS if quick else ORDER)
    rivals = frozenset(RIVALS) if targeted else None
    rates = measured_rates()
    if targeted:
        pairs = TARGETS if rates else tuple(dict.fromkeys((kernel, 3) for kernel, _ in TARGETS))
        plan = {model: [row_of(model, *pair) for pair in pairs] for model in models}
    else:
        plan = {model: rows_of(model, order, kernels or KERNELS) for model in models}
    rows = [row for rows in plan.values() for row in rows]

    with recorded_clocks() as clocks:

        def keep() -> str:
            return report(out, rates, clocks, budget, rows)

        try:
            # Contenders that take seconds to be ready come behind all that do not.
            for slow in (False, True):
                for model, own in plan.items():
                    time_model(model, own, slow, device, rates, budget, rivals, keep)
        finally:
            click.echo(keep())
    missed = [line for line in targets(rows, whole=True) if not line.startswith(MET)] if targeted and rates else []
    for line in missed:
        click.echo(line, err=True)
    if missed or any(row.keys() & {"wrong", "error"} for row in rows):
        sys.exit(1)


def rows_of(model: Model, order: tuple[int, ...], kernels: tuple[str, ...]) -> list[Row]:
    """The rows of one model, the most important first."""
    plan = [(tokens, kernel) for tokens in order for kernel in KERNELS if kernel in kernels]
    return [row_of(model, kernel, tokens) for tokens, kernel in plan if applies(kernel, model)]


def row_of(model: Model, kernel: str, tokens: int) -> Row:
    return {"kernel": kernel, "model": model.name, "dtype": model.dtype, "tokens": tokens}


def time_model(
    model: Model,
    rows: list[Row],
    slow: bool,
    device: str,
    rates: Rates | None,
    budget: Budget,
    names: frozenset[str] | None,
    keep: Callable[[], object],
) -> None:
    """Fill in its rows: the kernels and those contenders that are slow to be ready, or those that are not.

    names: of the contenders that are asked for, None for all. keep: called after each row.
    """
    if slow:
        rows = [row for row in rows if "us" in row]
    note = "skipped: out of time" if budget.left <= 0 and not slow else None
    if device == "cuda" and model.weight_bytes + ROOM > (free := torch.cuda.mem_get_info()[0]):
        note = f"skipped: weights of {model.weight_bytes / 2**30:.0f} GiB, {free / 2**30:.0f} GiB free"
    if note or not rows:
        for row in rows:
            row["note"] = note
        return
    weights = make_weights(model, device)
    torch.compiler.reset()  # its limit of recompilations counts those of other models too
    others = {kernel: contenders(kernel, model, weights) for kernel in {row["kernel"] for row in rows}}
    for row in rows:
        rivals = [
            other for other in others[row["kernel"]] if other.slow == slow and (names is None or other.name in names)
        ]
        time_row(row, model, weights, rivals, device, rates, budget)
        keep()
    # The contenders hold the weights too, and what is compiled holds the contenders.
    del weights, others, rivals
    torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()


def time_row(
    row: Row, model: Model, weights: Weights, others: list[Contender], device: str, rates: Rates | None, budget: Budget
) -> None:
    """The kernel, unless an earlier call has timed it, and these contenders."""
    kernel, tokens = row["kernel"], row["tokens"]
    done = "contenders" in row
    others = [other for other in others if tokens <= other.most_tokens]
    if budget.left <= 0 and not done:
        row["note"] = "skipped: out of time"
        return
    batches: list[Batch] = []
    try:
        batches = make_batches(kernel, model, tokens, device)
        first = batches[0]
        if not done:
            hit = sum(batch.hit for batch in batches) / len(batches)
            parts = works(kernel, model, tokens, hit, first.config.block_m)
            row["floor_us"] = None if rates is None else sum(part.microseconds(rates) for part in parts)
            row |= {"bytes": sum(part.moved for part in parts), "flops": sum(part.flops for part in parts)}
            row |= {"copies": len(batches), "config": repr(first.config), "contenders": {}}
            row["aligned"] = first.config.aligned
            call = ours(kernel, model, weights)
            row |= measured(Contender("kernel", call), kernel, batches, weights)
            if "us" in row and tokens <= GRAPH_TOKENS:
                row["launches"] = launches(lambda: call(first))
        for other in others:
            late = {"note": "out of time"}
            row["contenders"][other.name] = measured(other, kernel, batches, weights) if budget.left > 0 else late
    except torch.cuda.OutOfMemoryError:
        row.setdefault("note", "skipped: its inputs do not fit in memory")
    except RuntimeError as error:  # the device itself, as after an access out of bounds
        row["error"] = brief(error)


def measured(contender: Contender, kernel: str, batches: list[Batch], weights: Weights) -> Row:
    """Its time once its answer is right; what is wrong with it, or why it did not run."""
    if contender.call is None:
        return {"note": contender.reason}
    graph = contender.graph and len(batches[0].x) <= GRAPH_TOKENS
    try:
        if wrong := fault(kernel, contender.call(batches[0]), batches[0], weights):
            return {"wrong": wrong}
        median, low, high = timed(Rotating(contender.call, batches), graph, MILLISECONDS)
    except torch.cuda.OutOfMemoryError:
        return {"note": "out of memory"}
    except Exception as error:  # of a compiler or of another project; a row of ours that has one fails the run
        return {"error": brief(error)}
    how = "interpreted" if not torch.cuda.is_available() else "graph" if graph else "eager"
    return {"us": median, "us_20": low, "us_80": high, "how": how}


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


def report(out: Path | None, rates: Rates | None, clocks: Callable[[], Row], budget: Budget, rows: list[Row]) -> str:
    """What has been timed so far, as Markdown; kept in the folder, too."""
    facts = {
        **versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "benchmarks/kernels.py", *sys.argv[1:]]),
        "seconds": round(budget.spent, 1),
        "clocks": clocks(),
        **(asdict(rates) if rates else {}),
    }
    text = markdown(facts, rows)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "kernels.md").write_text(text + "\n")
        (out / "kernels.json").write_text(json.dumps({**facts, "rows": rows}, indent=1, allow_nan=False) + "\n")
    return text


if __name__ == "__main__":
    main()
