"""The pytest plugin's door: options, and nothing else until a run includes our suites.

It is loaded into every pytest session of every environment that has this package, so it imports nothing heavy,
sets no environment variable and gives its options a prefix of their own.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moe-conformance")
    group.addoption(
        "--moe-engine",
        action="append",
        default=[],
        help="engine to judge: NAME or package.module:Class or file.py:Class",
    )
    group.addoption("--moe-class", action="append", default=[], help="only this bug class")
    group.addoption("--moe-case", action="append", default=[], help="only the case with this id")
    group.addoption("--moe-stage", action="append", default=[], help="only cases of this stage")
    group.addoption("--moe-shard", default=None, help="only this part of the cases, such as 3/8")
    group.addoption("--moe-tier", default="core", help="smoke, core, full or gpu")
    group.addoption("--moe-seed", type=int, default=0, help="draw other inputs; goldens are of seed 0")
    group.addoption("--moe-known", action="append", default=[], help="TOML file of known failures")
    parser.addini("moe_known", type="paths", help="files of known failures, beside those of --moe-known")
    group.addoption("--moe-out", default=None, help="folder for verdicts.jsonl, summary.md and junit.xml")
    group.addoption("--moe-strict", action="store_true", help="a broken SHOULD fails the run, too")
    group.addoption("--moe-in-process", action="store_true", help="run checks in this process, for --pdb and profilers")
    group.addoption("--moe-timeout", type=float, default=120.0, help="seconds a case may take")
    group.addoption("--moe-engine-timeout", type=float, default=None, help="seconds an engine may take in a worker")
    group.addoption("--moe-memory", type=float, default=None, help="GiB of memory an engine may take")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if _runs_suites(config):
        from moe_conformance.running.session import Session

        session = Session(config)
        config.pluginmanager.register(session, "moe_conformance_session")
        if not session.is_worker:
            from moe_conformance.running.accounts import Accounts

            config.pluginmanager.register(Accounts(config, session), "moe_conformance_accounts")


def _runs_suites(config: pytest.Config) -> bool:
    """Whether any argument is the suites' folder, the one above it, lies in it or names the package.

    Not any folder above: somebody else's project often has the environment with this package inside.
    """
    spec = importlib.util.find_spec("moe_conformance.suites")
    assert spec is not None and spec.submodule_search_locations
    suites = Path(spec.submodule_search_locations[0])
    for argument in config.args:
        place = argument.split("::")[0]
        if place.split(".")[0] == "moe_conformance":
            return True
        path = Path(os.path.abspath(config.invocation_params.dir / place))
        if path in (suites, suites.parent) or suites in path.parents:
            return True
    return False
