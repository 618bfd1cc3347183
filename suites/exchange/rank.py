"""One rank's process: `python -m` this module, with the descriptor that it is asked by and the engine's class."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from moe_conformance.catalogue.case import Case
from moe_conformance.engine import Exchanged, ExchangeInputs
from moe_conformance.judging.inputs import poisoned_allocations
from moe_conformance.judging.judge import Judge
from moe_conformance.judging.verdict import Outcome
from moe_conformance.protocol.moving import to_device
from moe_conformance.running.discovery import Target

# Judged by its outcome alone: it takes no features.
_CASE = Case("exchange-rank", "exchange", "exchange.own-tokens")


def main(descriptor: str, path: str) -> None:
    torch.set_num_threads(1)
    questions = Connection(int(descriptor))
    judge = Judge(Target("rank", path))
    while True:
        try:
            backend, meeting, rank, size, seconds, steps = pickle.loads(questions.recv_bytes())
        except EOFError:
            return
        if backend == "nccl":
            torch.cuda.set_device(rank % torch.cuda.device_count())
        dist.init_process_group(backend, meeting, timedelta(seconds=seconds), size, rank)
        questions.send_bytes(pickle.dumps(played(judge, steps)))
        dist.destroy_process_group()


def played(judge: Judge, steps: Sequence[ExchangeInputs]) -> tuple[Outcome, list[Exchanged]]:
    """What the engine gave at each step, and the outcome of asking it."""
    found: list[Exchanged] = []

    def play(engine: Any, case: Case) -> None:
        with torch.no_grad(), poisoned_allocations():
            for inputs in steps:
                found.extend(engine.exchange([inputs]))

    return judge.judge(play, _CASE), to_device(found, "cpu")


if __name__ == "__main__":
    main(*sys.argv[1:])
