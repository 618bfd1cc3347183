"""The capturer among real ranks: two data-parallel by two tensor-parallel processes that exchange ids through gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moe_conformance.engine import CaptureSpec, Rows
from moe_conformance.reference_impl.capture import Capturer
from moe_conformance.suites.capture_session.simulated_ranks import LAYERS, TOP_K, SimulatedStep

DP, TP, COUNTS = 2, 2, (3, 5)


def arriving(kind: str, own: Tensor, dp_rank: int, tp_rank: int, tp_group: dist.ProcessGroup) -> tuple[Tensor, Rows]:
    """The rows of one layer as dispatch builds them from this data-parallel rank's own ids [n, K]."""
    most = -(-max(COUNTS) // TP)  # rows of the largest slice; gloo gathers equal shapes

    def gather(part: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part.contiguous(), group=group)
        return parts

    size = -(-len(own) // TP)
    padded = torch.cat([own, own.new_full((size * TP - len(own), TOP_K), 250)])
    part = padded[tp_rank * size : (tp_rank + 1) * size]
    if kind == "sequence_shard":
        return part, Rows("sequence_shard", COUNTS, gather=lambda ids: torch.cat(gather(ids, tp_group)))
    # All ranks, data-parallel major. Each sends its slice padded to the largest, and the padding is cut off.
    sent = gather(torch.cat([part, part.new_full((most - size, TOP_K), 250)]), None)
    ranks = [torch.cat([ids[: -(-COUNTS[dp] // TP)] for ids in sent[dp * TP : (dp + 1) * TP]]) for dp in range(DP)]
    if kind == "sequence_gathered":
        return torch.cat(ranks), Rows("sequence_gathered", COUNTS)
    return torch.cat([ids[:count] for ids, count in zip(ranks, COUNTS, strict=True)]), Rows("concatenated", COUNTS)


def main(rank: int, meeting_point: str) -> None:
    """One rank: capture a step in each layout and print what was recorded."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting_point}", timedelta(seconds=60), DP * TP, rank)
    dp_rank, tp_rank = divmod(rank, TP)
    groups = [dist.new_group([dp * TP + tp for tp in range(TP)]) for dp in range(DP)]
    step, record = SimulatedStep(COUNTS, TP), {}
    for kind in ("sequence_shard", "sequence_gathered", "concatenated"):
        session = Capturer(CaptureSpec(max(COUNTS), LAYERS, TOP_K, 251, dp_rank, DP, tp_rank, TP))
        for layer in range(LAYERS):
            own = step.own(dp_rank, layer)
            session.capture(layer, *arriving(kind, own, dp_rank, tp_rank, groups[dp_rank]))
        record[kind] = session.read(COUNTS[dp_rank]).tolist()
    print(json.dumps(record))
    dist.barrier()
    dist.destroy_process_group()


def test_real_ranks_record_what_simulated_ranks_do(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "meeting-point")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(DP * TP)
    ]
    try:
        for rank, process in enumerate(ranks):
            said, complaint = process.communicate(timeout=120)
            assert process.returncode == 0, complaint
            want = SimulatedStep(COUNTS, TP).want(rank // TP).tolist()
            record = json.loads(said.splitlines()[-1])
            for kind, got in record.items():
                assert got == want, f"rank {rank}, {kind}"
            assert len(record) == 3
    finally:
        for process in ranks:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
