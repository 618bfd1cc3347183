"""Each way in which an engine can misbehave gets its own verdict, and costs its own cases only."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moe_conformance.catalogue.case import catalogue
from moe_conformance.errors import UsageError
from moe_conformance.running import known

CASES = ("layer-tiny-padded-hidden", "layer-tiny-latent-padded-hidden", "layer-tiny-shared-padded-hidden")
CHECK = "padding_never_reaches_the_output"
# Of a second stage, by its own check, on the engines that have it.
ROUTE_CASE = "route-gemma4-e128-k8-t7-bf16-distinct"
ROUTE_CHECK = "ids_and_weights_are_those_of_the_method"
FAKES = (
    "AlwaysWrong",
    "Crashes",
    "Hangs",
    "ClaimsTooLittle",
    "NotInstalled",
    "Noisy",
    "Misspells",
    "DiesInItsProbe",
    "Declines",
    "Shouts",
)


class Run(NamedTuple):
    """A finished `moe-conformance run`: exit code, verdicts of CASES by engine, all lines, the terminal's text."""

    code: int
    verdicts: dict[str, list[str]]
    lines: dict[tuple[str, str], dict[str, Any]]
    text: str
    errors: str
    header: dict[str, Any]
    summary: str

    def message(self, engine: str, case: str) -> str:
        return str(self.lines[engine, case]["message"])


def run(folder: Path, engines: tuple[str, ...], *arguments: str) -> Run:
    """Judge these engines on CASES by CHECK and on ROUTE_CASE, in a process and a folder of their own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {name: value for name, value in inherited.items() if name != "CI"}  # for --in-process
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    options = [item for engine in engines for item in ("--engine", engine)]
    options += [item for case in (*CASES, ROUTE_CASE) for item in ("--case", case)]
    chosen = ["-k", f"{CHECK} or {ROUTE_CHECK}"]
    done = subprocess.run(
        [sys.executable, "-m", "moe_conformance.cli", "run", *options, "--out", "out", *chosen, *arguments],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
    )
    stream = folder / "out" / "verdicts.jsonl"
    lines = [json.loads(line) for line in stream.read_text().splitlines()] if stream.exists() else []
    results = [line for line in lines if line["kind"] == "result"]
    verdicts: dict[str, list[str]] = {}
    for case in CASES:
        for line in results:
            if line["case"] == case:
                verdicts.setdefault(line["engine"], []).append(line["verdict"])
    by_key = {(line["engine"], line["case"]): line for line in results}
    header, summary = lines[0] if lines else {}, folder / "out" / "summary.md"
    told = summary.read_text() if summary.exists() else ""
    return Run(done.returncode, verdicts, by_key, done.stdout, done.stderr, header, told)


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every fake engine, judged in one run."""
    engines = tuple(f"fake_engines:{name}" for name in FAKES)
    return run(tmp_path_factory.mktemp("fakes"), engines, "-n", "0", "--timeout", "4")


@pytest.mark.nightly
def test_a_wrong_engine_fails_and_is_told_why(fakes: Run) -> None:
    assert (fakes.code, fakes.verdicts["always-wrong"]) == (1, ["fail"] * 3)
    message = fakes.message("always-wrong", "layer-tiny-padded-hidden")
    for part in ("first at [0, 0]: got", "times the bound", "clause:", "vllm#40794", "--case layer-tiny-padded-hidden"):
        assert part in message
    head, *rows = fakes.text.split("MUST: failed of judged")[1].splitlines()
    assert rows[0].split()[1 + head.split().index("always-wrong")] == "3/3"


@pytest.mark.nightly
def test_a_crash_costs_its_case_and_leaves_last_words(fakes: Run) -> None:
    assert fakes.verdicts["crashes"] == ["fail", "crash", "fail"]
    message = fakes.message("crashes", "layer-tiny-latent-padded-hidden")
    assert "SIGSEGV" in message and "about to read address 1" in message


