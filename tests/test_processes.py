"""What passes between pytest and an engine's process, and what becomes of a process that says something else."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from moe_conformance.catalogue.case import Case
from moe_conformance.judging.verdict import Outcome, Refusal, Result, Verdict
from moe_conformance.running.discovery import Target
from moe_conformance.running.messages import Answer, Check, Hello, Message, Probe, Unstartable, decode, encode
from moe_conformance.running.process import EngineProcess

CASE = Case("a-case", stage="align", clause="align.whole-blocks")
HELLO = encode(Hello("scripted", "1", "cpu"))
PASS = Outcome(Verdict.PASS)


def a_check(engine: Any, case: Case) -> None: ...


@pytest.mark.parametrize(
    "message",
    [
        Probe(1, "layer"),
        Check(2, "suites.align.test_x", "test_y", "a-case"),
        Hello("name", "0.1", "cuda"),
        Unstartable("no package", is_missing=True),
        Answer(3, Outcome(Verdict.FAIL, "wrong", facts={"shape": [1, 2]})),
        Answer(4, Outcome(Verdict.UNSUPPORTED, "no", refusal=Refusal.LIMIT)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    line = encode(message)
    assert decode(line) == message and line.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"number": None}, "number: got None, want int"),
        ({"number": True}, "number: got True, want int"),
        ({"colour": "red"}, "got the keys ['colour', 'number', 'outcome'], want ['number', 'outcome']"),
        ({"outcome": {"verdict": "pass"}}, "got the keys ['verdict'], want ['facts', 'message', 'refusal', 'verdict']"),
        ({"outcome": {**json.loads(encode(Answer(1, PASS)))["outcome"], "verdict": "good"}}, "'good' is not a valid"),
        ({"kind": "Question"}, "KeyError: 'Question'"),
    ],
)
def test_a_line_with_other_keys_or_values_is_no_message(change: dict[str, Any], words: str) -> None:
    line = json.dumps(json.loads(encode(Answer(1, PASS))) | change)
    with pytest.raises(ValueError) as refused:
        decode(line)
    assert words in str(refused.value)


def test_a_result_line_with_other_keys_is_refused() -> None:
    line = Result("e", "c", "k", "x", "layer", Verdict.FAIL, "wrong", 1.5, "SHOULD").as_line()
    assert Result.from_line(line) == Result("e", "c", "k", "x", "layer", Verdict.FAIL, "wrong", 1.5, "SHOULD")
    with pytest.raises(ValueError, match="without \\['level'\\] and with \\['colour'\\]"):
        Result.from_line({key: value for key, value in line.items() if key != "level"} | {"colour": "red"})


class Scripted(EngineProcess):
    """Its process says these lines, one at the start and one for each question, and counts its starts."""

    def __init__(self, *lines: str) -> None:
        super().__init__(Target("scripted", "fake_engines:AlwaysWrong"), 20.0, {})
        self.lines, self.starts = lines, 0

    def _command(self) -> list[str]:
        self.starts += 1
        code = f"import sys\nfor line in {self.lines!r}:\n    print(line, end='', flush=True)\n    sys.stdin.readline()"
        return [sys.executable, "-c", code]


def test_an_answer_belongs_to_its_question() -> None:
    process = Scripted(HELLO, encode(Answer(1, PASS)), encode(Answer(1, PASS)))
    outcome = process.run("module", a_check, CASE)
    assert outcome.verdict is Verdict.ERROR
    assert "want the answer to question 2; the process was killed" in outcome.message
    assert process._process is None


def test_what_is_no_message_closes_the_process() -> None:
    process = Scripted(HELLO, encode(Answer(1, PASS)), "the engine's log\n")
    outcome = process.run("module", a_check, CASE)
    assert outcome.verdict is Verdict.ERROR and "got \"the engine's log" in outcome.message
    assert process._process is None


def test_a_stage_is_probed_once_and_a_lost_process_started_again() -> None:
    """The second start, after the process ended, answers to questions of later numbers."""
    process = Scripted(HELLO, encode(Answer(1, PASS)), encode(Answer(2, PASS)))
    assert process.run("module", a_check, CASE) == PASS
    assert process.run("module", a_check, CASE).verdict is Verdict.CRASH  # it had no more to say
    process.lines = (HELLO, encode(Answer(4, PASS)))
    assert (process.run("module", a_check, CASE), process.starts) == (PASS, 2)
    process.close()


def test_a_process_that_cannot_start_is_not_tried_again() -> None:
    process = Scripted(encode(Unstartable("no package", is_missing=True)))
    for _ in range(2):
        assert process.run("module", a_check, CASE) == Outcome(Verdict.UNAVAILABLE, "no package")
    assert process.starts == 1
