"""The command line around `run`: usage errors, lists, explanations, comparison of runs."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from moe_conformance.catalogue import aliases
from moe_conformance.catalogue.case import Case, catalogue
from moe_conformance.catalogue.recipe_words import meaning, unused
from moe_conformance.cli import main
from moe_conformance.errors import UsageError
from moe_conformance.model.specs import MLPSpec, RoutingSpec
from moe_conformance.protocol.stages import STAGES
from moe_conformance.reporting import doctor
from moe_conformance.reporting.doctor import TRIES, fastest_loop
from moe_conformance.reporting.explain import explain, spelled
from moe_conformance.reporting.stream import compare, read
from moe_conformance.running import known
from moe_conformance.running.discovery import Target

FOOTER = {"kind": "footer", "exit": 0, "results": 1, "counts": {}}


def invoke(*arguments: str) -> tuple[int, str]:
    """Exit code, and what was printed to either stream."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output), pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0), output.getvalue()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "refrence"], "did you mean 'reference'?"),
        (["--engine", "no.such.module:Engine"], "No module named 'no'"),
        (["--engine", "moe_conformance.engines.reference:Engin"], "has no attribute 'Engin'"),
        (["--class", "shape-missmatch"], "shape-mismatch"),
        (["--case", "layer-tiny-plane"], "layer-tiny-plain"),
        (["--case", "layer-tiny-plane"], "did you mean 'layer-tiny-plain'?"),
        (["--tier", "huge"], "'smoke', 'core', 'full', 'gpu'"),
        (["--tier", "smok"], "did you mean smoke?"),
        (["--engin", "reference", "-n", "0"], "did you mean --engine?"),
    ],
)
def test_a_misspelt_name_is_a_usage_error_that_lists_what_there_is(arguments: list[str], words: str) -> None:
    code, output = invoke("run", *arguments)
    assert code == 2
    assert words in " ".join(output.split())


@pytest.mark.parametrize("option", ["--timeout", "--engine-timeout", "--memory"])
@pytest.mark.parametrize("amount", ["0", "-1", "nan", "inf"])
def test_what_is_no_amount_is_a_usage_error(option: str, amount: str, tmp_path: Path) -> None:
    code, said = invoke("run", "--engine", "reference", "-n", "0", f"{option}={amount}", "--out", str(tmp_path))
    assert (code, f"{option}: got " in said) == (2, True), said


def test_an_unknown_pytest_option_is_a_usage_error() -> None:
    assert invoke("run", "--engine", "reference", "--no-such-option")[0] == 2