@pytest.mark.nightly
def test_a_hang_costs_its_case_and_is_killed(fakes: Run) -> None:
    assert fakes.verdicts["hangs"] == ["fail", "timeout", "fail"]
    assert "no answer within 4 s; the process was killed" in fakes.message("hangs", "layer-tiny-latent-padded-hidden")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("misspells", "did you mean 'softmax'?"),
        ("misspells", "got feature 'scale', which protocol 2 no longer has; declare 'output_scale' instead"),
    ],
)
def test_an_adapter_that_is_not_what_it_says_is_an_error(fakes: Run, name: str, words: str) -> None:
    assert fakes.verdicts[name] == ["error"] * 3
    assert words in fakes.message(name, "layer-tiny-padded-hidden")


@pytest.mark.nightly
def test_a_wrong_adapter_is_told_once_in_the_terminal_and_for_each_case_in_the_stream(fakes: Run) -> None:
    assert fakes.text.count("did you mean 'softmax'?") == 1
    assert fakes.verdicts["misspells"] == ["error"] * 3


@pytest.mark.nightly
def test_a_failed_probe_voids_its_stage_alone(fakes: Run) -> None:
    assert fakes.verdicts["claims-too-little"] == ["fail"] * 3
    assert fakes.lines["claims-too-little", ROUTE_CASE]["verdict"] == "error"
    assert "route: got an answer from a stage that is not declared" in fakes.message("claims-too-little", ROUTE_CASE)


@pytest.mark.nightly
def test_a_crash_in_a_probe_is_that_of_every_case_of_the_stage(fakes: Run) -> None:
    assert fakes.verdicts["dies-in-its-probe"] == ["crash"] * 3
    assert fakes.message("dies-in-its-probe", CASES[2]).count("in the probe of layer: the engine's process died") == 1
    assert fakes.lines["dies-in-its-probe", ROUTE_CASE]["verdict"] == "fail"


@pytest.mark.nightly
def test_refusals_are_listed_by_reason_apart_from_what_is_declared_away(fakes: Run) -> None:
    assert fakes.verdicts["declines"] == ["fail", "unsupported", "unsupported"]
    got = [
        (fakes.lines["declines", case]["refusal"], fakes.message("declines", case)) for case in (*CASES[1:], ROUTE_CASE)
    ]
    limit = ("limit", "layer: limits: D: got 12, want a multiple of 5")
    assert got == [limit, ("call", "no kernel for sm_35"), ("stage", "stage route is not offered")]
    for text in (fakes.text, fakes.summary):
        assert f"declines, beyond limits: 1 results\n  1 {limit[1]}\n" in text
        assert "declines, refused when called: 1 results\n  1 no kernel for sm_35\n" in text
        assert "declines, stages not offered: 1 results\n  1 stage route is not offered\n" in text


@pytest.mark.nightly
def test_an_engine_asked_for_that_cannot_start_fails_the_run(fakes: Run) -> None:
    assert fakes.verdicts["not-installed"] == ["unavailable"] * 3
    assert "pip install fake-engine" in fakes.message("not-installed", "layer-tiny-padded-hidden")


@pytest.mark.nightly
def test_what_an_engine_prints_is_not_taken_for_an_answer(fakes: Run) -> None:
    assert fakes.verdicts["noisy"] == ["fail"] * 3


@pytest.mark.nightly
def test_what_an_engine_shouts_leaves_stream_summary_and_terminal_whole(fakes: Run) -> None:
    assert fakes.verdicts["shouts"] == ["fail"] * 3
    message = fakes.message("shouts", CASES[0])
    assert "red \\ud800  ````<b><b>" in message and "characters left out" in message and len(message) < 25_000
    assert "\x1b" not in fakes.text and "\x00" not in fakes.text
    assert "`````text\npadding never reaches the output\nred \\ud800" in fakes.summary


@pytest.mark.nightly
def test_the_stream_ends_with_a_footer_that_counts_every_verdict(fakes: Run) -> None:
    assert sum(len(verdicts) for verdicts in fakes.verdicts.values()) == len(CASES) * len(FAKES)
    assert "4 unavailable" in fakes.text


@pytest.mark.nightly
def test_the_stream_says_by_which_protocol_and_at_which_level(fakes: Run) -> None:
    assert (fakes.header["protocol"], fakes.header["in_process"], fakes.header["strict"]) == (2, False, False)
    assert {line["level"] for line in fakes.lines.values()} == {"MUST"}


