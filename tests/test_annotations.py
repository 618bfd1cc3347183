"""Annotations: one a distinct failure, on one line whatever an engine says."""

from __future__ import annotations

from pathlib import Path

from test_cli import invoke, stream

from moe_conformance.judging.verdict import Result, Verdict
from moe_conformance.running.annotations import annotated


def result(
    case: str, message: str, verdict: Verdict = Verdict.FAIL, check: str = "a_check", engine: str = "e"
) -> Result:
    return Result(engine, case, check, "shape-mismatch", "layer", verdict, message)


def test_failures_that_differ_in_numbers_are_one() -> None:
    alike = [
        result("a", "3 rows differ, first at [0, 1]: got -2.5e-07"),
        result("b", "7 rows differ, first at [9, 9]: got 4"),
        result("e", "3 rows differ, first at [0, 1]: got 2", engine="f"),
    ]
    others = [result("c", "the shape differs"), result("d", alike[0].message, check="other")]
    lines = list(annotated([*alike, *others]))
    assert len(lines) == 3
    assert any(
        line.startswith("::error title=fail%3A e%2C f%3A a check::a and 2 more results%0A3 rows") for line in lines
    )


def test_what_is_as_it_should_be_is_not_annotated() -> None:
    good = (Verdict.PASS, Verdict.UNSUPPORTED, Verdict.KNOWN_FAILURE)
    assert list(annotated(result("a", "said", verdict) for verdict in good)) == []


def test_a_broken_should_is_a_warning_behind_the_errors() -> None:
    lines = list(annotated([result("a", "said", Verdict.BROKEN_SHOULD), result("b", "said", Verdict.UNEXPECTED_PASS)]))
    assert lines == [
        "::error title=unexpected_pass%3A e%3A a check::b%0Asaid",
        "::warning title=broken_should%3A e%3A a check::a%0Asaid",
    ]


def test_a_message_is_one_line_and_no_command() -> None:
    (line,) = annotated([result("a", "a check\n::add-mask::x\r\n100%" + "<b>" * 10**6, engine="e,f")])
    assert "\n" not in line and "\r" not in line and len(line) < 3000
    assert line.startswith("::error title=fail%3A e%2Cf%3A a check::a%0Aa check%0A::add-mask::x%0D%0A100%25<b>")


def test_the_last_of_many_counts_the_rest() -> None:
    many = [result("a", f"reason {letter}") for letter in "abcdefghijkl"]
    lines = list(annotated(many))
    assert len(lines) == 10 and "and 3 more distinct failures" in lines[-1]
    assert len(list(annotated(many[:10]))) == 10 and "more distinct" not in list(annotated(many[:10]))[-1]


def test_a_run_that_died_is_annotated(tmp_path: Path) -> None:
    code, said = invoke("annotate", stream(tmp_path / "dead", "pass", footer=False))
    assert code == 1 and said.startswith("::error title=moe-conformance::") and "the run died before its end" in said
    code, said = invoke("annotate", stream(tmp_path / "whole", "pass", "fail"))
    assert (code, said.count("::error")) == (0, 1)
