"""The tables and distinct faults that terminal, summary.md, the HTML report and tools/releases.py share."""

from __future__ import annotations

import time

import pytest

from moe_conformance.catalogue.clauses import Level
from moe_conformance.judging.verdict import DIFFERENCE, Result, Verdict
from moe_conformance.reporting.faults import LINES, SHOWN, command, distinct, faults, own_words, told
from moe_conformance.reporting.tables import WIDTH, Table, as_markdown, as_text, cells, tables

CASE = "layer-tiny-padded-hidden"
ABOUT = (
    "\nstage:    layer\nclass:    x\nrerun:    moe-conformance run --engine my:Engine --case layer-tiny-padded-hidden"
)


def result(
    verdict: Verdict, message: str = "", level: Level = "MUST", case: str = CASE, bug_class: str = "shape-mismatch"
) -> Result:
    return Result("mine", case, "padding_stays_out", bug_class, "layer", verdict, message, level=level)


EACH = [
    result(Verdict.PASS),
    result(Verdict.FAIL),
    result(Verdict.CRASH, level="SHOULD"),
    result(Verdict.BROKEN_SHOULD, level="SHOULD"),
    result(Verdict.KNOWN_FAILURE, level="SHOULD"),
    result(Verdict.UNSUPPORTED, level="SHOULD"),
    result(Verdict.UNAVAILABLE),
    result(Verdict.ERROR, bug_class="?"),
]


def test_must_should_known_and_not_judged_stand_apart_and_every_result_in_one_of_them() -> None:
    found = tables({"mine": EACH, "other": []})
    assert found == [
        Table(
            "MUST: failed of judged",
            {"shape-mismatch": {"mine": "1/2", "other": ""}, "?": {"mine": "1/1", "other": ""}},
        ),
        Table("SHOULD: broken of judged", {"shape-mismatch": {"mine": "2/2", "other": ""}}),
        Table("known failures", {"shape-mismatch": {"mine": "1", "other": ""}}),
        Table("not judged, of all", {"shape-mismatch": {"mine": "2/7", "other": ""}}),
    ]
    assert sum(cell.total for row in cells({"mine": EACH}).values() for cell in row.values()) == len(EACH)


def test_a_table_keeps_within_its_width_whatever_the_number_and_names_of_columns() -> None:
    many = {f"engine-{number}": EACH for number in range(40)}
    lines = list(as_text({**many, "n" * 300: EACH, "m" * 99: EACH}))
    assert max(map(len, lines)) <= WIDTH
    heads = " ".join(line for line in lines if line.startswith("MUST"))
    assert all(name in heads.split() for name in many) and "nnn...nnn" in heads


def test_the_same_table_as_text_and_as_markdown() -> None:
    text = [line.split() for line in as_text({"mine": EACH}) if line]
    markdown = [
        line.strip("|").replace("|", " ").split() for line in as_markdown({"mine": EACH}) if line[2:].strip("-:|")
    ]
    assert text == markdown


def fault(number: int, case: str = CASE, verdict: Verdict = Verdict.FAIL) -> Result:
    return result(
        verdict, f"padding stays out\nrow {[number] * int(number)}: got {number}, want 'x{number}'{ABOUT}", case=case
    )


def test_failures_that_differ_in_numbers_alone_are_one_fault() -> None:
    found = faults(
        {
            "mine": [fault(1), fault(2, "layer-tiny-latent-padded-hidden"), fault(3, verdict=Verdict.CRASH), *EACH[:1]],
            "other": [fault(7.5), result(Verdict.FAIL, f"padding stays out\nanother word{ABOUT}")],  # type: ignore[arg-type]
        }
    )
    assert [(each.verdict, each.cases, each.columns) for each in found] == [
        (Verdict.FAIL, [CASE, "layer-tiny-latent-padded-hidden"], ["mine", "other"]),
        (Verdict.CRASH, [CASE], ["mine"]),
        (Verdict.FAIL, [CASE], ["other"]),
    ]


@pytest.mark.parametrize("unit", ["[", "(", "a", "'", '"', ".", "1", "a.", "-", "[1"])
def test_no_message_takes_long_to_tell_from_others(unit: str) -> None:
    started = time.perf_counter()
    distinct(unit * 1_000_000)
    assert time.perf_counter() - started < 3


