"""Shards: every case in one of them, the same one everywhere; and their results joined are those of one run."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from durations import durations
from test_cli import invoke

from moe_conformance.catalogue.case import catalogue
from moe_conformance.errors import UsageError
from moe_conformance.reporting.stream import read
from moe_conformance.running.shards import Shard, measured

CASES = [f"case-{number}" for number in range(40)]


def picked(of: int, cases: list[str], durations: dict[str, int] | None = None) -> list[frozenset[str]]:
    return [Shard(number, of).pick(cases, durations) for number in range(1, of + 1)]


@pytest.mark.parametrize("of", [1, 2, 3, 8, 50])
def test_every_case_is_in_one_shard(of: int) -> None:
    half = {case: len(case) + number for number, case in enumerate(CASES[::2])}
    parts = picked(of, CASES, half)
    assert sorted(case for part in parts for case in part) == sorted(CASES)


def test_shards_take_about_as_long() -> None:
    took = {case: 1 + number**2 for number, case in enumerate(CASES)}
    loads = [sum(took[case] for case in part) for part in picked(4, CASES, took)]
    assert max(loads) - min(loads) <= max(took.values()) // 10


def test_a_case_that_was_never_measured_moves_no_other() -> None:
    took = dict.fromkeys(CASES, 5)
    before, after = picked(3, CASES, took), picked(3, [*CASES, "new"], took)
    assert [part - {"new"} for part in after] == before
    assert len({sum("new-" in case for case in part) for part in picked(4, [f"new-{n}" for n in range(400)], {})}) > 1
    assert all(part for part in picked(4, [f"new-{n}" for n in range(400)], {}))


def test_the_split_is_the_same_on_every_machine() -> None:
    """Held as a digest: what changes it splits the shards of one run by two rules, where machines differ in release."""
    parts = picked(8, CASES[:30], {case: (7 * number) % 11 + 1 for number, case in enumerate(CASES[:20])})
    text = "\n".join(",".join(sorted(part)) for part in parts)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "66dcadfeb9a2a6b5"


def test_the_cases_that_there_are_were_measured() -> None:
    """Where a fifth is new, it is time for tools/durations.py."""
    assert len(measured().keys() & catalogue().keys()) >= 0.8 * len(catalogue())


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "1.5/2", "a/b", "1/99999", "\uff11/2"])
def test_what_is_no_shard_is_a_usage_error(text: str) -> None:
    code, said = invoke("run", "--engine", "reference", "-n", "0", f"--shard={text}")
    assert (code, f"--shard: got {text!r}, want NUMBER/COUNT" in said) == (2, True), said


def test_a_shard_without_a_case_is_a_run_without_a_fault(tmp_path: Path) -> None:
    options = ["--engine", "reference", "--case", "layer-tiny-padded-hidden", "-n", "0", "--collect-only"]
    runs = [invoke("run", *options, "--shard", f"{number}/2") for number in (1, 2)]
    assert [(code, "[reference-layer-tiny-padded-hidden]" in said) for code, said in runs] == [(0, True), (0, False)]


def test_a_shard_of_which_nothing_was_judged_is_for_merge_to_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)  # where the engine is imported from
    options = ["--engine", "fake_engines:NothingToday", "--case", "align-e60-k6", "-n", "0"]
    assert invoke("run", *options)[0] == 1
    assert invoke("run", *options, "--shard", "1/1")[0] == 0


HEADER = {
    "kind": "header",
    "suite": "1",
    "protocol": 2,
    "engines": ["e"],
    "cases": 1,
    "in_process": False,
    "strict": False,
    "selection": {"tier": "core", "total": 2},
    "chosen": True,
    "away": {},
}
RESULT = {"kind": "result", "engine": "e", "check": "k", "stage": "layer", "class": "shape-mismatch", "message": ""}
RESULT |= {"seconds": 0.0, "level": "MUST", "refusal": None}


def shard(folder: Path, number: int, verdict: str = "pass", of: int = 2, **others: Any) -> Path:
    """The results of a shard of one case. others: of the header; facts, exit and count of the lines below it."""
    folder.mkdir(parents=True)
    facts, code, count = others.pop("facts", {"version": "1", "device": "cpu"}), others.pop("exit", None), 1
    code = int(verdict not in ("pass", "broken_should", "unsupported")) if code is None else code
    lines: list[dict[str, Any]] = [{**HEADER, "shard": {"number": number, "of": of}, **others}]
    lines += [{"kind": "engine", "engine": "e", **facts}, {**RESULT, "case": f"c{number}", "verdict": verdict}]
    lines += [{"kind": "footer", "exit": code, "results": count, "counts": {}, "deselected": 0}]
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def merged(tmp_path: Path, *parts: Path) -> tuple[int, str]:
    return invoke("merge", *map(str, parts), "--out", str(tmp_path / "merged"))


def test_two_shards_are_one_run(tmp_path: Path) -> None:
    code, said = merged(tmp_path, shard(tmp_path / "b", 2), shard(tmp_path / "a", 1))
    assert code == 0 and "0/2" in said and "junit.xml" not in said, said
    assert [result.case for result in read(tmp_path / "merged")] == ["c1", "c2"]
    first, *_ = map(json.loads, (tmp_path / "merged" / "verdicts.jsonl").read_text().splitlines())
    assert (first["cases"], first["shard"], first["merged"]) == (2, None, 2)
    assert "| shape-mismatch | 0/2 |" in (tmp_path / "merged" / "summary.md").read_text()


@pytest.mark.parametrize(
    ("verdicts", "strict", "want"),
    [
        (("pass", "fail"), False, 1),
        (("pass", "crash"), False, 1),
        (("pass", "unexpected_pass"), False, 1),
        (("pass", "broken_should"), False, 0),
        (("pass", "broken_should"), True, 1),
        (("pass", "known_failure"), False, 0),
        (("pass", "unsupported"), False, 0),
        (("unsupported", "unsupported"), False, 1),
    ],
)
def test_the_exit_code_is_that_of_one_run(verdicts: tuple[str, str], strict: bool, want: int, tmp_path: Path) -> None:
    parts = [
        shard(tmp_path / str(number), number, verdict, strict=strict, exit=0)
        for number, verdict in enumerate(verdicts, 1)
    ]
    code, said = merged(tmp_path, *parts)
    assert code == want, said
    assert ("e: nothing was judged: 2 unsupported" in said) == (verdicts[0] == "unsupported")


def test_a_missing_shard_is_said_and_the_rest_shown(tmp_path: Path) -> None:
    code, said = merged(tmp_path, shard(tmp_path / "a", 1, of=3), shard(tmp_path / "b", 3, of=3))
    assert code == 1 and "shard 2/3 is missing" in said and "0/2" in said, said


def test_a_shard_given_twice_is_counted_once(tmp_path: Path) -> None:
    parts = shard(tmp_path / "a", 1), shard(tmp_path / "b", 2), shard(tmp_path / "c", 1)
    code, said = merged(tmp_path, *parts)
    assert code == 1 and f"{tmp_path / 'c'}: got shard 1/2, which {tmp_path / 'a'} is, too" in said
    assert len(read(tmp_path / "merged")) == 2


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"suite": "2"}, "suite: got '2', want '1'"),
        ({"protocol": 3}, "protocol: got 3, want 2"),
        ({"selection": {"tier": "full", "total": 2}}, "selection: got {'tier': 'full'"),
        ({"engines": ["f"]}, "engines: got ['f'], want ['e']"),
        ({"strict": True}, "strict: got True"),
        ({"of": 3}, "got a shard of 3, want one of 2"),
        ({"facts": {"version": "2", "device": "cpu"}}, "e: got {'device': 'cpu', 'version': '2'}, want"),
        ({"shard": None}, "got shard None, want the results of `moe-conformance run --shard 1/2 --out`"),
    ],
)
def test_a_shard_of_another_run_is_left_out(others: dict[str, Any], words: str, tmp_path: Path) -> None:
    code, said = merged(tmp_path, shard(tmp_path / "a", 1), shard(tmp_path / "b", 2, **others))
    assert code == 1 and f"left out: {tmp_path / 'b'}: {words}" in said and "shard 2/2 is missing" in said, said
    assert len(read(tmp_path / "merged")) == 1


@pytest.mark.parametrize("value", [None, 10**9, [[1]], {"a": 1}], ids=["null", "number", "list", "object"])
@pytest.mark.parametrize("key", [*sorted(HEADER.keys() - {"kind"}), "shard", "number", "of"])
def test_a_header_that_is_none_is_no_traceback(key: str, value: Any, tmp_path: Path) -> None:
    others = {"shard": {"number": 1, "of": 2, key: value}} if key in ("number", "of") else {key: value}
    code, said = merged(tmp_path, shard(tmp_path / "a", 2), shard(tmp_path / "b", 1, **others))
    assert code in (0, 1) and "e " in said and len(said) < 10_000, said


def test_a_shard_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    cut = shard(tmp_path / "b", 2) / "verdicts.jsonl"
    cut.write_text("\n".join(cut.read_text().splitlines()[:-1]) + "\n")
    code, said = merged(tmp_path, shard(tmp_path / "a", 1), cut)
    assert code == 1 and "the run died before its end" in said and "0/1" in said, said


def test_results_that_a_footer_does_not_count_are_left_out(tmp_path: Path) -> None:
    doubled = shard(tmp_path / "b", 2) / "verdicts.jsonl"
    lines = doubled.read_text().splitlines()
    doubled.write_text("\n".join([*lines[:-1], *lines[2:]]) + "\n")
    code, said = merged(tmp_path, shard(tmp_path / "a", 1), doubled)
    assert code == 1 and "got 2 results, want 1, as its footer counts" in said, said


def test_a_shard_that_ended_badly_without_a_bad_result_is_no_good_run(tmp_path: Path) -> None:
    code, said = merged(tmp_path, shard(tmp_path / "a", 1, exit=2), shard(tmp_path / "b", 2))
    assert code == 1 and "shard 1/2: its run ended with exit code 2, and no result says why" in said, said


def test_shards_that_were_not_split_alike_are_no_good_run(tmp_path: Path) -> None:
    code, said = merged(tmp_path, shard(tmp_path / "a", 1), shard(tmp_path / "b", 2, cases=2))
    assert code == 1 and "have 3 cases together, want 2" in said, said


def test_nothing_that_can_be_joined_is_a_usage_error(tmp_path: Path) -> None:
    assert merged(tmp_path, tmp_path / "absent")[0] == 2
    part = shard(tmp_path / "a", 1, of=1)
    code, said = invoke("merge", str(part), "--out", str(part))
    assert code == 2 and "which is one of the results; name another folder" in said


def test_durations_are_the_mean_of_engines_and_the_later_of_runs(tmp_path: Path) -> None:
    def run(name: str, engine: str, *seconds: float, verdict: str = "pass") -> Path:
        folder = shard(tmp_path / name, 1)
        lines = (folder / "verdicts.jsonl").read_text().splitlines()
        made = {**RESULT, "engine": engine, "case": "layer-tiny-padded-hidden", "verdict": verdict}
        results = [json.dumps({**made, "check": f"k{took}", "seconds": took}) for took in seconds]
        (folder / "verdicts.jsonl").write_text("\n".join([lines[0], *results, lines[-1]]) + "\n")
        return folder

    runs = [run("1", "a", 9.0), run("2", "a", 0.5, 0.5), run("3", "b", 3.0), run("4", "c", 8.0, verdict="unsupported")]
    assert durations(runs) == {"layer-tiny-padded-hidden": 2000}


@pytest.mark.nightly
def test_shards_of_a_real_run_are_that_run(tmp_path: Path) -> None:
    def run(*options: str) -> int:
        command = [sys.executable, "-m", "moe_conformance", "run", "--engine", "fake_engines:AlwaysWrong", "-n", "0"]
        command += ["--engine", "reference", "--tier", "smoke", *options]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True).returncode

    def answers(name: str) -> set[tuple[str, ...]]:
        return {(each.engine, each.case, each.check, each.verdict, each.message) for each in read(tmp_path / name)}

    one = run("--out", str(tmp_path / "one"))
    parts = [run("--shard", f"{number}/2", "--out", str(tmp_path / str(number))) for number in (1, 2)]
    code, said = merged(tmp_path, tmp_path / "1", tmp_path / "2")
    assert (one, code) == (1, 1) and 1 in parts, said
    assert answers("merged") == answers("one") == answers("1") | answers("2")
    assert not answers("1") & answers("2")
    tables = [(tmp_path / name / "summary.md").read_text().partition("<details>")[0] for name in ("one", "merged")]
    assert tables[0] == tables[1]


def test_what_is_no_shard_raises() -> None:
    with pytest.raises(UsageError):
        Shard.parse("2")
