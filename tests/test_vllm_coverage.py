"""tools/vllm_coverage.py: what its list leaves out, and what it says of an entry that is wrong."""

from __future__ import annotations

import tomllib

import pytest
from vllm_coverage import LIST, File, functions, leave_out, table

TEXT = '''\
from kernels import fast

class Experts:
    size = 3

    def apply(self, x):
        """Words."""
        if x.is_fp8 or x.is_int8:
            return fast(x)
        elif x.is_empty:
            x = x + 1
        else:
            x = x + 2
        return x

def route(x):
    def best(row):
        return max(row)
    return [best(row) for row in x]
'''
STATEMENTS = {1, 3, 4, 6, 8, 9, 10, 11, 13, 14, 16, 17, 18, 19}


def _file(run: set[int]) -> File:
    return File("experts.py", TEXT, run & STATEMENTS, STATEMENTS - run)


def _listed(*entries: str) -> dict[str, dict[str, list[str]]]:
    return {"package": {"what": list(entries)}}


@pytest.mark.parametrize(
    ("entry", "lines"),
    [
        ("experts.py", {8, 9, 10, 11, 13, 14, 17, 18, 19}),
        ("experts.py::Experts", {8, 9, 10, 11, 13, 14}),
        ("experts.py::route.best", {18}),
        ("experts.py::Experts.apply if x.is_fp8", {9}),
        ("experts.py::Experts.apply if x.is_empty", {11}),
        ("experts.py::Experts.apply unless x.is_empty", {13}),
    ],
)
def test_an_entry_leaves_out_what_it_names(entry: str, lines: set[int]) -> None:
    file = _file(run=set())
    assert leave_out([file], _listed(entry)) == []
    assert file.statements - file.reachable == lines


@pytest.mark.parametrize(
    "entry", ["absent.py", "experts.py::Router", "experts.py::Experts.apply if x.is_f", "experts.py::route unless row"]
)
def test_an_entry_that_names_nothing_is_named(entry: str) -> None:
    (said,) = leave_out([_file(run=set())], _listed(entry))
    assert said.startswith(f"{entry}: got nothing of that name")


def test_an_entry_that_is_executed_is_named() -> None:
    file = _file(run={8, 10, 13, 14})
    (said,) = leave_out([file], _listed("experts.py::route", "experts.py::Experts.apply"))
    assert said == "experts.py::Experts.apply: got 4 statements executed, first line 8, want none: it can be reached"


def test_what_runs_on_import_does_not_count() -> None:
    file = _file(run={1, 3, 4, 6, 16, 17, 19})
    leave_out([file], _listed("experts.py::Experts"))
    assert list(table([file]))[-5:] == [
        "experts.py           9         6          3         2   66.7%",
        "all                  9         6          3         2   66.7%",
        "",
        "left out, package: 6 statements",
        "with what is quantised counted as reachable: 2 of 3, 66.7%",
    ]


def test_functions_are_listed_by_what_is_not_executed() -> None:
    file = _file(run={8, 17, 19})
    leave_out([file], _listed("experts.py::Experts.apply if x.is_fp8"))
    assert list(functions([file])) == [
        "   4 of    5  experts.py::Experts.apply  10-11 13-14",
        "   1 of    1  experts.py::route.best  18",
    ]


def test_every_kind_of_the_list_has_its_reason_and_no_entry_is_there_twice() -> None:
    kinds = tomllib.loads(LIST.read_text(encoding="utf-8"))
    entries = [entry for kind in kinds.values() for entry in kind["what"]]
    assert all(set(kind) == {"why", "what"} and kind["why"] for kind in kinds.values())
    assert len(entries) == len(set(entries))
