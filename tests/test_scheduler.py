"""xdist workers stay with an engine's process: starting one costs seconds on every worker that touches it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

import pytest

from moe_conformance.running.scheduler import OneEngineAWorker

ENGINES = ("one", "one-more", "three")
MODULES = ("config/test_c", "layer/test_l", "routing/test_r", "weights/test_w")
TESTS = [
    *("tests/test_a.py::test_x", "tests/test_a.py::test_y[one]"),
    *(f"{m}.py::test_{t}[{e}-case{number}]" for number in range(2) for e in ENGINES for m in MODULES for t in "xyz"),
]


class Worker:
    """Takes what the scheduler sends it, and runs its tests when told."""

    shutting_down = False
    gateway = SimpleNamespace(id="worker")

    def __init__(self) -> None:
        self.pending: list[int] = []
        self.done: list[str] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.pending += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def scheduled() -> tuple[Any, tuple[Worker, Worker]]:
    """A scheduler that has given two workers their first tests."""
    config = cast(
        pytest.Config, SimpleNamespace(getvalue=lambda _: ["popen"] * 2, option=SimpleNamespace(loadscopereorder=False))
    )
    scheduler: Any = OneEngineAWorker(config, None, list(ENGINES))
    pair = Worker(), Worker()
    for worker in pair:
        scheduler.add_node(worker)
        scheduler.add_node_collection(worker, TESTS)
    scheduler.schedule()
    return scheduler, pair


@pytest.fixture
def workers() -> tuple[Worker, ...]:
    """Two workers after a run in which both take equally long for every test."""
    scheduler, pair = scheduled()
    while any(worker.pending for worker in pair):
        for worker in pair:
            if worker.pending:
                index = worker.pending.pop(0)
                worker.done.append(TESTS[index])
                scheduler.mark_test_complete(worker, index)
    return pair


def test_every_test_runs_once(workers: tuple[Worker, ...]) -> None:
    assert sorted(test for worker in workers for test in worker.done) == sorted(TESTS)


def test_a_worker_ends_an_engine_before_it_takes_another(workers: tuple[Worker, ...]) -> None:
    for worker in workers:
        engines = [test.partition("[")[2].rpartition("-case")[0] for test in worker.done if "-case" in test]
        assert len([a for a, b in itertools.pairwise(engines) if a != b]) == len(set(engines)) - 1


def test_a_check_of_an_engine_stays_on_one_worker(workers: tuple[Worker, ...]) -> None:
    units = [{test.rpartition("-case")[0] for test in worker.done if "-case" in test} for worker in workers]
    assert not units[0] & units[1]


def test_workers_begin_with_different_engines(workers: tuple[Worker, ...]) -> None:
    first = [next(test.partition("[")[2] for test in worker.done if "-case" in test) for worker in workers]
    assert len(set(first)) == 2


def test_what_a_worker_died_of_is_not_run_again_and_all_else_is() -> None:
    scheduler, (left, dies) = scheduled()
    died_of = TESTS[dies.pending[0]]
    assert scheduler.remove_node(dies) == died_of
    while left.pending:
        index = left.pending.pop(0)
        left.done.append(TESTS[index])
        scheduler.mark_test_complete(left, index)
    assert sorted([*left.done, died_of]) == sorted(TESTS)
