"""The suites as judge of a mutated reference: one process that has loaded them, and a fork of it for each mutant.

    python tools/suites_judge.py LIBRARY TIER trace    which lines of the reference each check runs, as JSON
    python tools/suites_judge.py LIBRARY TIER judge    reads lines of {"path", "text", "checks"}, writes {"killed"}

LIBRARY is where the package is installed whose files are mutated. For tools/mutation_suites.py, which starts it.
"""

from __future__ import annotations

import inspect
import json
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# A check that loops for ever is ended by its CPU time, one that waits for ever by the clock, which runs also while
# others have the cores, and one that allocates for ever by the limit.
CPU_SECONDS, SECONDS, BYTES = 60, 600, 12 << 30


def main() -> None:
    library, tier, what = sys.argv[1:]
    sys.path[:0] = [library, str(ROOT / "tests")]
    from every_check import CHECKS

    from moe_conformance.catalogue.case import in_tier

    # No reference yet: a fork imports it as it then is.
    assert not any(name.startswith("moe_conformance.reference_impl") for name in sys.modules)
    checks = [row for row in CHECKS if in_tier(row[2], tier)]
    # What engines print is no answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    if what == "trace":
        print(json.dumps(traced(checks, Path(library) / "moe_conformance" / "reference_impl")), file=answers)
        return
    for line in sys.stdin:
        asked = json.loads(line)
        path = Path(asked["path"])
        before = path.read_bytes()
        path.write_text(asked["text"])
        try:
            killed = judged([checks[number] for number in asked["checks"]])
        finally:
            path.write_bytes(before)
        print(json.dumps({"killed": killed}), file=answers, flush=True)


def traced(checks: Sequence[Any], folder: Path) -> dict[str, Any]:
    """seconds, tiers: of each check. ran: file -> line -> numbers of the checks."""
    from moe_conformance.catalogue.case import TIERS

    judge, verdict = _judge()
    ran: dict[str, dict[int, set[int]]] = {}
    prefix, now = str(folder) + os.sep, [0]

    def line(frame: Any, event: str, _: object) -> Any:
        lines = ran.setdefault(frame.f_code.co_filename.removeprefix(prefix), {})
        lines.setdefault(frame.f_lineno, set()).add(now[0])
        return line

    def called(frame: Any, event: str, _: object) -> Any:
        code = frame.f_code
        # Bodies of modules and classes run once, whoever comes first.
        is_function = code.co_flags & inspect.CO_OPTIMIZED
        return line(frame, event, None) if is_function and code.co_filename.startswith(prefix) else None

    seconds = []
    for number, row in enumerate(checks):
        now[0] = number
        start = time.process_time()
        sys.settrace(called)
        threading.settrace(called)
        found = verdict(judge, *row)
        sys.settrace(None)
        threading.settrace(None)
        seconds.append(time.process_time() - start)
        if found.badness:
            sys.exit(f"{row[2].id} {row[1]} is red before anything is mutated")
    tiers = [TIERS.index(row[2].tier) for row in checks]
    files = {file: {line: sorted(numbers) for line, numbers in found.items()} for file, found in ran.items()}
    return {"seconds": seconds, "tiers": tiers, "ran": files}


def judged(checks: Sequence[Any]) -> str:
    """The first check that is red, how its process ended, or "" where none is."""
    there, here = os.pipe()
    child = os.fork()
    if not child:
        os.close(there)
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        os.setpgid(0, 0)
        try:
            _tell(here, checks)
        except BaseException as error:
            os.write(here, f"red: {type(error).__name__}: {error}\n".encode())
        os._exit(0)
    os.close(here)
    said = ""
    while select.select([there], [], [], SECONDS)[0]:
        found = os.read(there, 65536).decode(errors="replace")
        if not found:
            break
        said = (said + found)[-400:]
    else:
        said = "red: clock\n"
        os.killpg(child, signal.SIGKILL)
    os.close(there)
    _, status = os.waitpid(child, 0)
    last = said.strip().rpartition("\n")[2]
    if last == "all pass":
        return ""
    return last.removeprefix("red: ") if last.startswith("red: ") else f"ended by {status} behind {last}"


def _tell(out: int, checks: Sequence[Any]) -> None:
    judge, verdict = _judge()
    for row in checks:
        spent = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (spent + CPU_SECONDS, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        if verdict(judge, *row).badness:
            os.write(out, f"red: {row[2].id} {row[1]}\n".encode())
            return
        os.write(out, b".\n")
    os.write(out, b"all pass\n")


def _judge() -> tuple[Any, Any]:
    from every_check import verdict

    from moe_conformance.judging.judge import Judge
    from moe_conformance.running.discovery import Target

    return Judge(Target("reference", "moe_conformance.engines.reference:Reference")), verdict


if __name__ == "__main__":
    main()
