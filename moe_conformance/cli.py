"""The command line. `run` drives pytest; nothing here imports torch or pytest before it must.

argparse, because importing click takes longer than all else that --help does.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import moe_conformance
from moe_conformance.errors import UsageError

if TYPE_CHECKING:
    from moe_conformance.catalogue.case import Case

RUN = """Run the suites. Other options go to pytest: -n, -k, -x, and so on.

exit code 0: every judged case passes, is a declared known failure, or breaks a SHOULD without --strict.
          1: any fail, error, crash, timeout, unavailable engine or unexpected pass; an engine asked for by name
             of which nothing was judged; a run that ended before its footer.
          2: wrong usage."""

CHECKPOINT = """Say whether an MoE checkpoint is whole, before it is served. Headers alone are read, and no torch.

exit code 0: sound. 1: a defect. 2: wrong usage, or nothing that can be judged."""

ROUTES = """Say whether captured routes are what the model's own router chose. It runs layer by layer.

exit code 0: they are. 1: a defect. 2: wrong usage, or nothing that can be judged."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `moe-conformance`; ends by SystemExit."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    command: Callable[[argparse.Namespace, list[str]], int] = options.command
    if others and command is not run:
        parser.error(f"got {' '.join(others)}, which this command does not take{_near(others, options.known_options)}")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name of a stranger's tensor, on a terminal that knows ASCII alone
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = command(options, others)
        sys.stdout.flush()
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # As behind `| head`, or on a full disk; nor may the interpreter flush at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.ENOSPC:
            print(f"moe-conformance: {error.strerror}; what was said is not whole", file=sys.stderr)
        code = 1
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    """Suggests the nearest name for an unknown command or value."""

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += _near([found[1]], re.findall(r"[\w-]+", found[2]))
        super().error(message)


