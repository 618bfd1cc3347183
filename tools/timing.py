"""How long the usual commands take, as ratios that do not depend on the machine: `python tools/timing.py`.

Each command is timed against an interpreter that does nothing, or only imports torch. The two take turns, so that other
load of the machine affects both. The medians of several rounds give the ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOE = ("-m", "moe_conformance.cli")
KNOWN = ("--known", str(ROOT / "ci" / "known_transformers.toml"))
EMPTY, TORCH = ("-c", "pass"), ("-c", "import torch")
# Every registered engine is asked whether it starts, and nothing else is done.
ANSWERS = (
    "-c",
    "from moe_conformance.running.discovery import registered; from moe_conformance.running.survey import surveys; "
    "surveys(list(registered().values()))",
)
# As users have it: Python keeps its bytecode from run to run. Without that, everything here takes twice as long.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"} | {"NO_COLOR": "1"}


@dataclass(frozen=True)
class Timed:
    """A command of this interpreter, and what it may cost: `most` times the command beside it."""

    arguments: tuple[str, ...]
    beside: tuple[str, ...]
    most: float


# What a contributor waits for; whatever does not fit goes to a nightly job.
COMMANDS = {
    "help": Timed((*MOE, "--help"), EMPTY, 3),
    # What it adds to the engines' answers.
    "doctor": Timed((*MOE, "doctor"), ANSWERS, 1.5),
    "smoke": Timed((*MOE, "run", "--tier", "smoke", *KNOWN), TORCH, 8),
    "run": Timed((*MOE, "run", *KNOWN), TORCH, 40),
    "tests": Timed(("-m", "pytest", "-q", "-n", "auto"), TORCH, 120),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"{', '.join(COMMANDS)}; default: all")
    parser.add_argument("-n", "--rounds", type=int, default=5, help="the median is of so many (default 5)")
    options = parser.parse_args()
    if strangers := [name for name in options.commands if name not in COMMANDS]:
        parser.error(f"got {', '.join(strangers)}, want some of {', '.join(COMMANDS)}")
    if options.rounds < 1:
        parser.error(f"--rounds: got {options.rounds}, want a number from 1 up")
    print(f"{'command':8} {'ratio':>7} {'most':>5} {'seconds':>9}  beside")
    over = False
    for name in options.commands or COMMANDS:
        over |= report(name, COMMANDS[name], options.rounds)
    sys.exit(over)


def report(name: str, timed: Timed, rounds: int) -> bool:
    """Print a line; whether the command takes more than it may."""
    pairs = [(seconds(timed.beside), seconds(timed.arguments)) for _ in range(rounds)]
    beside, took = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = took / beside
    other = f"python {' '.join(timed.beside)}: {beside:.3f} s"
    print(f"{name:8} {ratio:7.1f} {timed.most:5g} {took:9.3f}  {other}", flush=True)
    return ratio > timed.most


def seconds(arguments: tuple[str, ...]) -> float:
    """Wall time of one run, in the tree but with no files left in it. Ends the program if the command fails."""
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=output, stderr=output, env=ENVIRONMENT)
        took = time.perf_counter() - started
        if done.returncode:
            output.seek(0)
            last = "".join(output.readlines()[-20:])
            sys.exit(f"python {' '.join(arguments)}: got exit code {done.returncode}, want 0:\n{last}")
    return took


if __name__ == "__main__":
    main()