def test_goldens_are_written_by_nobody_but_the_reference(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moe_conformance.cli", "run", "--engine", "triton", "-n", "0", "--snapshot-update"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 2
    assert "got triton and -n 0; goldens are written from the reference engine" in done.stderr


def test_explain_says_what_and_why_without_running() -> None:
    code, output = invoke("explain", "layer-tiny-shared-padded-hidden")
    assert code == 0
    for part in (
        "shape-mismatch",
        "level:    MUST",
        "must be cut before",
        "vllm#40794",
        "  output_scale: the routed sum is multiplied by a number\n",
        "routing=RoutingSpec(top_k=3,\n    renormalize='sum')",
        "padded_hidden = 24\n      hidden width after padding to what a kernel takes",
        "\n  RoutingSpec: How logits [T, classes] become expert ids and weights [T, K].",
        '\n      renormalize: "sum", divided by max(sum + epsilon, floor)',
        "--case layer-tiny",
    ):
        assert part in output


def test_explain_says_why_a_case_is_lenient_and_what_a_model_type_means() -> None:
    case = Case("a-case", "block", "block.combine", {"model_type": "mixtral"}, lenient="no published config has it")
    text = explain(case, {})
    assert "level:    SHOULD, for no published config has it\n" in text
    assert "  mixtral: models of this type\n" in text
    assert "needs:    nothing beyond the stage\n" in explain(Case("b", "align", "align.whole-blocks"), {})


def test_a_spec_is_spelled_by_the_fields_that_are_not_at_their_defaults() -> None:
    value = {"mlp": MLPSpec(16), "all": [RoutingSpec(2, scale=2.5)], "some": (1,), "none": None}
    want = "{'mlp': MLPSpec(width=16), 'all': [RoutingSpec(top_k=2, scale=2.5)], 'some': (1,), 'none': None}"
    assert spelled(value) == want


def test_features_are_listed_by_stage_with_what_is_not_judged_without_them() -> None:
    code, output = invoke("features")
    assert code == 0
    assert [line for line in output.splitlines() if not line.startswith(" ")] == list(STAGES)
    assert "  from_meta              the module may be moved to the meta device and filled again\n" in output
    assert "not judged without it: values that reach the module so\n" in output
    assert invoke("features", "capture_shape")[1].splitlines()[0] == "capture_shape"
    assert "did you mean 'route'?" in invoke("features", "rout")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cases", "--tier", "smoke"], "got --tier smoke, which this command does not take"),
        (["cases", "--famly", "mixtral"], "this command does not take; did you mean --family?"),
        (["doktor"], "did you mean doctor?"),
        (["cases", "--family", "mixtrl"], "did you mean 'mixtral'?"),
        (["cases", "--stage", "rout"], "did you mean 'route'?"),
        (["cases", "--engine", "refrence"], "did you mean 'reference'?"),
        (["explain", "layer-tiny-plane"], "did you mean 'layer-tiny-plain'?"),
        (["explain"], "got no case, want some, or --engine"),
        (["explain", "layer-tiny-padded-hidden", "--stage", "route"], "got options that leave no case"),
    ],
)
def test_a_command_that_is_asked_wrongly_says_what_is_near(arguments: list[str], words: str) -> None:
    code, output = invoke(*arguments)
    assert (code, words in " ".join(output.split())) == (2, True), output


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m moe_conformance.cli cases | head -1"
    done = subprocess.run(["bash", "-c", command], text=True, capture_output=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_lists_name_every_engine_and_the_cases_of_a_class() -> None:
    engines = invoke("engines")[1]
    assert all(name in engines for name in ("reference", "transformers", "triton", "vllm"))
    cases = invoke("cases", "--class", "closure-capture")[1].splitlines()
    assert len(cases) > 30
    assert all(line.endswith("closure-capture") for line in cases)


def test_cases_are_those_of_an_engine_a_stage_and_a_family() -> None:
    def ids(*arguments: str) -> set[str]:
        return {line.split()[0] for line in invoke("cases", *arguments)[1].splitlines()}

    everything = ids()
    assert ids("--stage", "layer") == {case.id for case in catalogue().values() if case.stage == "layer"}
    mixtral = ids("--family", "mixtral")
    assert mixtral == ids("--family", "mixtral", "--stage", "block", "--stage", "load", "--stage", "remap") | {
        name for name in mixtral if name.startswith(("config-", "capture-shape-", "generate-"))
    }
    assert {"family-mixtral-route", "load-mixtral-hub", "config-mixtral"} <= mixtral
    assert not any("qwen" in name or "deepseek" in name for name in mixtral)
    # By the style of its names, and by a model type within its config.
    assert {"load-gemma4-packed-one-file", "capture-shape-gemma4-hub"} <= ids("--family", "gemma4_text")
    offered = ids("--engine", "triton")
    assert 0 < len(offered) < len(everything)
    assert ids("--engine", "triton", "--stage", "describe") == set()


def test_explain_says_what_each_word_of_a_recipe_means() -> None:
    used = {(case.stage, word) for case in catalogue().values() for word in case.recipe}
    assert [pair for pair in sorted(used) if meaning(*pair) is None] == []
    assert unused(used) == []
    output = invoke("explain", "layer-tiny-padded-hidden", "replicate-load-dropped", "--class", "eplb")[1]
    assert "  copies = (0, 1, 2, 3, 4, 5, 2, 5)\n      the logical expert that each physical one" in output
    assert "  padding = 5\n      rows behind the real ones" in output and "layer-tiny-padded-hidden" not in output


def test_doctor_says_what_is_here_which_engines_start_and_how_fast_the_machine_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Engines are asked all at once: two that take a second each take less than two."""
    found = {
        "fake": "fake_engines:NotInstalled",
        "gone": "no.such.module:Engine",
        "mine": "fake_engines:AlwaysWrong",
        "slow": "slow_engines:Slow",
        "slower": "slow_engines:Slow",
    }
    monkeypatch.setattr(doctor, "registered", lambda: {name: Target(name, path) for name, path in found.items()})
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    output = invoke("doctor")[1]
    for words in (
        r"^moe-conformance [\d.]+ on Python 3",
        r"^machine: \d+ cores, \d+ GiB, (no|\d+) GPU$",
        r"^speed: 100,000 additions in a Python loop take \d+\.\d ms \(best of 3\)$",
        r"^installed: torch [\d.]+.*, pytest [\d.]+",
        r"^  mine +fake_engines:AlwaysWrong +starts, 1 stages$",
        r"^  fake +fake_engines:NotInstalled +does not start: no package fake-engine; pip install fake-engine$",
        r"^  gone +no\.such\.module:Engine +does not start: engine .* No module named 'no'",
        r"^families: \d+ have a record",
    ):
        assert re.search(words, output, re.MULTILINE), (words, output)
    starts = [float(words) for words in re.findall(r"does not start: asked at (\d+\.\d+)", output)]
    assert len(starts) == 2 and abs(starts[0] - starts[1]) < 1.0, output
    assert fastest_loop() < 1.0 / TRIES
    assert invoke("doctor", "--families")[1].count("\n") > invoke("engines")[1].count("\n") + 50


def test_help_imports_nothing_heavy() -> None:
    """What it takes is for tools/timing.py, which has the machine to itself."""
    heavy = "{'torch', 'pytest', 'transformers', 'click'}"
    code = f"import sys, moe_conformance.cli; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def stream(folder: Path, *verdicts: str, footer: bool = True) -> str:
    """A finished run of cases c0, c1, ... with these verdicts."""
    folder.mkdir()
    lines: list[dict[str, Any]] = [{"kind": "header"}]
    for number, verdict in enumerate(verdicts):
        fixed = {"engine": "e", "check": "k", "stage": "layer", "class": "x", "message": "", "seconds": 0}
        lines.append({"kind": "result", "case": f"c{number}", "verdict": verdict, **fixed})
    lines += [FOOTER] if footer else []
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_diff_tells_worse_from_better(tmp_path: Path) -> None:
    before = stream(
        tmp_path / "a", "pass", "fail", "pass", "unsupported", "fail", "pass", "broken_should", "pass", "unsupported"
    )
    after = stream(
        tmp_path / "b", "fail", "pass", "unsupported", "pass", *["broken_should"] * 2, "crash", "absent", "absent"
    )
    code, output = invoke("diff", before, after)
    assert code == 1
    assert "9 changed, 5 worse" in output
    assert "worse  e c0 k: pass -> fail" in output
    assert "worse  e c2 k: pass -> unsupported" in output
    assert "worse  e c5 k: pass -> broken_should" in output
    assert "worse  e c6 k: broken_should -> crash" in output
    assert "worse  e c7 k: pass -> absent" in output
    assert "       e c8 k: unsupported -> absent" in output
    assert invoke("diff", before, before) == (0, "0 changed, 0 worse\n")


def test_diff_refuses_a_run_that_died(tmp_path: Path) -> None:
    whole, dead = stream(tmp_path / "a", "pass"), stream(tmp_path / "b", "pass", footer=False)
    code, output = invoke("diff", whole, dead)
    assert code == 2
    assert "got header to result, want header to footer: the run died before its end" in output


def test_diff_counts_a_new_case_as_worse_where_it_fails_a_run(tmp_path: Path) -> None:
    before, after = stream(tmp_path / "a"), stream(tmp_path / "b", "pass", "fail", "broken_should", "unsupported")
    worse = {change.key[1] for change in compare(Path(before), Path(after)) if change.is_worse}
    assert worse == {"c1"}


def test_a_stream_of_this_protocol_lacks_no_key(tmp_path: Path) -> None:
    """One of the first may lack what came later."""
    folder = Path(stream(tmp_path / "a", "pass"))
    assert [result.level for result in read(folder)] == ["MUST"]
    file = folder / "verdicts.jsonl"
    file.write_text(file.read_text().replace('{"kind": "header"}', '{"kind": "header", "protocol": 2}'))
    with pytest.raises(UsageError, match=r"got ValueError: result: got without .'level', 'refusal'."):
        read(folder)


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one case, its check and its class, the names of yesterday."""
    for table, entry in {
        "CASES": {"layer-small-plain": "layer-tiny-padded-hidden"},
        "CHECKS": {"padding_stays_out": "padding_never_reaches_the_output"},
        "CLASSES": {"shape-mix-up": "shape-mismatch"},
    }.items():
        monkeypatch.setattr(aliases, table, MappingProxyType(entry))


@pytest.mark.usefixtures("renamed")
def test_an_old_name_works_wherever_a_name_is_given(tmp_path: Path) -> None:
    assert "layer-small-plain is layer-tiny-padded-hidden now" in invoke("explain", "layer-small-plain")[1]
    assert invoke("cases", "--class", "shape-mix-up") == invoke("cases", "--class", "shape-mismatch")
    listed = 'case = "layer-small-plain"\ncheck = "padding_stays_out"\nkind = "never"\nissue = "#1"\n'
    (tmp_path / "known.toml").write_text('engine = "reference"\n[[known]]\n' + listed)
    (key,) = known.read(tmp_path / "known.toml").entries
    assert key == ("layer-tiny-padded-hidden", "padding_never_reaches_the_output")


@pytest.mark.usefixtures("renamed")
def test_an_old_name_selects_a_case_of_a_run() -> None:
    options = ["--engine", "reference", "--case", "layer-small-plain", "--class", "shape-mix-up", "-n", "0"]
    code, output = invoke("run", *options, "--collect-only")
    assert code == 0 and "reference-layer-tiny-padded-hidden" in output, output


@pytest.mark.usefixtures("renamed")
def test_diff_of_an_old_stream_shows_real_changes_alone(tmp_path: Path) -> None:
    def written(name: str, **values: str) -> Path:
        file = Path(stream(tmp_path / name, "pass")) / "verdicts.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(line | (values if "case" in line else {})) + "\n" for line in lines))
        return file

    names = {"check": "padding_stays_out", "class": "shape-mix-up", "stage": "experts"}
    old = written("old", case="layer-small-plain", **names)
    new = written("new", case="layer-tiny-padded-hidden", check="padding_never_reaches_the_output")
    assert compare(old, new) == []
    assert [(result.bug_class, result.stage) for result in read(old)] == [("shape-mismatch", "layer")]


@pytest.mark.parametrize(
    ("table", "entry", "words"),
    [
        ("CASES", {"old": "no-such-case"}, "alias of case 'old': got 'no-such-case', want a case that exists"),
        ("CASES", {"layer-tiny-padded-hidden": "layer-tiny-latent-padded-hidden"}, "want a name that is free"),
        ("CLASSES", {"old": "no-such-class"}, "alias of class 'old'"),
        ("CLAUSES", {"old": "no.such"}, "alias of clause 'old'"),
        ("CHECKS", {"old": "no_such_check"}, "alias of check 'old'"),
        ("WORDS", {("layer", "old"): ("no_such_word",)}, "alias of feature 'old' of layer: got 'no_such_word'"),
        ("WORDS", {("layer", "softmax"): ()}, "got a feature that exists, want a word that is free"),
        ("WORDS", {("lair", "old"): ()}, "alias of feature 'old': got stage 'lair'"),
    ],
)
def test_an_alias_to_nowhere_is_an_error_of_the_catalogue(
    monkeypatch: pytest.MonkeyPatch, table: str, entry: dict[Any, Any], words: str
) -> None:
    monkeypatch.setattr(aliases, table, MappingProxyType(entry))
    with pytest.raises(ValueError) as refused:
        catalogue.__wrapped__()
    assert words in str(refused.value)


def test_a_case_of_an_old_clause_is_told_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliases, "CLAUSES", {"align.blocks": "align.whole-blocks"})
    with pytest.raises(ValueError, match=r"got 'align.blocks', want align.whole-blocks, its new name"):
        Case("a", "align", "align.blocks")