def _near(names: Sequence[str], there: Sequence[str]) -> str:
    """A suggestion of what was meant, as the end of a message."""
    from difflib import get_close_matches

    near = [match for name in names for match in get_close_matches(name.partition("=")[0], there, n=1)]
    return f"; did you mean {near[0]}?" if near else ""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "moe-conformance",
        description="Judge Mixture-of-Experts inference engines against the contract of their models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"moe-conformance {moe_conformance.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    parsers: list[argparse.ArgumentParser] = []

    def add(
        name: str, command: Callable[[argparse.Namespace, list[str]], int], about: str, aliases: Sequence[str] = ()
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            aliases=aliases,
            help=re.split(r"\.\s", about)[0].rstrip(".") + ".",
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(command=command)
        parsers.append(made)
        return made

    def filters(made: argparse.ArgumentParser) -> None:
        made.add_argument("--engine", metavar="NAME", help="only of its stages; or package.module:Class, file.py:Class")
        for name, about in (("class", "bug class"), ("stage", "stage"), ("family", "model family, or its model type")):
            made.add_argument(
                f"--{name}",
                action="append",
                default=[],
                metavar="NAME",
                dest=f"{name}_names",
                help=f"only this {about}",
            )

    def forms(made: argparse.ArgumentParser) -> None:
        form = made.add_mutually_exclusive_group()
        form.add_argument("--json", action="store_true", help="for machines")
        form.add_argument("--markdown", action="store_true", help="for a summary of a CI job")

    this = add("run", run, RUN)
    this.add_argument(
        "--engine", action="append", default=[], metavar="NAME", help="or package.module:Class, or file.py:Class"
    )
    this.add_argument(
        "--class", action="append", default=[], metavar="SLUG", dest="classes", help="only this bug class"
    )
    this.add_argument("--case", action="append", default=[], metavar="ID", help="only this case, of any tier")
    this.add_argument(
        "--stage",
        action="append",
        default=[],
        metavar="S",
        help="only this stage; with --tier smoke, says its form first",
    )
    this.add_argument("--shard", metavar="N/M", help="only this part of the cases; `merge` joins the parts")
    this.add_argument("--tier", default="core", choices=["smoke", "core", "full", "gpu"], help="default: core")
    this.add_argument("--seed", type=int, default=0, metavar="N", help="draw other inputs; goldens are of seed 0 alone")
    this.add_argument("--known", action="append", default=[], metavar="FILE", help="TOML file of known failures")
    this.add_argument("--out", metavar="FOLDER", help="write verdicts.jsonl, summary.md and junit.xml here")
    this.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="that a case may take (120)")
    this.add_argument("--engine-timeout", type=float, metavar="SECONDS", help="that an engine may take in a worker")
    this.add_argument("--memory", type=float, metavar="GIB", help="that an engine may take (0.8 of the machine's)")
    this.add_argument("--strict", action="store_true", help="a broken SHOULD fails the run, too")
    this.add_argument(
        "--in-process", action="store_true", help="run checks in pytest's own process, for --pdb, coverage, profilers"
    )
    this = add(
        "doctor",
        doctor,
        "Say what is installed, which engines can start here, and which model families are covered.",
        ["engines"],  # its name of old
    )
    this.add_argument("--families", action="store_true", help="list the families that have a record, too")
    this = add("features", features, "List the optional features of each stage: what capabilities() may declare.")
    this.add_argument("stage", nargs="*", help="only of these stages")
    filters(add("cases", cases, "List the cases: id, tier, level, stage, bug class."))
    this = add("explain", explain, "Say what cases try and why, without running them.")
    this.add_argument("case", nargs="*", help="default: all that the options leave")
    filters(this)
    this = add("repro", repro, "Write a script that shows the fault of an engine in a case, for a bug report.")
    this.add_argument("case", help="id")
    this.add_argument("--engine", required=True, metavar="NAME", help="or package.module:Class, or file.py:Class")
    this.add_argument("--seed", type=int, default=0, metavar="N", help="of the run that failed")
    this.add_argument("--to", type=Path, metavar="FILE", help="default: repro_CASE.py here")
    this = add("merge", merge, "Join the results of all shards of a run. The exit code is that of the whole run.")
    this.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="a folder of `run --shard N/M --out`")
    this.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="for verdicts.jsonl and summary.md")
    this = add(
        "annotate",
        annotate,
        "Write each distinct failure of a run as an annotation of GitHub Actions. Exit code 1 if the run is not whole.",
    )
    this.add_argument("results", type=Path, metavar="RESULTS", help="a folder of `run --out`, or its verdicts.jsonl")
    this = add(
        "new-engine",
        new_engine,
        "Write the package of an adapter. The stages named work as written, in plain torch; the others are stubs.",
    )
    this.add_argument("name", help="of the engine, such as my-engine")
    this.add_argument("--stage", action="append", required=True, metavar="S", help="that is to work; repeatable")
    this.add_argument("--into", type=Path, default=Path(), metavar="FOLDER", help="where its folder goes (here)")
    this = add("checkpoint", checkpoint, CHECKPOINT)
    this.add_argument("folder", type=Path, help="with config.json and safetensors")
    this.add_argument("--values", action="store_true", help="read every tensor: scales, NaN, experts that are alike")
    for engine in ("transformers", "vllm", "sglang"):
        about = "ask its own loader which names it would not map, and what stays unfilled"
        this.add_argument(f"--{engine}", action="append_const", dest="engines", const=engine, default=[], help=about)
    forms(this)
    this = add("routes", routes, ROUTES)
    this.add_argument("folder", type=Path, help="of the model, with config.json and safetensors")
    this.add_argument("record", type=Path, help="of routed experts: .npy, .safetensors or .jsonl (docs/routes.md)")
    this.add_argument("--tokens", type=Path, metavar="FILE.npy", help="token ids of an .npy record")
    this.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="served in (as config.json says)")
    forms(this)
    this = add(
        "diff",
        diff,
        "Compare two runs, given as folders or verdicts.jsonl files. Exit code 1 if anything got worse.",
    )
    this.add_argument("before", type=Path)
    this.add_argument("after", type=Path)
    this = add(
        "report",
        report,
        "Show runs beside each other, given as folders, folders of folders, or verdicts.jsonl files.",
    )
    this.add_argument("results", type=Path, nargs="+")
    this.add_argument("--html", type=Path, metavar="FILE", help="the page: no network is needed to read it")
    this.add_argument("--markdown", type=Path, metavar="FILE.md", help="the tables of all runs")
    this.add_argument("--badge", type=Path, metavar="FILE.svg", help="an image that says how many MUSTs hold")
    for made in parsers:
        made.set_defaults(known_options=re.findall(r"--[\w-]+", made.format_usage()))
    return parser


