"""The catalogue of the last release, kept in ci/catalogue.json: python tools/release_catalogue.py [--check]

Written when a release is made. Until the next one, tests/test_stability.py compares the tree with it, as
docs/stability.md promises.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import moe_conformance
from moe_conformance.catalogue.case import catalogue, check_names
from moe_conformance.catalogue.clauses import BUG_CLASSES
from moe_conformance.protocol.features import words
from moe_conformance.protocol.stages import PROTOCOL_VERSION, STAGES

FILE = Path(__file__).parent.parent / "ci" / "catalogue.json"


def today() -> dict[str, Any]:
    """Everything that docs/stability.md makes a promise about, as it is in the tree.

    cases: id -> stage, class, level.
    """
    return {
        "release": moe_conformance.__version__,
        "protocol": PROTOCOL_VERSION,
        "stages": list(STAGES),
        "classes": sorted(BUG_CLASSES),
        "checks": sorted(check_names()),
        "features": {stage: sorted(words(stage)) for stage in STAGES},
        "cases": {case.id: [case.stage, case.bug_class, case.level] for case in catalogue().values()},
    }


def text(found: dict[str, Any]) -> str:
    """One line for each case, so that the diff of two releases is readable."""
    cases = found["cases"]
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items() if key != "cases"]
    each = ",\n".join(f"  {json.dumps(name)}: {json.dumps(cases[name])}" for name in sorted(cases))
    return "{\n" + ",\n".join([*lines, f'"cases": {{\n{each}\n}}']) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where it, or CHANGELOG.md, is not of today"
    )
    wanted, version = text(today()), moe_conformance.__version__
    if parser.parse_args().check:
        head = (FILE.parent.parent / "CHANGELOG.md").read_text(encoding="utf-8").partition("\n## ")[2].splitlines()[0]
        if not re.fullmatch(re.escape(version) + r" \(\d{4}-\d\d-\d\d\)", head):
            sys.exit(f"CHANGELOG.md: got {head!r} first, want {version} and the day of its release")
        if FILE.read_text(encoding="utf-8") != wanted:
            sys.exit(f"{FILE}: is not the catalogue of {version}; run tools/release_catalogue.py")
        return
    FILE.write_text(wanted, encoding="utf-8")
    print(f"{FILE}: {len(today()['cases'])} cases of {version}")


if __name__ == "__main__":
    main()
