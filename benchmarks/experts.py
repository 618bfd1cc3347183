"""How long the reference takes for the routed experts, against the eager loop of transformers.

    python benchmarks/experts.py --runs 20

Prints a Markdown table: medians of alternating runs in one process on one thread, and their ratio (below 1: the
reference is faster). Time of the CPU, not of the clock, so that other work on the machine does not enter.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_conformance.judging.inputs import normal
from moe_conformance.model.specs import MLPSpec
from moe_conformance.reference_impl.experts import routed_experts

# E, K, H, F, T: a small layer, and one of more and larger experts with one token, a small batch and a prompt.
SHAPES = ((64, 8, 256, 128, 512), *((128, 8, 512, 256, tokens) for tokens in (1, 64, 1024)))
DTYPES = (torch.float32, torch.bfloat16)


@click.command()
@click.option("--runs", default=20, help="of each, alternating; ten times as many for one token")
@torch.no_grad()
def main(runs: int) -> None:
    torch.set_num_threads(1)
    click.echo(f"torch {torch.__version__}, medians of {runs} runs, ms\n")
    click.echo("| E | K | H | F | T | dtype | reference | transformers | ratio |\n|" + "---|" * 9)
    for shape in SHAPES:
        for dtype in DTYPES:
            counted = runs * 10 if shape[-1] == 1 else runs
            ours, theirs = (1e3 * seconds for seconds in medians(*both(*shape, dtype), counted))
            cells = (*shape, str(dtype).removeprefix("torch."), f"{ours:.2f}", f"{theirs:.2f}", f"{ours / theirs:.2f}")
            click.echo("| " + " | ".join(map(str, cells)) + " |")


def both(
    experts: int, top_k: int, hidden: int, width: int, tokens: int, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The reference and the model on the same weights, tokens and routing."""
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=width, num_local_experts=experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = "eager"
    module = MixtralExperts(config).to(dtype)
    module.gate_up_proj.copy_(normal((experts, 2 * width, hidden), "w13", std=1 / 16))
    module.down_proj.copy_(normal((experts, hidden, width), "w2", std=1 / 16))
    x = normal((tokens, hidden), "x", dtype)
    weights, ids = normal((tokens, experts), "logits").softmax(dim=-1).topk(top_k)
    tensors = {"experts.w13": module.gate_up_proj, "experts.w2": module.down_proj}
    spec = MLPSpec(width)
    return lambda: routed_experts(x, spec, tensors, ids, weights), lambda: module(x, ids, weights)


def medians(first: Callable[[], Tensor], second: Callable[[], Tensor], runs: int) -> tuple[float, float]:
    """Seconds of each, after one run of both that is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs + 1):
        for function, seen in zip((first, second), times, strict=True):
            start = time.process_time()
            function()
            seen.append(time.process_time() - start)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


if __name__ == "__main__":
    main()
