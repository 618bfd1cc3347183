"""Ranks, and the one exchange that all collectives are made of: threads of this process, or processes under gloo."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


class Group(Protocol):
    """One rank's view of the ranks that compute together; all call the same functions in the same order."""

    rank: int
    size: int

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send parts[r] to rank r; return what each rank sent here, in rank order.

        Parts may differ only in their number of rows, which may be 0; dtype and the other dims are the same on every
        rank.
        """
        ...


def all_gather(group: Group, part: Tensor) -> list[Tensor]:
    """Every rank's part, in rank order, on every rank."""
    return group.exchange([part] * group.size)


def all_reduce(group: Group, x: Tensor) -> Tensor:
    """The sum over ranks, added in rank order, so that every rank gets the same bits."""
    return torch.stack(all_gather(group, x)).sum(0)


def reduce_scatter(group: Group, x: Tensor, rows: Sequence[int]) -> Tensor:
    """The sum over ranks of this rank's share of x. Rows of x are in rank order: rows[r] of them belong to rank r."""
    return torch.stack(group.exchange(x.split(list(rows)))).sum(0)


class Thread:
    """A rank that is a thread. mail: [from rank][to rank], seen by all threads."""

    def __init__(self, rank: int, mail: list[Sequence[Tensor]], everybody: threading.Barrier) -> None:
        self.rank, self.size = rank, len(mail)
        self._mail, self._everybody = mail, everybody

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        self._mail[self.rank] = parts
        self._everybody.wait()
        received = [sent[self.rank].clone() for sent in self._mail]
        self._everybody.wait()  # no rank posts again before all have read
        return received


class Process:
    """This process as a rank of torch.distributed's default group, which must be initialised with gloo."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        sent = torch.tensor([len(part) for part in parts])
        arriving = torch.empty_like(sent)
        dist.all_to_all_single(arriving, sent)
        rows = arriving.tolist()
        received = parts[0].new_empty(sum(rows), *parts[0].shape[1:])
        dist.all_to_all_single(received, torch.cat(list(parts)), rows, sent.tolist())
        return list(received.split(rows))


def simulate(size: int, run: Callable[[Group], Result]) -> list[Result]:
    """run(group) on each of `size` ranks, threads of this process; returns their results in rank order.

    If a rank raises, the others stop waiting for it, and its exception is raised here.
    """
    mail: list[Sequence[Tensor]] = [()] * size
    everybody = threading.Barrier(size)

    def of(rank: int) -> Result:
        try:
            return run(Thread(rank, mail, everybody))
        except BaseException:
            everybody.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        running = [threads.submit(of, rank) for rank in range(size)]
    failed = [error for error in (rank.exception() for rank in running) if error is not None]
    for error in sorted(failed, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [rank.result() for rank in running]
