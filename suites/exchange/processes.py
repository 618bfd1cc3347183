"""Ranks that are processes: started once for an engine, given to each case, and started again after a failure."""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from moe_conformance.engine import Exchanged, ExchangeInputs
from moe_conformance.errors import Broken, Nonconformance, Unsupported
from moe_conformance.judging.verdict import Outcome, Verdict

# Seconds for a rank to answer: an engine may take long to import, and a collective that one rank leaves out ends after
# COLLECTIVE_SECONDS in the others.
ANSWER_SECONDS = 100.0
COLLECTIVE_SECONDS = 40.0
# After a first failure, seconds for the other ranks to say theirs: it may be the cause.
OTHERS_SECONDS = 0.5


def exchange_in_processes(engine: Any, steps: Sequence[Sequence[ExchangeInputs]]) -> list[list[Exchanged]]:
    """What each rank got at each step. engine: as checks get it; its class is found again by `engine.path`.

    Raises what a call in this process would raise, with the rank that it came from.
    """
    return _crew(engine.path, engine.info.device).exchange(steps)


@cache
def _crew(path: str, device: str) -> _Crew:
    return _Crew(path, device)


class _Crew:
    def __init__(self, path: str, device: str) -> None:
        self._path, self._backend = path, "gloo" if device == "cpu" else "nccl"
        self._ranks: list[tuple[subprocess.Popen[bytes], Connection]] = []
        self._folder = tempfile.TemporaryDirectory()
        self._cases = 0
        atexit.register(self._end)

    def exchange(self, steps: Sequence[Sequence[ExchangeInputs]]) -> list[list[Exchanged]]:
        size = len(steps[0])
        while len(self._ranks) < size:
            self._ranks.append(self._start())
        self._cases += 1
        meeting = f"file://{self._folder.name}/{self._cases}"
        answers: dict[int, tuple[Outcome, list[Exchanged]]] = {}
        try:
            for rank in range(size):
                request = (self._backend, meeting, rank, size, COLLECTIVE_SECONDS, [step[rank] for step in steps])
                self._ranks[rank][1].send_bytes(pickle.dumps(request))
            self._listen(answers, size)
        except OSError as error:
            answers[-1] = Outcome(Verdict.FAIL, f"{type(error).__name__}: {error}"), []
        if failed := {rank: outcome for rank, (outcome, _) in answers.items() if outcome.verdict is not Verdict.PASS}:
            self._end()
            raise _error(failed)
        return [[answers[rank][1][step] for rank in range(size)] for step in range(len(steps))]

    def _listen(self, answers: dict[int, tuple[Outcome, list[Exchanged]]], size: int) -> None:
        """Fill in what each rank answers; those that a failed one leaves waiting are not waited for."""
        deadline = time.monotonic() + ANSWER_SECONDS
        by_connection = {self._ranks[rank][1]: rank for rank in range(size)}
        while by_connection:
            ready = wait(list(by_connection), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = by_connection.pop(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    status = self._ranks[rank][0].wait()
                    answers[rank] = Outcome(Verdict.FAIL, f"got exit status {status}, want an answer"), []
                if answers[rank][0].verdict is not Verdict.PASS:
                    deadline = min(deadline, time.monotonic() + OTHERS_SECONDS)
        if by_connection and all(outcome.verdict is Verdict.PASS for outcome, _ in answers.values()):
            for rank in by_connection.values():
                answers[rank] = Outcome(Verdict.FAIL, f"got no answer in {ANSWER_SECONDS:g} s, want one"), []

    def _start(self) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = Pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", "moe_conformance.suites.exchange.rank", str(theirs.fileno()), self._path],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        return process, ours

    def _end(self) -> None:
        for process, connection in self._ranks:
            process.kill()
            process.wait()
            connection.close()
        self._ranks.clear()


def _has_descriptor(stream: Any) -> bool:
    try:
        return stream.fileno() >= 0  # type: ignore[no-any-return]
    except (AttributeError, OSError, ValueError):
        return False


def _error(failed: dict[int, Outcome]) -> Exception:
    """Refusals, then errors of the adapter, tell more than what the other ranks made of them."""
    said = "; ".join(f"rank {rank}: {outcome.message}" for rank, outcome in failed.items())
    verdicts = {outcome.verdict for outcome in failed.values()}
    if Verdict.UNSUPPORTED in verdicts:
        return Unsupported(next(o.message for o in failed.values() if o.verdict is Verdict.UNSUPPORTED))
    return Broken(said) if Verdict.ERROR in verdicts else Nonconformance(said)
