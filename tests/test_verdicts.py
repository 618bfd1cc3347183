"""Each way in which an engine can misbehave gets its own verdict, and costs its own cases only."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from moe_conformance.catalogue.case import catalogue
from moe_conformance.errors import UsageError
from moe_conformance.running import known

CASES = ("layer-tiny-plain", "layer-tiny-latent", "layer-tiny-shared-padded-hidden")
CHECK = "padding_never_reaches_the_output"
FAKES = (
    "AlwaysWrong",
    "Crashes",
    "Hangs",
    "ClaimsTooMuch",
    "ClaimsTooLittle",
    "WritesIntoInputs",
    "AdapterBroken",
    "NotInstalled",
    "Noisy",
)


class Run(NamedTuple):
    """A finished `moe-conformance run`: exit code, verdict and message by (engine, case), the terminal's text."""

    code: int
    verdicts: dict[str, list[str]]
    messages: dict[tuple[str, str], str]
    text: str
    errors: str


def run(folder: Path, engines: tuple[str, ...], *arguments: str) -> Run:
    """Judge these engines on CASES by CHECK, in a process and a folder of their own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    options = [item for engine in engines for item in ("--engine", engine)]
    options += [item for case in CASES for item in ("--case", case)]
    done = subprocess.run(
        [sys.executable, "-m", "moe_conformance.cli", "run", *options, "--out", "out", "-k", CHECK, *arguments],
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
    messages = {(line["engine"], line["case"]): line["message"] for line in results}
    return Run(done.returncode, verdicts, messages, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every fake engine, judged in one run."""
    engines = tuple(f"fake_engines:{name}" for name in FAKES)
    return run(tmp_path_factory.mktemp("fakes"), engines, "-n", "0", "--timeout", "20")


def test_a_wrong_engine_fails_and_is_told_why(fakes: Run) -> None:
    assert (fakes.code, fakes.verdicts["always-wrong"]) == (1, ["fail"] * 3)
    message = fakes.messages["always-wrong", "layer-tiny-plain"]
    for part in ("first at [0, 0]: got", "times the bound", "clause:", "vllm#40794", "--case layer-tiny-plain"):
        assert part in message
    assert re.search(r"^always-wrong +0/3, 3 fail$", fakes.text, re.MULTILINE)


def test_a_crash_costs_its_case_and_leaves_last_words(fakes: Run) -> None:
    assert fakes.verdicts["crashes"] == ["fail", "crash", "fail"]
    message = fakes.messages["crashes", "layer-tiny-latent"]
    assert "SIGSEGV" in message and "about to read address 1" in message


def test_a_hang_costs_its_case_and_is_killed(fakes: Run) -> None:
    assert fakes.verdicts["hangs"] == ["fail", "timeout", "fail"]
    assert "no answer within 20 s; the process was killed" in fakes.messages["hangs", "layer-tiny-latent"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("claims-too-much", "capture_session"),
        ("claims-too-little", "route: not declared in capabilities, yet it answers"),
        ("writes-into-inputs", "x: the engine wrote into its input"),
        ("adapter-broken", "a misspelt attribute"),
    ],
)
def test_an_adapter_that_is_not_what_it_says_is_an_error(fakes: Run, name: str, words: str) -> None:
    assert fakes.verdicts[name] == ["error"] * 3
    assert words in fakes.messages[name, "layer-tiny-plain"]


def test_an_engine_asked_for_that_cannot_start_fails_the_run(fakes: Run) -> None:
    assert fakes.verdicts["not-installed"] == ["unavailable"] * 3
    assert "pip install fake-engine" in fakes.messages["not-installed", "layer-tiny-plain"]


def test_what_an_engine_prints_is_not_taken_for_an_answer(fakes: Run) -> None:
    assert fakes.verdicts["noisy"] == ["fail"] * 3


def test_the_stream_ends_with_a_footer_that_counts_every_verdict(fakes: Run) -> None:
    assert sum(len(verdicts) for verdicts in fakes.verdicts.values()) == len(CASES) * len(FAKES)
    assert "3 unavailable" in fakes.text


def test_unsupported_is_neither_pass_nor_failure(tmp_path: Path) -> None:
    done = run(tmp_path, ("fake_engines:NoStages",), "-n", "0")
    assert (done.code, done.verdicts["no-stages"]) == (0, ["unsupported"] * 3)
    assert "unsupported" in done.text and "100% of 3 results" in done.text


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
    assert "take the entry out" in done.messages["reference", CASES[0]]


def test_a_run_whose_only_failures_are_known_succeeds(tmp_path: Path) -> None:
    file = write_known(tmp_path / "k.toml", "always-wrong", *({"case": f'"{case}"'} for case in CASES))
    assert run(tmp_path, ("fake_engines:AlwaysWrong",), "--known", str(file), "-n", "0").code == 0


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"case": '"no-such-case"'}, "no case is called 'no-such-case'"),
        ({"check": '"no_such_check"'}, "no check is called 'no_such_check'"),
        ({"kind": '"sometimes"'}, "want one of never, not_yet"),
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


def test_a_wrong_file_is_a_usage_error_with_its_message_under_xdist_too(tmp_path: Path) -> None:
    file = write_known(tmp_path / "known.toml", "reference", {"case": '"no-such-case"'})
    done = run(tmp_path, ("reference",), "--known", str(file), "-n", "2")
    assert (done.code, "no case is called 'no-such-case'" in done.errors) == (2, True), done


def test_an_entry_with_another_cases_check_fails_the_run_that_judges_its_case(tmp_path: Path) -> None:
    (case,) = [case for case in catalogue().values() if case.bug_class == "ties-nan-duplicates"][:1]
    file = write_known(tmp_path / "known.toml", "reference", {"case": f'"{case.id}"'})
    command = ["run", "--engine", "reference", "--case", case.id, "--known", str(file), "-n", "0"]
    done = subprocess.run([sys.executable, "-m", "moe_conformance.cli", *command], text=True, capture_output=True)
    assert done.returncode == 1 and f"{case.id} has no check {CHECK!r}, only" in done.stdout


def test_an_engine_that_spoils_its_weights_is_told_which() -> None:
    options = ["--engine", "fake_engines:WritesIntoWeights", "--case", "family-mixtral-one-token", "-n", "0"]
    command = [sys.executable, "-m", "moe_conformance.cli", "run", *options]
    done = subprocess.run(command, text=True, capture_output=True, cwd=Path(__file__).parent)
    assert done.returncode == 1 and "tensors['experts.w2']: the engine wrote into its input" in done.stdout