def run(options: argparse.Namespace, pytest_arguments: list[str]) -> int:
    """Pass the options to pytest, as those of its plugin."""
    from moe_conformance.catalogue import aliases
    from moe_conformance.catalogue.aliases import current
    from moe_conformance.catalogue.case import catalogue
    from moe_conformance.catalogue.clauses import BUG_CLASSES
    from moe_conformance.protocol.stages import STAGES
    from moe_conformance.running.discovery import resolve

    for name in options.engine:
        resolve(name)
    classes = current("class", options.classes, BUG_CLASSES, aliases.CLASSES)
    cases = current("case", options.case, catalogue(), aliases.CASES)

    stages = current("stage", options.stage, STAGES)
    if stages and options.tier == "smoke":  # as whoever writes a stage asks
        from moe_conformance.protocol.form import form

        print(form(stages), end="\n\n", flush=True)

    import pytest

    import moe_conformance.suites

    suites = moe_conformance.suites.__path__[0]
    ini = str(Path(__file__).with_name("pytest.ini"))
    arguments = [suites, "-c", ini, "--rootdir", suites, "-q", "--no-header", "-rN"]
    alone = options.in_process or any(given.startswith("--pdb") for given in pytest_arguments)
    if not alone and not any(given.startswith(("-n", "--numprocesses")) for given in pytest_arguments):
        arguments += ["-n", "auto"]
    listed = {"engine": options.engine, "class": classes, "stage": stages, "case": cases, "known": options.known}
    arguments += [f"--moe-{name}={value}" for name, values in listed.items() for value in values]
    arguments += [f"--moe-tier={options.tier}", f"--moe-timeout={options.timeout}", f"--moe-seed={options.seed}"]
    optional = {"engine-timeout": options.engine_timeout, "memory": options.memory, "shard": options.shard}
    for name, amount in optional.items():
        arguments += [f"--moe-{name}={amount}"] if amount is not None else []
    arguments += ["--moe-strict"] * options.strict + ["--moe-in-process"] * options.in_process
    if options.out is not None:
        arguments += [f"--moe-out={options.out}", f"--junitxml={Path(options.out) / 'junit.xml'}"]
    if not alone and not any(given.startswith("--tb") for given in pytest_arguments):
        arguments.append("--tb=no")  # the report tells each distinct fault once
    from moe_conformance.running.progress import Progress

    witness = _Witness()
    try:
        code = int(pytest.main([*arguments, *pytest_arguments], plugins=[witness, Progress()]))
    except KeyboardInterrupt:  # a second Ctrl-C, while pytest was at the end that the first one asked for
        return 130
    except SystemExit as error:  # of somebody's plug-in
        code = error.code if isinstance(error.code, int) else 1
    if code == 4 and (near := _near([given for given in pytest_arguments if given[:2] == "--"], options.known_options)):
        print(f"moe-conformance: among the options of pytest{near}", file=sys.stderr)
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


def doctor(options: argparse.Namespace, _: list[str]) -> int:
    """What is installed, which engines start, and which model families are covered."""
    from moe_conformance.reporting.doctor import doctor as lines

    for line in lines(options.families):
        print(line)
    return 0


def features(options: argparse.Namespace, _: list[str]) -> int:
    from moe_conformance.catalogue.aliases import current
    from moe_conformance.protocol.stages import STAGES
    from moe_conformance.reporting.explain import features as text

    print(text(tuple(current("stage", options.stage, STAGES)) or STAGES))
    return 0


