"""Ranks with tokens of their own: that processes get what threads do, and what becomes of a rank that fails."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from every_check import CHECKS

from moe_conformance.catalogue.case import catalogue
from moe_conformance.engine import Exchanged, ExchangeInputs, Unsupported
from moe_conformance.engines import torchtitan
from moe_conformance.engines.reference import Reference
from moe_conformance.errors import Nonconformance
from moe_conformance.judging.judge import Judge
from moe_conformance.judging.verdict import Verdict
from moe_conformance.protocol.limits import extent_of
from moe_conformance.reference_impl.parallel.exchange import exchange
from moe_conformance.running.discovery import Target
from moe_conformance.suites.exchange.processes import exchange_in_processes
from moe_conformance.suites.exchange.ranks import Layer

PROCESSES = catalogue()["exchange-ep2-processes"]


def test_a_token_without_an_expert_is_sent_nowhere_and_gets_zeros() -> None:
    layer = Layer(catalogue()["exchange-dropped"])
    found = exchange(layer.steps[0])
    for inputs, got in zip(layer.steps[0], found, strict=True):
        nowhere = (inputs.ids < 0).all(-1)
        assert nowhere.any() and not got.output[nowhere].any() and got.output[~nowhere].any(-1).all()
        assert got.arrived is not None and (got.arrived.ids >= 0).any(-1).all()


def test_bfloat16_holds_no_value_of_a_float32_row_but_zero() -> None:
    x = Layer(catalogue()["exchange-ep3"]).steps[0][0].x
    assert ((x != x.bfloat16().float()) | (x == 0)).all() and x.any(-1).all()


def test_a_limit_is_on_the_largest_rank() -> None:
    step = Layer(catalogue()["exchange-uneven"]).steps[0]
    assert extent_of(step) == {
        "dtype": "float32", "tokens": 7, "top_k": 3, "pairs": 21, "experts": 12, "D": 24, "F": 16,
    }  # fmt: skip


def test_real_ranks_compute_what_threads_do_again_and_again() -> None:
    engine = Judge(Target("reference", "moe_conformance.engines.reference:Reference")).engine
    for name in ("exchange-after-larger", "exchange-ep2"):
        layer = Layer(catalogue()[name])
        found = exchange_in_processes(engine, layer.steps)
        for step, got in zip(layer.steps, found, strict=True):
            for one, other in zip(exchange(step), got, strict=True):
                assert one.output.equal(other.output)


class OneRank(Reference):
    """Something becomes of rank 1."""

    name = "one-rank"

    def exchange(self, ranks: Sequence[ExchangeInputs]) -> Sequence[Exchanged]:
        if ranks[0].rank == 1:
            self.fail()
        return super().exchange(ranks)

    def fail(self) -> None:
        raise NotImplementedError


class Refuses(OneRank):
    def fail(self) -> None:
        raise Unsupported("no ranks here")


class Raises(OneRank):
    def fail(self) -> None:
        raise Nonconformance("as the engine's own")


class Dies(OneRank):
    def fail(self) -> None:
        os._exit(3)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("engine", "want", "words"),
    [("Refuses", Verdict.UNSUPPORTED, "no ranks here"), ("Raises", Verdict.FAIL, "rank 1: as the engine's own"),
     ("Dies", Verdict.FAIL, "rank 1: got exit status 3, want an answer")],
)  # fmt: skip
def test_a_rank_that_fails_is_named_and_the_others_are_not_waited_for(engine: str, want: Verdict, words: str) -> None:
    judge = Judge(Target("ranks", f"{__name__}:{engine}"))
    (row,) = (row for row in CHECKS if row[2] is PROCESSES)
    outcome = judge.run(*row)
    assert outcome.verdict is want and words in outcome.message


def test_torchtitan_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchtitan, "find_spec", lambda name: None)
    assert (torchtitan.Torchtitan.missing() or "").startswith(
        "torchtitan is not installed; docs/torchtitan.md says how"
    )


def test_torchtitan_has_gate_and_up_apart() -> None:
    w13, w2 = torch.arange(12.0).view(1, 6, 2), torch.zeros(1, 2, 3)
    own = torchtitan._tensors({"experts.w13": w13, "experts.w2": w2}, "experts")
    assert own["w1"].equal(w13[:, :3]) and own["w3"].equal(w13[:, 3:]) and own["w2"] is w2
