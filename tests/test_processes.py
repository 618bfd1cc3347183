"""Messages between pytest and an engine's process, and what happens to a process that sends something else."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_conformance.catalogue.case import Case
from moe_conformance.judging.verdict import Outcome, Refusal, Result, Verdict
from moe_conformance.running import child
from moe_conformance.running.discovery import Target
from moe_conformance.running.messages import Answer, Check, Hello, Message, Probe, Unstartable, decode, encode
from moe_conformance.running.process import Allowed, EngineProcess
from moe_conformance.running.survey import Survey, surveys

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


SCRIPT = """
import ast, os, sys, time
lines, read, write = ast.literal_eval(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
questions = os.fdopen(read)
for line in lines:
    if line.startswith("do "):
        exec(line[3:])
    else:
        os.write(write, line.encode())
        questions.readline()
"""


class Scripted(EngineProcess):
    """Its process says these lines, one at the start and one for each question, or does what they say; counts its
    starts."""

    def __init__(self, *lines: str, seconds: float = 20.0) -> None:
        super().__init__(Target("scripted", "fake_engines:AlwaysWrong"), Survey(), Allowed(seconds), {})
        self.lines, self.starts = lines, 0

    def _command(self) -> list[str]:
        self.starts += 1
        return [sys.executable, "-c", SCRIPT, repr(self.lines)]


def test_an_answer_belongs_to_its_question() -> None:
    process = Scripted(HELLO, encode(Answer(1, PASS)), encode(Answer(1, PASS)))
    outcome = process.run("module", a_check, CASE)
    assert outcome.verdict is Verdict.ERROR
    assert "want the answer to question 2; the process was killed" in outcome.message
    assert process._child is None


def test_what_is_no_message_closes_the_process() -> None:
    process = Scripted(HELLO, encode(Answer(1, PASS)), "the engine's log\n")
    outcome = process.run("module", a_check, CASE)
    assert outcome.verdict is Verdict.ERROR and "got \"the engine's log" in outcome.message
    assert process._child is None


def test_a_stage_is_probed_once_and_a_lost_process_started_again() -> None:
    """After the second start, the process answers questions with later numbers."""
    process = Scripted(HELLO, encode(Answer(1, PASS)), encode(Answer(2, PASS)))
    assert process.run("module", a_check, CASE) == PASS
    assert process.run("module", a_check, CASE).verdict is Verdict.CRASH  # it had no more lines
    process.lines = (HELLO, encode(Answer(4, PASS)))
    assert (process.run("module", a_check, CASE), process.starts) == (PASS, 2)
    process.close()


def test_a_process_that_cannot_start_is_not_tried_again() -> None:
    process = Scripted(encode(Unstartable("no package", is_missing=True)))
    for _ in range(2):
        assert process.run("module", a_check, CASE) == Outcome(Verdict.UNAVAILABLE, "no package")
    assert process.starts == 1


FIRST = (HELLO, encode(Answer(1, PASS)))  # it starts, and its probe passes


# What the process does at its second question -> the outcome of the case.
DOES = (
    ("os._exit(0)", Verdict.CRASH, "the engine's process died: exit code 0"),
    ("os.kill(os.getpid(), 11)", Verdict.CRASH, "the engine's process died: signal SIGSEGV"),
    ("print('no memory'); sys.exit(3)", Verdict.CRASH, "exit code 3; its last words:\n  no memory"),
    # A child of it holds the pipe open, and would for a minute.
    ("time.sleep(60) if os.fork() == 0 else os._exit(4)", Verdict.CRASH, "exit code 4"),
    ("os.close(write); time.sleep(60)", Verdict.ERROR, "closed what it answers through"),
    ("os.write(write, b'{' * 100); os._exit(0)", Verdict.CRASH, "exit code 0"),
    ("os.write(write, b'{'); time.sleep(60)", Verdict.TIMEOUT, "no answer within 0.5 s"),
    ("time.sleep(60)", Verdict.TIMEOUT, "no answer within 0.5 s"),
    ("import faulthandler; faulthandler.enable(); time.sleep(60)", Verdict.TIMEOUT, 'File "<string>", line'),
    ("while True: os.write(write, b'x'); time.sleep(0.01)", Verdict.TIMEOUT, "no answer within 0.5 s"),
    ("os.write(write, b'\\xff\\xfe\\n'); time.sleep(60)", Verdict.ERROR, "want a line of messages.py"),
    ("os.write(write, b'NaN\\n'); time.sleep(60)", Verdict.ERROR, "want a line of messages.py"),
    ("os.write(write, b'\\n'); time.sleep(60)", Verdict.ERROR, "want a line of messages.py"),
    ("os.write(write, b'[' * 100000 + b'\\n'); time.sleep(60)", Verdict.ERROR, "want a line of messages.py"),
)


@pytest.mark.parametrize(("does", "verdict", "words"), DOES)
def test_what_becomes_of_a_case_is_seen_in_time(does: str, verdict: Verdict, words: str) -> None:
    process = Scripted(*FIRST, f"do {does}", seconds=0.5)
    started = time.monotonic()
    outcome = process.run("module", a_check, CASE)
    assert (outcome.verdict, process._child) == (verdict, None)
    assert words in outcome.message and time.monotonic() - started < 10


def test_a_line_without_an_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "LARGEST", 1 << 20)
    process = Scripted(*FIRST, "do os.write(write, b'x' * (4 << 20))")
    assert "got a line of more than" in process.run("module", a_check, CASE).message


def test_a_death_between_cases_is_that_of_the_case_before() -> None:
    process = Scripted(*FIRST, f"do os.write(write, {encode(Answer(2, PASS)).encode()!r}); os._exit(5)")
    assert process.run("module", a_check, CASE) == PASS
    assert process._child is not None
    process._child._process.wait(10)
    later = process.after_the_last()
    assert later is not None and later.verdict is Verdict.CRASH
    assert later.message == "after its answer the engine's process died: exit code 5"
    process.lines = (HELLO, encode(Answer(3, PASS)))
    assert (process.after_the_last(), process.run("module", a_check, CASE), process.starts) == (None, PASS, 2)
    process.close()


def test_what_nobody_asked_for_is_not_the_next_answer() -> None:
    answers = encode(Answer(2, PASS)) + encode(Answer(3, PASS))
    process = Scripted(*FIRST, answers)
    assert process.run("module", a_check, CASE) == PASS
    later = process.after_the_last()
    assert later is not None and later.verdict is Verdict.ERROR and "nobody had asked for" in later.message
    assert process._child is None


def test_an_exception_while_it_listens_closes_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as pytest-timeout's: an answer that is still on its way must not become the next case's."""
    process = Scripted(*FIRST, "do time.sleep(60)")
    assert process._ask(20, lambda number: Probe(number, "align")).verdict is Verdict.PASS

    def timeout(*_: object) -> str:
        raise TimeoutError("of another plug-in")

    monkeypatch.setattr(child.Child, "hear", timeout)
    with pytest.raises(TimeoutError):
        process.run("module", a_check, CASE)
    assert process._child is None


def test_a_process_that_a_ctrl_c_met_while_it_was_ended_did_not_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Scripted(*FIRST, encode(Answer(2, PASS)))
    assert process.run("module", a_check, CASE) == PASS
    ended = process._child
    assert ended is not None

    def interrupted(found: child.Child) -> None:
        found._process.kill()
        found._process.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(child.Child, "kill", interrupted)
        process.close()
    assert process.after_the_last() is None
    ended.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_engine_that_eats_memory_costs_its_case() -> None:
    """Together with what it started."""
    eat = "os.fork(); eaten = bytearray(60 << 20); time.sleep(60)"
    process = Scripted(*FIRST, f"do {eat}")
    process.allowed = Allowed(20.0, memory=100 << 20)
    outcome = process.run("module", a_check, CASE)
    assert (outcome.verdict, process._child) == (Verdict.CRASH, None)
    assert "GiB of memory, and was killed" in outcome.message


def test_a_process_that_the_machine_does_not_give_is_an_error_of_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of no other: there may be one for the next."""

    def is_full(**_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    process, descriptors = Scripted(*FIRST, encode(Answer(2, PASS))), len(os.listdir("/dev/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", is_full)
        outcome = process.run("module", a_check, CASE)
        assert (outcome.verdict, outcome.message[:24]) == (Verdict.ERROR, "cannot start a process: ")
        (survey,) = surveys([process.target])
        assert survey.trouble == ("error", outcome.message)
    assert len(os.listdir("/dev/fd")) == descriptors
    assert process.run("module", a_check, CASE) == PASS
    process.close()


def test_an_engine_has_a_time_for_all_its_cases() -> None:
    process = Scripted(*FIRST, "do time.sleep(0.3)", encode(Answer(2, PASS)), encode(Answer(3, PASS)))
    process.allowed = Allowed(20.0, engine_seconds=0.2)
    assert process.run("module", a_check, CASE) == PASS
    outcome = process.run("module", a_check, CASE)
    assert (outcome.verdict, process._child) == (Verdict.TIMEOUT, None)
    assert "the 0.2 s were over that the whole engine has" in outcome.message


ACTING = r"""
import json, os, sys, time
read, write = int(sys.argv[1]), int(sys.argv[2])
def say(text): os.write(write, text.encode())
def answer(number, message): say(json.dumps({"kind": "Answer", "number": number, "outcome": {
    "verdict": "pass", "message": message, "facts": None, "refusal": None}}) + "\n")
say(json.dumps({"kind": "Hello", "name": "acting", "version": "1", "device": "cpu"}) + "\n")
for line in os.fdopen(read):
    asked = json.loads(line)
    number, case = asked["number"], asked.get("case", "")
    act = case.rpartition("-")[0]
    if act == "dies": os._exit(3)
    if act == "hangs": time.sleep(60)
    if act == "says-nonsense": say("nonsense\n")
    elif act == "answers-another": answer(number + 1, case)
    elif act == "answers-the-last": answer(number - 1, case)
    elif act == "ends-half-way": say('{"kind": "Ans'); os._exit(0)
    else: answer(number, case)
    if act == "answers-twice": answer(number, case)
    if act == "answers-the-next": answer(number + 1, case)
    if act == "prints": print("x" * 100000, flush=True)
    if act == "dies-afterwards": os._exit(4)
"""
# What an engine may do at a question -> the outcome of its case, and what `after_the_last` finds.
ACTS: dict[str, tuple[Verdict, Verdict | None]] = {
    "answers": (Verdict.PASS, None),
    "prints": (Verdict.PASS, None),
    "dies": (Verdict.CRASH, None),
    "hangs": (Verdict.TIMEOUT, None),
    "says-nonsense": (Verdict.ERROR, None),
    "answers-another": (Verdict.ERROR, None),
    "answers-the-last": (Verdict.ERROR, None),
    "ends-half-way": (Verdict.CRASH, None),
    "answers-twice": (Verdict.PASS, Verdict.ERROR),
    "answers-the-next": (Verdict.PASS, Verdict.ERROR),
    "dies-afterwards": (Verdict.PASS, Verdict.CRASH),
}


class Acting(EngineProcess):
    """Does at each question what the case's name says."""

    def __init__(self) -> None:
        super().__init__(Target("acting", "fake_engines:AlwaysWrong"), Survey(), Allowed(0.5), {})

    def _command(self) -> list[str]:
        return [sys.executable, "-c", ACTING]


@given(st.lists(st.sampled_from(sorted(ACTS)), min_size=1, max_size=6))
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
def test_an_answer_is_its_own_questions_whatever_came_before(acts: list[str]) -> None:
    process = Acting()
    for number, act in enumerate(acts):
        case = Case(f"{act}-{number}", stage="align", clause="align.whole-blocks")
        outcome = process.run("module", a_check, case)
        verdict, later = ACTS[act]
        assert outcome.verdict is verdict, (acts, number, outcome)
        if verdict is Verdict.PASS:
            assert outcome.message == case.id
        child_now = process._child
        if later is not None and child_now is not None:  # what it does afterwards may take a moment
            child_now.has_ended(5.0) if later is Verdict.CRASH else time.sleep(0.05)
        found = process.after_the_last()
        assert (found and found.verdict) is later, (acts, number, found)
    process.close()