def cases(options: argparse.Namespace, _: list[str]) -> int:
    for case in _selected(options):
        print(f"{case.id:50} {case.tier:6} {case.level:6} {case.stage:16} {case.bug_class}")
    return 0


def explain(options: argparse.Namespace, _: list[str]) -> int:
    from moe_conformance.catalogue import aliases
    from moe_conformance.catalogue.case import catalogue, checks
    from moe_conformance.reporting.explain import explain as text

    named = aliases.current("case", options.case, catalogue(), aliases.CASES)
    narrowed = options.engine or options.class_names or options.stage_names or options.family_names
    if not named and not narrowed:
        raise UsageError("explain: got no case, want some, or --engine, --class, --stage or --family")
    chosen = [case for case in _selected(options) if not named or case.id in named]
    if not chosen:
        raise UsageError("explain: got options that leave no case; take one of them out")
    for old, new in zip(options.case, named, strict=True):
        if old != new:
            print(f"{old} is {new} now")
    print("\n\n".join(text(case, checks()[case.id]) for case in chosen))
    return 0


def _selected(options: argparse.Namespace) -> list[Case]:
    from moe_conformance.catalogue.selection import selected

    offered = None
    if options.engine is not None:
        from moe_conformance.running.discovery import resolve
        from moe_conformance.running.survey import surveys

        (survey,) = surveys([resolve(options.engine)])
        if survey.unloadable or survey.trouble:
            raise UsageError(f"--engine: {survey.why}")
        offered = survey.stages
    return selected(options.class_names, options.stage_names, options.family_names, offered)


def repro(options: argparse.Namespace, _: list[str]) -> int:
    from moe_conformance.repro.command import write

    file = options.to or Path(f"repro_{options.case.replace('-', '_')}.py")
    print(write(options.engine, options.case, options.seed, file))
    print(f"{file} is written.")
    return 0


def new_engine(options: argparse.Namespace, _: list[str]) -> int:
    from moe_conformance.starter.new_engine import new_engine as write

    folder = write(options.name, options.stage, options.into)
    print(f"{folder} is written; its README.md says what to do next.")
    return 0


def merge(options: argparse.Namespace, _: list[str]) -> int:
    from moe_conformance.running.merge import merge as join

    return join(options.results, options.out)


def annotate(options: argparse.Namespace, _: list[str]) -> int:
    from moe_conformance.reporting.stream import read
    from moe_conformance.running.annotations import annotated, command

    try:
        results = read(options.results)
    except UsageError as error:  # as where the run died, which a reader of the job must see, too
        print(command("error", "moe-conformance", str(error)))
        return 1
    for line in annotated(results):
        print(line)
    return 0


def checkpoint(options: argparse.Namespace, _: list[str]) -> int:
    from moe_conformance.checkpoints import report
    from moe_conformance.checkpoints.command import judged
    from moe_conformance.errors import CheckpointError, DenseModelError

    try:
        found = judged(options.folder, options.values, options.engines)
    except (CheckpointError, DenseModelError) as error:
        print(f"moe-conformance: {error}", file=sys.stderr)
        return 2
    print(report.as_json(found) if options.json else (report.markdown if options.markdown else report.text)(found))
    return int(not found.is_sound)


def routes(options: argparse.Namespace, _: list[str]) -> int:
    from moe_conformance.checkpoints import report
    from moe_conformance.errors import MoEConformanceError
    from moe_conformance.routes.command import judged

    try:
        found = judged(options.folder, options.record, options.tokens, options.dtype)
    except MoEConformanceError as error:
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


def report(options: argparse.Namespace, _: list[str]) -> int:
    from moe_conformance.reporting.page import write
    from moe_conformance.reporting.runs import gather

    if not (options.html or options.markdown or options.badge):
        raise UsageError("report: got no --html, --markdown or --badge, want one of them, or several")
    runs = gather(options.results)
    for found in runs:
        for trouble in found.troubles:
            print(f"{found.name}: {trouble}", file=sys.stderr)
    for line in write(runs, options.html, options.markdown, options.badge):
        print(line)
    return 0


if __name__ == "__main__":
    main()
