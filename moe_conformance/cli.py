"""The command line. `run` drives pytest; nothing here imports torch or pytest before it must."""

from __future__ import annotations

import sys
from pathlib import Path

import click

import moe_conformance
from moe_conformance.errors import UsageError


class _Group(click.Group):
    """Turns our usage errors into exit code 2, like click's own."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise click.UsageError(str(error), ctx) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(moe_conformance.__version__, package_name="moe-conformance")
def main() -> None:
    """Judge Mixture-of-Experts inference engines against the contract of their models."""


@main.command(context_settings={"ignore_unknown_options": True})
@click.option("--engine", "engines", multiple=True, help="NAME or package.module:Class; default: all that can start.")
@click.option("--class", "classes", multiple=True, metavar="SLUG", help="Only this bug class.")
@click.option("--case", "cases", multiple=True, metavar="ID", help="Only this case, of any tier.")
@click.option("--tier", default="core", show_default=True, type=click.Choice(["smoke", "core", "full", "gpu"]))
@click.option("--known", multiple=True, type=click.Path(dir_okay=False), help="TOML file of known failures.")
@click.option("--out", type=click.Path(file_okay=False), help="Write verdicts.jsonl, summary.md and junit.xml here.")
@click.option("--timeout", default=120.0, show_default=True, help="Seconds a case may take.")
@click.argument("pytest_args", nargs=-1, type=click.UNPROCESSED)
def run(
    engines: tuple[str, ...],
    classes: tuple[str, ...],
    cases: tuple[str, ...],
    tier: str,
    known: tuple[str, ...],
    out: str | None,
    timeout: float,
    pytest_args: tuple[str, ...],
) -> None:
    """Run the suites. Other options go to pytest: -n, -k, -x, ...

    Exit code 0: every judged case passes or is a declared known failure. 1: any fail, error, crash, timeout,
    unavailable engine or unexpected pass. 2: wrong usage.
    """
    from moe_conformance.catalogue.case import catalogue
    from moe_conformance.catalogue.clauses import BUG_CLASSES
    from moe_conformance.running.discovery import resolve

    for name in engines:
        resolve(name)
    _want("class", classes, BUG_CLASSES)
    _want("case", cases, catalogue())

    import pytest

    import moe_conformance.suites

    suites = moe_conformance.suites.__path__[0]
    arguments = [
        suites,
        "-c",
        str(Path(__file__).with_name("pytest.ini")),
        "--rootdir",
        suites,
        "-q",
        "--no-header",
        "-rN",
    ]
    if not any(argument.startswith(("-n", "--numprocesses", "--pdb")) for argument in pytest_args):
        arguments += ["-n", "auto"]
    options = {"engine": engines, "class": classes, "case": cases, "known": known}
    arguments += [f"--moe-{name}={value}" for name, values in options.items() for value in values]
    arguments += [f"--moe-tier={tier}", f"--moe-timeout={timeout}"]
    if out is not None:
        arguments += [f"--moe-out={out}", f"--junitxml={Path(out) / 'junit.xml'}"]
    code = int(pytest.main([*arguments, *pytest_args]))
    # pytest: 4 usage error, 5 nothing selected, 2 interrupted, 3 internal error.
    sys.exit({4: 2, 5: 2, 2: 130, 3: 1}.get(code, code))


def _want(what: str, got: tuple[str, ...], there: object) -> None:
    from difflib import get_close_matches

    for name in got:
        if name not in there:  # type: ignore[operator]
            near = get_close_matches(name, there, n=5)  # type: ignore[call-overload]
            listed = near or list(there)[:40]  # type: ignore[call-overload]
            raise UsageError(f"{what}: got {name!r}, want one of {', '.join(listed)}" + (", ..." if near else ""))


@main.command()
def engines() -> None:
    """List the engines that are registered, and whether they can start here."""
    from moe_conformance.running.discovery import missing, registered

    for name, target in sorted(registered().items()):
        click.echo(f"{name:14} {target.path:55} {missing(target) or 'available'}")


@main.command()
@click.option("--class", "classes", multiple=True, metavar="SLUG", help="Only this bug class.")
def cases(classes: tuple[str, ...]) -> None:
    """List the cases: id, tier, stage, bug class."""
    from moe_conformance.catalogue.case import catalogue
    from moe_conformance.catalogue.clauses import BUG_CLASSES

    _want("class", classes, BUG_CLASSES)
    for case in catalogue().values():
        if not classes or case.bug_class in classes:
            click.echo(f"{case.id:50} {case.tier:6} {case.stage:16} {case.bug_class}")


@main.command()
@click.argument("case")
def explain(case: str) -> None:
    """Say what a case tries and why, without running it."""
    from moe_conformance.catalogue.case import catalogue, checks
    from moe_conformance.reporting.explain import explain as text

    _want("case", (case,), catalogue())
    click.echo(text(catalogue()[case], dict(checks()[case])))


@main.command()
@click.argument("before", type=click.Path(exists=True))
@click.argument("after", type=click.Path(exists=True))
def diff(before: str, after: str) -> None:
    """Compare two runs, given as folders or verdicts.jsonl files. Exit code 1 if anything got worse."""
    from moe_conformance.reporting.stream import compare

    changes = compare(Path(before), Path(after))
    for change in changes:
        click.echo(str(change))
    click.echo(f"{len(changes)} changed, {sum(change.is_worse for change in changes)} worse")
    sys.exit(any(change.is_worse for change in changes))


if __name__ == "__main__":
    main()
