"""An adapter is imported in a process of its own: whatever it does there costs its own cases, and no other's."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from moe_conformance.errors import UsageError
from moe_conformance.judging.verdict import Verdict
from moe_conformance.running import child, survey
from moe_conformance.running.discovery import Target, registered
from moe_conformance.running.survey import Survey, named, surveys

CLASS = """
class Mine:
    name = "mine"
    def layer(self, inputs): ...
"""

# What a module does -> the verdict that its cases get, and words of its message.
HOSTILE = {
    "exits-0": ("import sys; sys.exit(0)", "crash", "exit code 0"),
    "exits-by-the-system": ("import os; os._exit(0)", "crash", "exit code 0"),
    "exits-3": ("raise SystemExit(3)", "crash", "exit code 3"),
    "interrupts": ("raise KeyboardInterrupt", "crash", "KeyboardInterrupt"),
    "aborts": ("import os; os.abort()", "crash", "signal SIGABRT"),
    "dies": ("import ctypes; ctypes.string_at(1)", "crash", "signal SIGSEGV"),
    "is-killed": ("import os; os.kill(os.getpid(), 9)", "crash", "signal SIGKILL"),
    "raises": ("raise RuntimeError('no licence')", "error", "RuntimeError: no licence"),
    "recurses": ("def f(): f()\nf()", "error", "RecursionError"),
    "is-no-python": ("def", "error", "SyntaxError"),
    "closes-everything": ("import os; os.closerange(3, 100)", "crash", ""),
    "leaves-a-child": ("import os, time\nif os.fork() == 0: time.sleep(60)\nelse: os._exit(0)", "crash", "exit code 0"),
    "says-something-else": ("import os, sys; os.write(int(sys.argv[3]), b'hello\\n')", "error", "got 'hello'"),
    "says-no-end": ("import os, sys\nwhile True: os.write(int(sys.argv[3]), b'x' * 65536)", "error", "without an end"),
    "says-a-list": ("import os, sys; os.write(int(sys.argv[3]), b'[1]\\n')", "error", "want a survey"),
    "environment-raises": (CLASS + "    def environment(): raise OSError('no disk')", "error", "OSError: no disk"),
    "environment-exits": (CLASS + "    def environment(): raise SystemExit(0)", "crash", "exit code 0"),
    "environment-is-a-list": (CLASS + "    def environment(): return ['A=1']", "error", "want a map of strings"),
    "environment-of-numbers": (CLASS + "    def environment(): return {'A': 1}", "error", "want a map of strings"),
    "environment-has-a-null": (CLASS + "    def environment(): return {'A': '\\0'}", "error", "want a map of strings"),
    "environment-has-no-name": (CLASS + "    def environment(): return {'A=B': ''}", "error", "want a map of strings"),
    "class-raises-when-asked": (
        "class Meta(type):\n    def __getattribute__(cls, name): raise OSError(name)\nclass Mine(metaclass=Meta): ...",
        "error",
        "OSError: name",
    ),
    "raises-without-words": (
        "class Mute(Exception):\n    def __str__(self): raise RuntimeError('no words')\nraise Mute",
        "error",
        "<exception str() failed>",
    ),
    "missing-raises": (CLASS + "    def missing(): return 1 / 0", "error", "ZeroDivisionError"),
    "name-is-a-number": ("class Mine: name = 7", "error", "name: got 7, want a string"),
    "hangs": ("import time\nwhile True: time.sleep(1)", "timeout", "no end within"),
    "sleeps-in-a-thread": ("import time; time.sleep(60)", "timeout", "no end within"),
}
# What does no harm.
HARMLESS = {
    "prints": (CLASS + "import sys; print('x' * 100000); print('{}', file=sys.stderr)"),
    "reads": (CLASS + "import sys; assert sys.stdin.read() == ''"),
    "exits-afterwards": (CLASS + "import atexit, os; atexit.register(lambda: os._exit(9))"),
    "never-ends": (CLASS + "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()"),
    "closes-its-output": (CLASS + "import sys; sys.stdout.close(); sys.stderr.close()"),
    "changes-folder": (CLASS + "import os; os.chdir('/')"),
    "answers-twice": ("import os; os.fork()\n" + CLASS),
    "environment-is-slow": (CLASS + "    def environment():\n        import time; time.sleep(0.5); return {}"),
    "hangs-at-its-end": (CLASS + "import atexit, time; atexit.register(time.sleep, 60)"),
    "says-another-thing-each-time": (
        CLASS + "    def missing(said=[]): said.append(1); return None if len(said) < 2 else 'x'"
    ),
    "ignores-signals": (CLASS + "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Survey]:
    """Surveys of all of them, made at once."""
    folder, before = tmp_path_factory.mktemp("adapters"), Path.cwd()
    sources = {name: code for name, (code, _, _) in HOSTILE.items()} | HARMLESS
    for name, code in sources.items():
        (folder / f"{name.replace('-', '_')}.py").write_text(code)
    targets = [Target(name, f"{name.replace('-', '_')}:Mine") for name in sources]
    hanging = [target for target in targets if HOSTILE.get(target.name, ("", "", ""))[1] == "timeout"]
    others = [target for target in targets if target not in hanging]
    os.chdir(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(child, "LARGEST", 1 << 20)
            said = dict(zip(others, surveys(others), strict=True))
            patch.setattr(survey, "SECONDS", 1.0)
            said |= zip(hanging, surveys(hanging), strict=True)
        return {target.name: found for target, found in said.items()}
    finally:
        os.chdir(before)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_an_adapter_does_when_imported_is_what_its_cases_come_to(found: dict[str, Survey], name: str) -> None:
    _, verdict, words = HOSTILE[name]
    outcome = found[name].outcome
    assert outcome is not None and (outcome.verdict, found[name].name) == (Verdict(verdict), "Mine")
    assert words in outcome.message


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_no_harm_is_no_trouble(found: dict[str, Survey], name: str) -> None:
    assert found[name] == Survey("mine", stages=("layer",))


def test_nothing_that_an_adapter_started_outlives_its_survey(found: dict[str, Survey]) -> None:
    assert found
    time.sleep(0.1)
    lines = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline")] if sys.platform == "linux" else []
    assert not any(b"leaves_a_child:Mine" in line or b"never_ends:Mine" in line for line in lines)


@pytest.mark.parametrize(
    ("path", "survey", "words"),
    [
        ("a:Mine", Survey("reference"), "got name 'reference', which is that of moe_conformance.engines.reference"),
        ("a:Mine", Survey("two words"), "got name 'two words', want letters"),
        ("a:Mine", Survey("a[b]"), "got name 'a[b]', want letters"),
        ("a:Mine", Survey("line\nbreak"), "got name 'line\\nbreak', want letters"),
        ("a:Mine", Survey(unloadable="cannot load a:Mine"), "cannot load a:Mine"),
    ],
)
def test_a_name_that_is_none_or_anothers_is_refused(path: str, survey: Survey, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        named([Target(path, path)], [survey])
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "    def expert(self, inputs): ...",
            "got a class with a method of no stage (expert), want some of describe, ",
        ),
        ("    def expert(self, inputs): ...", "did you mean 'experts'?"),
        ("    layer = None", "a method of no stage (layer)"),
        ("    pass", "a method of no stage (with none)"),
    ],
)
def test_a_class_that_has_no_stage_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, words: str
) -> None:
    (tmp_path / "typo.py").write_text(f"class Mine:\n{body}\n")
    monkeypatch.chdir(tmp_path)
    target = Target("typo:Mine", "typo:Mine")
    with pytest.raises(UsageError) as refused:
        named([target], surveys([target]))
    assert words in str(refused.value)


def test_two_engines_of_one_name_are_refused_and_one_asked_for_by_its_path_has_its_own() -> None:
    targets = [Target("a:Mine", "a:Mine"), Target("b:Mine", "b:Mine")]
    with pytest.raises(UsageError, match="engine b:Mine: got name 'mine', which is that of a:Mine"):
        named(targets, [Survey("mine"), Survey("mine")])
    reference = registered()["reference"]
    assert named([reference], [Survey("Reference")]) == {reference: Survey("Reference")}
