"""The command line. `run` drives pytest; nothing here imports torch or pytest before it must.

argparse, because importing click takes longer than all else that --help does.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import moe_conformance
from moe_conformance.errors import UsageError

RUN = """Run the suites. Other options go to pytest: -n, -k, -x, and so on.

exit code 0: every judged case passes, is a declared known failure, or breaks a SHOULD without --strict.
          1: any fail, error, crash, timeout, unavailable engine or unexpected pass; an engine asked for by name
             of which nothing was judged; a run that ended before its footer.
          2: wrong usage."""

CHECKPOINT = """Say whether an MoE checkpoint is whole, before it is served. Headers alone are read, and no torch.

exit code 0: sound. 1: a defect. 2: wrong usage, or nothing that can be judged."""


ONLY_CLASS = "only this bug class"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `moe-conformance`; ends by SystemExit."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    command: Callable[[argparse.Namespace, list[str]], int] = options.command
    if others and command is not run:
        parser.error(f"got {' '.join(others)}, which this command does not take")
    try:
        code = command(options, others)
        sys.stdout.flush()
    except UsageError as error:
        parser.error(str(error))
    except BrokenPipeError:  # as behind `| head`; nor may the interpreter flush at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "moe-conformance",
        description="Judge Mixture-of-Experts inference engines against the contract of their models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"moe-conformance {moe_conformance.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace, list[str]], int], about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=about.partition(".")[0] + ".",
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(command=command)
        return made

    this = add("run", run, RUN)
    this.add_argument("--engine", action="append", default=[], metavar="NAME", help="or package.module:Class")
    this.add_argument(
        "--class", action="append", default=[], metavar="SLUG", dest="classes", help="only this bug class"
    )
    this.add_argument("--case", action="append", default=[], metavar="ID", help="only this case, of any tier")
    this.add_argument("--tier", default="core", choices=["smoke", "core", "full", "gpu"], help="default: core")
    this.add_argument("--known", action="append", default=[], metavar="FILE", help="TOML file of known failures")
    this.add_argument("--out", metavar="FOLDER", help="write verdicts.jsonl, summary.md and junit.xml here")
    this.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="that a case may take (120)")
    this.add_argument("--engine-timeout", type=float, metavar="SECONDS", help="that an engine may take in a worker")
    this.add_argument("--memory", type=float, metavar="GIB", help="that an engine may take (0.8 of the machine's)")
    this.add_argument("--strict", action="store_true", help="a broken SHOULD fails the run, too")
    this.add_argument(
        "--in-process", action="store_true", help="run checks in pytest's own process, for --pdb, coverage, profilers"
    )
    add("engines", engines, "List the engines that are registered, and whether they can start here.")
    add("doctor", doctor, "Say what is installed, which engines can start here, and which model families are covered.")
    this = add("features", features, "List the optional features of each stage: what capabilities() may declare.")
    this.add_argument("stage", nargs="*", help="only of these stages")
    this = add("cases", cases, "List the cases: id, tier, level, stage, bug class.")
    this.add_argument(
        "--class", action="append", default=[], metavar="SLUG", dest="classes", help="only this bug class"
    )
    this = add("explain", explain, "Say what a case tries and why, without running it.")
    this.add_argument("case")
    this = add("checkpoint", checkpoint, CHECKPOINT)
    this.add_argument("folder", type=Path, help="with config.json and safetensors")
    this.add_argument("--values", action="store_true", help="read every tensor: scales, NaN, experts that are alike")
    form = this.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for machines")
    form.add_argument("--markdown", action="store_true", help="for a summary of a CI job")
    this = add(
        "diff",
        diff,
        "Compare two runs, given as folders or verdicts.jsonl files. Exit code 1 if anything got worse.",
    )
    this.add_argument("before", type=Path)
    this.add_argument("after", type=Path)
    return parser


def run(options: argparse.Namespace, pytest_arguments: list[str]) -> int:
    """Hand the options to pytest, as those of its plugin."""
    from moe_conformance.catalogue import aliases
    from moe_conformance.catalogue.aliases import current
    from moe_conformance.catalogue.case import catalogue
    from moe_conformance.catalogue.clauses import BUG_CLASSES
    from moe_conformance.running.discovery import resolve

    for name in options.engine:
        resolve(name)
    classes = current("class", options.classes, BUG_CLASSES, aliases.CLASSES)
    cases = current("case", options.case, catalogue(), aliases.CASES)

    import pytest

    import moe_conformance.suites

    suites = moe_conformance.suites.__path__[0]
    ini = str(Path(__file__).with_name("pytest.ini"))
    arguments = [suites, "-c", ini, "--rootdir", suites, "-q", "--no-header", "-rN"]
    alone = options.in_process or any(given.startswith("--pdb") for given in pytest_arguments)
    if not alone and not any(given.startswith(("-n", "--numprocesses")) for given in pytest_arguments):
        arguments += ["-n", "auto"]
    listed = {"engine": options.engine, "class": classes, "case": cases, "known": options.known}
    arguments += [f"--moe-{name}={value}" for name, values in listed.items() for value in values]
    arguments += [f"--moe-tier={options.tier}", f"--moe-timeout={options.timeout}"]
    for name, amount in (("engine-timeout", options.engine_timeout), ("memory", options.memory)):
        arguments += [f"--moe-{name}={amount}"] if amount is not None else []
    arguments += ["--moe-strict"] * options.strict + ["--moe-in-process"] * options.in_process
    if options.out is not None:
        arguments += [f"--moe-out={options.out}", f"--junitxml={Path(options.out) / 'junit.xml'}"]
    witness = _Witness()
    try:
        code = int(pytest.main([*arguments, *pytest_arguments], plugins=[witness]))
    except KeyboardInterrupt:  # a second Ctrl-C, while pytest was at the end that the first one asked for
        return 130
    except SystemExit as error:  # of somebody's plug-in
        code = error.code if isinstance(error.code, int) else 1
    if code == 0 and not witness.saw_the_end:
        print("moe-conformance: the run ended before its footer: what it judged is not whole", file=sys.stderr)
        code = 1
    # pytest: 4 usage error, 5 nothing selected, 2 interrupted, 3 internal error.
    return {4: 2, 5: 2, 2: 130, 3: 1}.get(code, code)


class _Witness:
    """A plug-in that sees whether the report was finished."""

    saw_the_end = False

    def pytest_unconfigure(self, config: Any) -> None:
        accounts = config.pluginmanager.get_plugin("moe_conformance_accounts")
        self.saw_the_end = accounts is not None and accounts.report.is_finished


def engines(options: argparse.Namespace, _: list[str]) -> int:
    from moe_conformance.running.discovery import registered
    from moe_conformance.running.survey import surveys

    found = registered()
    for (name, target), survey in zip(
        sorted(found.items()), surveys([found[name] for name in sorted(found)]), strict=True
    ):
        print(f"{name:14} {target.path:55} {survey.why or 'available'}")
    return 0


def doctor(options: argparse.Namespace, _: list[str]) -> int:
    """What is installed, which engines start, and which model families are covered."""
    from moe_conformance.model.families.families import RECORDS
    from moe_conformance.model.families.installed import installed
    from moe_conformance.reporting.report import run_facts

    facts = run_facts()
    print(f"moe-conformance {moe_conformance.__version__} on Python {facts.pop('python')}, {facts.pop('platform')}")
    print(f"GPUs: {facts.pop('gpus')}; " + ", ".join(f"{name} {found or 'missing'}" for name, found in facts.items()))
    print("\nengines")
    engines(options, [])
    there = installed()
    print(f"\nfamilies: {len(RECORDS)} have a record, and are judged so far where an engine has them")
    for record in RECORDS.values():
        away = "" if there is None or record.model_type in there.all else f"; not in transformers {there.version}"
        print(f"  {record.slug:24} {record.model_type:28} {record.covers}{away}")
    if there is None:
        print("  transformers is not installed: whether it has others cannot be said")
    elif there.without_record:
        print(f"\nfamilies of transformers {there.version} without a record, of which nothing is judged")
        for name in there.without_record:
            print(f"  {name:53} {there.experts[name]}")
    return 0


def features(options: argparse.Namespace, _: list[str]) -> int:
    from moe_conformance.catalogue.aliases import current
    from moe_conformance.protocol.stages import STAGES
    from moe_conformance.reporting.explain import features as text

    print(text(tuple(current("stage", options.stage, STAGES)) or STAGES))
    return 0


def cases(options: argparse.Namespace, _: list[str]) -> int:
    from moe_conformance.catalogue import aliases
    from moe_conformance.catalogue.case import catalogue
    from moe_conformance.catalogue.clauses import BUG_CLASSES

    wanted = aliases.current("class", options.classes, BUG_CLASSES, aliases.CLASSES)
    for case in catalogue().values():
        if not wanted or case.bug_class in wanted:
            print(f"{case.id:50} {case.tier:6} {case.level:6} {case.stage:16} {case.bug_class}")
    return 0


def explain(options: argparse.Namespace, _: list[str]) -> int:
    from moe_conformance.catalogue import aliases
    from moe_conformance.catalogue.case import catalogue, checks
    from moe_conformance.reporting.explain import explain as text

    (case,) = aliases.current("case", [options.case], catalogue(), aliases.CASES)
    if case != options.case:
        print(f"{options.case} is {case} now")
    print(text(catalogue()[case], checks()[case]))
    return 0


def checkpoint(options: argparse.Namespace, _: list[str]) -> int:
    from moe_conformance.checkpoints import report
    from moe_conformance.checkpoints.command import judged
    from moe_conformance.errors import CheckpointError, DenseModelError

    try:
        found = judged(options.folder, options.values)
    except (CheckpointError, DenseModelError) as error:
        print(f"moe-conformance: {error}", file=sys.stderr)
        return 2
    print(report.as_json(found) if options.json else (report.markdown if options.markdown else report.text)(found))
    return int(not found.is_sound)


def diff(options: argparse.Namespace, _: list[str]) -> int:
    from moe_conformance.reporting.stream import compare

    changes = compare(options.before, options.after)
    for change in changes:
        print(change)
    worse = sum(change.is_worse for change in changes)
    print(f"{len(changes)} changed, {worse} worse")
    return int(worse > 0)


if __name__ == "__main__":
    main()