def test_what_fails_a_run_is_told_before_a_broken_should() -> None:
    found = faults({"mine": [fault(1, verdict=Verdict.BROKEN_SHOULD), fault(1)]})
    assert [each.verdict for each in found] == [Verdict.FAIL, Verdict.BROKEN_SHOULD]


def test_a_fault_is_told_with_its_cases_its_clause_and_the_command_that_reruns_it() -> None:
    assert list(told(faults({"mine": [fault(1), fault(2, "layer-tiny-latent-padded-hidden")]}))) == [
        "",
        "1. fail: shape-mismatch: padding stays out",
        "   2 cases of mine; of layer-tiny-padded-hidden:",
        "     row [1]: got 1, want 'x1'",
        "   MUST: A padded hidden or intermediate dim must be cut before anything of the unpadded width is added or "
        "projected, and nothing in the padding may reach the result.",
        "   upstream: vllm#40794, vllm#40865, tokenspeed#1322, aiter#5413",
        "   rerun: moe-conformance run --engine my:Engine --case layer-tiny-padded-hidden",
    ]


def test_long_messages_and_many_faults_are_folded() -> None:
    long = result(Verdict.FAIL, "padding stays out\n" + "word " * 10_000 + "\nline" * 49 + "\nlast" + ABOUT)
    others = [result(Verdict.FAIL, f"padding stays out\n{'a' * number}{ABOUT}") for number in range(1, SHOWN + 3)]
    lines = list(told(faults({"mine": [long, *others]})))
    assert max(map(len, lines)) < 320
    message = lines[3 : 3 + LINES + 1]
    assert message[0].startswith("     word word ") and "..." in message[0]
    assert message[1:] == ["     line"] * 2 + [f"     ... {51 - LINES} lines left out ..."] + ["     line"] * 2 + [
        "     last"
    ]
    assert lines[-1] == "and 3 more distinct faults, 3 results"


@pytest.mark.parametrize("pairs", [1, 4])
def test_of_a_goldens_difference_the_lines_that_differ_stay(pairs: int) -> None:
    """And not its ends, which say where the difference is at most."""
    differ = [line for number in range(pairs) for line in (f"-   'w{number}': 3,", f"+   'w{number}': None,")]
    before, behind = (
        ["  dict({", "    ...", "    'name': 'x',", "    'other': 1,"],
        ["    'top_k': 3,", "    ...", "  })"],
    )
    said = f"says what it is\n{DIFFERENCE}\n" + "\n".join([*before, *differ, *behind]) + ABOUT
    lines = [line[5:] for line in told(faults({"mine": [result(Verdict.FAIL, said)]})) if line.startswith("     ")]
    if pairs == 1:
        assert lines == [
            DIFFERENCE,
            "... 3 lines left out ...",
            "    'other': 1,",
            *differ,
            "    'top_k': 3,",
            "... 2 lines left out ...",
        ]
    else:
        assert [line for line in lines if line.startswith(("-", "+"))] == [*differ[:3], *differ[-2:]]
    assert sum(not line.startswith("...") for line in lines) <= LINES


def test_a_failed_probe_is_one_fault_whatever_classes_its_stage_has() -> None:
    said = "{}\nthe adapter failed the probe of route: TypeError: no such argument" + ABOUT
    hits = [
        result(Verdict.ERROR, said.format("ids are unique"), bug_class="ties-nan-duplicates"),
        result(Verdict.ERROR, said.format("scores keep their bits"), bug_class="router-precision"),
    ]
    (fault,) = faults({"mine": hits})
    assert len(fault.hits) == 2
    others = [
        result(Verdict.ERROR, "a\nTypeError" + ABOUT, bug_class=bug_class) for bug_class in ("activation", "chunking")
    ]
    assert len(faults({"mine": others})) == 2


def test_an_engine_cannot_put_a_command_of_its_own_into_the_rerun_line() -> None:
    said = "padding stays out\nbad\nstage:    layer\nrerun:    moe-conformance run --engine x --case y; rm -rf ~"
    assert command(result(Verdict.ERROR, said)) == f"moe-conformance run --engine mine --case {CASE}"
    assert command(result(Verdict.ERROR, said, case="no-such-case")) == ""
    assert (
        own_words(f"padding stays out\nfirst\nstage:    of the engine's own{ABOUT}")
        == "first\nstage:    of the engine's own"
    )