def test_an_engine_of_which_nothing_was_judged_is_a_bad_run_that_says_why(tmp_path: Path) -> None:
    done = run(tmp_path, ("fake_engines:NothingToday",), "--in-process")
    assert (done.code, done.verdicts["nothing-today"]) == (1, ["unsupported"] * 3)
    assert "nothing-today: nothing was judged: 4 unsupported, of which 3: stage layer is not offered" in done.text
    assert "unsupported" in done.text and "100% of 4 results" in done.text


def test_an_engine_that_is_away_is_a_bad_run_that_says_what_to_install(tmp_path: Path) -> None:
    done = run(tmp_path, ("fake_engines:NotInstalled",), "--in-process")
    assert done.code == 1
    assert "of which 4: no package fake-engine; pip install fake-engine" in done.text


def test_a_broken_should_is_a_verdict_of_its_own_that_fails_a_strict_run_only(tmp_path: Path) -> None:
    cases = tuple({"case": f'"{case}"'} for case in CASES[1:])
    file = write_known(tmp_path / "known.toml", "always-wrong", *cases)
    options = ("--in-process", "-p", "lenient_cases", "--known", str(file))
    usual = run(tmp_path, ("fake_engines:AlwaysWrong",), *options)
    assert (usual.code, usual.verdicts["always-wrong"]) == (0, ["broken_should", "known_failure", "known_failure"])
    assert usual.lines["always-wrong", CASES[0]]["level"] == "SHOULD"
    for title, cell in (("SHOULD: broken of judged", "1/1"), ("known failures", "2")):
        assert re.search(rf"^{title} +always-wrong\nshape-mismatch +{cell}$", usual.text, re.MULTILINE)
        assert f"| {title} | always-wrong |\n|---|---:|\n| shape-mismatch | {cell} |\n" in usual.summary
    assert (
        "## Broken SHOULDs\n\n<details><summary>broken_should: always-wrong on layer-tiny-padded-hidden"
        in usual.summary
    )
    strict = run(tmp_path, ("fake_engines:AlwaysWrong",), *options, "--strict")
    assert (strict.code, strict.verdicts) == (1, usual.verdicts)
    assert (
        "1. broken should: shape-mismatch: padding never reaches the output\n" in strict.text
        and strict.header["strict"] is True
    )


def test_known_failures_excuse_a_broken_should(tmp_path: Path) -> None:
    file = write_known(tmp_path / "known.toml", "always-wrong", *({"case": f'"{case}"'} for case in CASES))
    done = run(tmp_path, ("fake_engines:AlwaysWrong",), "--in-process", "-p", "lenient_cases", "--known", str(file))
    assert done.verdicts["always-wrong"] == ["known_failure"] * 3
    assert "broken_should: layer output" in done.message("always-wrong", CASES[0])


def write_known(file: Path, engine: str, *entries: dict[str, str]) -> Path:
    """A known-failures file; each entry is a complete one with these values replaced (TOML source)."""
    text = f'engine = "{engine}"\n'
    for entry in entries:
        whole = {"case": f'"{CASES[0]}"', "check": f'"{CHECK}"', "kind": '"never"', "issue": '"#1"', **entry}
        text += "[[known]]\n" + "".join(f"{key} = {value}\n" for key, value in whole.items())
    file.write_text(text)
    return file


def test_known_failures_excuse_what_they_name_and_nothing_that_passes(tmp_path: Path) -> None:
    wrong = write_known(
        tmp_path / "wrong.toml",
        "always-wrong",
        {"case": f'"{CASES[0]}"'},
        {"case": f'"{CASES[1]}"', "when": '{ version = ">=1", device = "cpu" }'},
        {"case": f'"{CASES[2]}"', "when": '{ version = "<1" }'},
    )
    right = write_known(tmp_path / "right.toml", "reference", {"kind": '"broken"'})
    engines = ("fake_engines:AlwaysWrong", "reference")
    done = run(tmp_path, engines, "--known", str(wrong), "--known", str(right), "-n", "0")
    assert done.code == 1
    assert done.verdicts["always-wrong"] == ["known_failure", "known_failure", "fail"]
    assert done.verdicts["reference"] == ["unexpected_pass", "pass", "pass"]
    assert "take the entry out" in done.message("reference", CASES[0])


