"""What each rank is given, and what comes back to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import Exchanged, ExchangeInputs, ExpertsInputs
from moe_conformance.judging import compare
from moe_conformance.judging.inputs import matrix, normal, poisoned_allocations
from moe_conformance.model.specs import MLPSpec
from moe_conformance.oracle.bounds import Bound
from moe_conformance.oracle.experts import expected_parts
from moe_conformance.protocol.moving import to_device
from moe_conformance.suites.exchange.processes import exchange_in_processes
from moe_conformance.suites.shard.ranks import chosen, expert_map


class Layer:
    """A layer, and one batch of it for each exchange: the batches before the one that is judged, and that one."""

    def __init__(self, case: Case) -> None:
        self.case, self.dtype = case, getattr(torch, case["dtype"])
        self.tensors = self._tensors(case["mlp"], "experts", (case["E"],))
        self.shared = self._tensors(case["shared"], "shared") if case["shared"] else {}
        owners = case["owners"]
        self.maps = torch.stack([expert_map(owners, rank, case["rotated"]) for rank in range(max(owners) + 1)])
        self.steps = [self._batch(counts, f"-{step}") for step, counts in enumerate((*case["between"], case["counts"]))]

    def _tensors(self, mlp: MLPSpec, prefix: str, lead: tuple[int, ...] = ()) -> dict[str, Tensor]:
        shapes = mlp.tensors(prefix, self.case["D"], lead)
        return {name: matrix(shape, f"exchange-{name}", self.dtype) for name, shape in shapes.items()}

    def _batch(self, counts: Sequence[int], seed: str) -> list[ExchangeInputs]:
        """Every rank's inputs."""
        case, tokens = self.case, sum(counts)
        # The factor gives float32 rows bits that bfloat16 has not; `normal` is exact in either.
        x = normal((tokens, case["D"]), f"exchange-x{seed}", self.dtype) * (1 + 2.0**-10)
        if case["x"] == "repeated":
            x[1::2] = x[::2][: tokens // 2]
        logits = f"exchange-logits{seed}"
        ids = chosen(tokens, case["E"], case["K"], case["dropped"], logits, case["hot"], case["unpicked"])
        weights = 2.5 * normal((tokens, case["K"]), f"exchange-weights{seed}")
        if case["poison"]:
            weights = weights.masked_fill(ids < 0, float("nan"))
            x = x.masked_fill((ids < 0).all(-1, keepdim=True), float("nan"))
        batch = zip(x.split(list(counts)), ids.split(list(counts)), weights.split(list(counts)), strict=True)
        return [
            ExchangeInputs(
                x=x.clone(),
                ids=ids.clone(),
                weights=weights.clone(),
                mlp=case["mlp"],
                tensors={name: tensor[self.held(rank)] for name, tensor in self.tensors.items()},
                maps=self.maps,
                rank=rank,
                shared=case["shared"],
                shared_tensors=self.shared,
            )
            for rank, (x, ids, weights) in enumerate(batch)
        ]

    def held(self, rank: int) -> Tensor:
        """The experts of a rank, in the order of their local ids."""
        return (self.maps[rank] >= 0).nonzero().flatten()[self.maps[rank][self.maps[rank] >= 0].argsort()]

    def expected(self, inputs: ExchangeInputs) -> tuple[Tensor, Bound]:
        """What one rank, alone with all experts, makes of these tokens.

        A sum over experts may be stored after any of its additions, and so after those that a rank's experts are in.
        """
        nobody = inputs.ids < 0
        whole = ExpertsInputs(
            x=inputs.x.nan_to_num(0.0),  # of tokens without an expert
            mlp=inputs.mlp,
            tensors=self.tensors,
            ids=inputs.ids,
            weights=inputs.weights.masked_fill(nobody, 0),
        )
        return expected_parts(whole, inputs.shared, self.shared, 1, 1)


def exchanged(engine: Any, case: Case, layer: Layer) -> list[list[Exchanged]]:
    """What each rank gets at each step; every fresh allocation of the engine is poisoned."""
    for step in layer.steps:
        engine.within("exchange", step)
    steps = [[to_device(inputs, engine.info.device) for inputs in step] for step in layer.steps]
    if case["processes"]:
        found = exchange_in_processes(engine, steps)
    else:
        with poisoned_allocations():
            found = [list(engine.exchange(step)) for step in steps]
    for answers in found:
        compare.same("ranks with an output", len(answers), len(layer.maps))
    return found


def judge(engine: Any, case: Case) -> None:
    """Each rank's output is that of its own tokens, computed in one piece; of the last exchange."""
    layer = Layer(case)
    for inputs, got in zip(layer.steps[-1], exchanged(engine, case, layer)[-1], strict=True):
        what = f"output of rank {inputs.rank} of {inputs.ranks}, with {case['counts'][inputs.rank]} of the tokens"
        compare.shape_and_type(what, got.output, inputs.x.shape, integer=False)
        compare.same(f"{what}, dtype", str(got.output.dtype), str(inputs.x.dtype))
        compare.close(what, got.output, *layer.expected(inputs))