def test_a_clause_begins_with_its_stage_or_with_the_subject_that_several_share() -> None:
    of_any_call = {"batches", "calls", "inputs", "matrices", "outputs", "rows"}
    subjects = {
        "capture": {"capture-session", "capture-store"},
        "config": {"describe", "capture-shape"},
        "routing": {"route", "router-module"},
    }
    for case in catalogue().values():
        begins, stage = case.clause.partition(".")[0], case.stage.replace("_", "-")
        assert begins == stage or begins in of_any_call or stage in subjects.get(begins, ()), case.clause


def test_a_case_that_needs_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a: align: got feature 'expert_mapp', want .*did you mean 'expert_map'"):
        Case("a", "align", "align.whole-blocks", {"needs": ("expert_mapp",)})


def test_ratios_are_printed_beside_what_they_are_to() -> None:
    tool = [sys.executable, str(Path(__file__).parent.parent / "tools" / "timing.py")]
    done = subprocess.run([*tool, "help", "--rounds", "1"], text=True, capture_output=True)
    head, line = done.stdout.splitlines()
    assert head.split() == ["command", "ratio", "most", "seconds", "beside"]
    name, ratio, most, seconds, *beside, empty, unit = line.split()
    assert (name, most, beside, unit) == ("help", "3", ["python", "-c", "pass:"], "s")
    # As printed: to a tenth, of times to a thousandth of a second.
    least, greatest = ((float(seconds) + off) / (float(empty) - off) for off in (-0.0005, 0.0005))
    assert least - 0.051 <= float(ratio) <= greatest + 0.051
    refused = subprocess.run([*tool, "halp"], text=True, capture_output=True)
    assert (refused.returncode, "got halp, want some of help, doctor, smoke, run, tests" in refused.stderr) == (2, True)