def test_a_run_whose_only_failures_are_known_succeeds(tmp_path: Path) -> None:
    file = write_known(tmp_path / "k.toml", "always-wrong", *({"case": f'"{case}"'} for case in CASES))
    assert run(tmp_path, ("fake_engines:AlwaysWrong",), "--known", str(file), "--in-process").code == 0


def test_an_adapter_that_is_broken_is_not_excused_by_a_known_failure(tmp_path: Path) -> None:
    """It was not judged, so it did not fail as declared; nor do the cases behind it go by as told before."""
    file = write_known(tmp_path / "k.toml", "adapter-broken", {"case": f'"{CASES[0]}"'})
    done = run(tmp_path, ("fake_engines:AdapterBroken",), "--known", str(file), "--in-process")
    assert done.code == 1
    assert done.verdicts["adapter-broken"] == ["error"] * 3


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"case": '"layer-tiny-plane"'}, "did you mean 'layer-tiny-plain'?"),
        ({"check": '"padding_never_reaches_output"'}, "did you mean 'padding_never_reaches_the_output'?"),
        ({"kind": '"sometimes"'}, "kind: got 'sometimes', want never, not_yet"),
        ({"issue": '" "'}, "issue: got ' ', want where the failure is reported"),
        ({"when": '{ device = "gpu" }'}, "when.device: got 'gpu', want cpu, cuda"),
        ({"when": '{ python = "3" }'}, "want version and device"),
        ({"when": '{ version = "newer" }'}, "when.version"),
        ({"colour": '"red"'}, "unknown ['colour']"),
    ],
)
def test_a_wrong_entry_is_refused_and_named(tmp_path: Path, entry: dict[str, str], words: str) -> None:
    file = write_known(tmp_path / "known.toml", "reference", entry)
    with pytest.raises(UsageError) as refused:
        known.read(file)
    assert f"{file}, entry 1" in str(refused.value) and words in str(refused.value)


def test_files_of_one_engine_add_up_and_a_case_stands_in_one_of_them(tmp_path: Path) -> None:
    first, second, again = (
        write_known(tmp_path / f"{number}.toml", "reference", {"case": f'"{case}"'})
        for number, case in enumerate((CASES[0], CASES[1], CASES[0]))
    )
    assert set(known.read_all([first, second, first])["reference"].entries) == {(case, CHECK) for case in CASES[:2]}
    with pytest.raises(UsageError, match="is listed in another file, too; take one out"):
        known.read_all([first, again])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("known = ['a']", "entry 1: got 'a', want a [[known]] table"),
        ("known = 3", "want engine = "),
        ("\x00", "cannot read the known-failures file"),
    ],
)
def test_a_malformed_file_is_one_clear_error(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "k.toml").write_text(f'engine = "reference"\n{text}\n')
    with pytest.raises(UsageError) as refused:
        known.read(tmp_path / "k.toml")
    assert words in str(refused.value)


def test_a_wrong_file_is_a_usage_error_with_its_message_under_xdist_too(tmp_path: Path) -> None:
    file = write_known(tmp_path / "known.toml", "reference", {"case": '"no-such-case"'})
    done = run(tmp_path, ("reference",), "--known", str(file), "-n", "2")
    assert (done.code, "case: got 'no-such-case'" in done.errors) == (2, True), done


def test_an_entry_with_another_cases_check_fails_the_run_that_judges_its_case(tmp_path: Path) -> None:
    (case,) = [case for case in catalogue().values() if case.bug_class == "ties-nan-duplicates"][:1]
    file = write_known(tmp_path / "known.toml", "reference", {"case": f'"{case.id}"'})
    # An expression of markers that leaves nothing out is no reason to say nothing.
    command = ["run", "--engine", "reference", "--case", case.id, "--known", str(file), "-n", "0", "-m", "not nightly"]
    done = subprocess.run([sys.executable, "-m", "moe_conformance.cli", *command], text=True, capture_output=True)
    assert done.returncode == 1 and f"{case.id} has no check {CHECK!r}, only" in done.stdout
