"""Real ranks, processes that exchange tokens through gloo, compute what simulated ranks do, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_conformance.judging.inputs import distinct_logits, normal
from moe_conformance.model.specs import MLPSpec
from moe_conformance.reference_impl.experts import routed_experts
from moe_conformance.reference_impl.parallel.expert_map import expert_map, held_experts, physical_ids
from moe_conformance.reference_impl.parallel.experts import (
    slice_width,
    take_experts,
    through_all_gather,
    through_all_to_all,
)
from moe_conformance.reference_impl.parallel.ranks import (
    Group,
    Process,
    all_gather,
    all_reduce,
    reduce_scatter,
    simulate,
)

E, K, D = 11, 4, 20
SPEC = MLPSpec(14, bias=True)
COPIES = torch.tensor([3, 9, 0, 3, 7, 1, 10, 3, 3, 5, 7, 2, 8, 6, 4])
# By number of ranks and name of the result.
Record = dict[str, dict[str, list[object]]]
# Tokens of each data-parallel rank, by number of ranks; the first rank has none.
COUNTS = {2: (0, 7), 3: (0, 9, 4)}


def steps(group: Group) -> dict[str, list[object]]:
    """Every collective, and every way to the experts, on one rank."""
    tensors = {name: normal(shape, name, std=0.25) for name, shape in SPEC.tensors("experts", D, (E,)).items()}
    counts = COUNTS[group.size]
    tokens = sum(counts)
    ids = distinct_logits(tokens, E, "ids").topk(K).indices
    ids[1::3, 0], ids[4] = -1, -1
    batch = normal((tokens, D), "x"), ids, normal((tokens, K), "weights")
    x, ids, weights = (whole.split(counts)[group.rank] for whole in batch)

    mine = expert_map(E, group.rank, group.size)
    own = take_experts(tensors, held_experts(mine))
    narrow, sliced = slice_width(SPEC, tensors, "experts", group.rank, group.size)
    everything = torch.arange(E)
    maps = torch.stack([expert_map(len(COPIES), rank, group.size) for rank in range(group.size)])
    copies = take_experts(tensors, COPIES[held_experts(maps[group.rank])])

    def whole_experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return routed_experts(x, SPEC, own, ids, weights, expert_map=mine)

    def narrow_experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return routed_experts(x, narrow, sliced, ids, weights, expert_map=everything)

    def copied_experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return routed_experts(x, SPEC, copies, ids, weights, expert_map=maps[group.rank])

    physical = physical_ids(ids, COPIES, E)
    results = {
        "gathered": torch.cat(all_gather(group, x)),
        "reduced": all_reduce(group, whole_experts(*batch)),
        "scattered": reduce_scatter(group, narrow_experts(*batch), counts),
        "in bfloat16": all_reduce(group, batch[0].bfloat16() * (group.rank + 1)).float(),
        "whole experts": through_all_gather(x, ids, weights, whole_experts, group),
        "narrow experts": through_all_gather(x, ids, weights, narrow_experts, group),
        "copied experts": through_all_to_all(x, physical, weights, maps, copied_experts, group),
    }
    return {name: result.tolist() for name, result in results.items()}


def main(rank: int, folder: str) -> None:
    """One process: rank of three, then, but for the last, rank of two. Prints what it computed."""
    torch.set_num_threads(1)
    record: Record = {}
    for size in (3, 2):
        if rank < size:
            dist.init_process_group("gloo", f"file://{folder}/{size}", timedelta(seconds=120), size, rank)
            record[str(size)] = steps(Process())
            dist.barrier()
            dist.destroy_process_group()
    print(json.dumps(record))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """What each process printed."""
    folder = tmp_path_factory.mktemp("meeting-points")
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        found = []
        for process in ranks:
            said, complaint = process.communicate(timeout=120)
            assert process.returncode == 0, complaint
            found.append(json.loads(said.splitlines()[-1]))
        return found
    finally:
        for process in ranks:
            process.kill()
            process.wait()


@pytest.mark.parametrize("size", COUNTS)
def test_real_ranks_compute_what_simulated_ranks_do(size: int, records: list[Record]) -> None:
    for rank, want in enumerate(simulate(size, steps)):
        got = records[rank][str(size)]
        assert len(got["whole experts"]) == COUNTS[size][rank]
        for name in want:
            assert got[name] == want[name], f"rank {rank} of {size}: {name}"


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
