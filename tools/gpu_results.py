"""Keep what a GPU job found: its section in RESULTS.md, and the tiles that it measured in kernels/tuned/.

    python tools/gpu_results.py results/gpu

One section for each device, which its next results replace as a whole; tiles of other models and batches stay. Results
of a rehearsal are not kept: --into FOLDER shows them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

from gpu_job import read_state, write_whole

from moe_conformance.kernels.tuning import read

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Results on GPUs

Written by `python tools/gpu_results.py FOLDER` from what `ci/gpu.sh` left. Columns: benchmarks/README.md.
"""
TIMED = ("targets", "quick", "table")


def section(state: Any, results: zipfile.ZipFile) -> str:
    facts = state.facts
    versions = ", ".join(f"{name} {number}" for name, number in facts.get("versions", {}).items() if number)
    driver = facts.get("driver", {}).get("driver_version")
    lines = [f"## {facts.get('name', 'device unknown')}{' (rehearsal)' * (state.mode == 'rehearsal')}", ""]
    lines += [f"{f'driver {driver}, ' if driver else ''}{versions}  ", *(f"{call}  " for call in state.calls), ""]
    lines += ["| step | outcome | s | what |", "|---|---|---|---|"]
    for name, record in state.steps.items():
        what = "; ".join(filter(None, (record.note, counted(results, name))))
        lines.append(f"| {name} | {record.outcome} | {record.seconds:g} | {what} |")
    for name in TIMED:
        if f"{name}/kernels.md" in results.namelist():
            text = results.read(f"{name}/kernels.md").decode().strip()
            lines += ["", f"### {name}", "", re.sub("^##", "####", text, flags=re.MULTILINE)]
    return "\n".join(lines) + "\n"


def counted(results: zipfile.ZipFile, step: str) -> str:
    """Verdicts of a step that gives some, of the worst kind last."""
    if f"{step}/twins.jsonl" in results.namelist():
        verdicts = [json.loads(line)["verdict"] for line in results.read(f"{step}/twins.jsonl").splitlines()]
        return ", ".join(f"{number} {verdict}" for verdict, number in Counter(verdicts).most_common())
    if f"{step}/verdicts.jsonl" in results.namelist():
        footer = json.loads(results.read(f"{step}/verdicts.jsonl").splitlines()[-1])
        return ", ".join(f"{number} {verdict}" for verdict, number in footer.get("counts", {}).items())
    return ""


def tuned(results: zipfile.ZipFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """File names and what is in them; every entry is one that the kernels take."""
    for name in results.namelist():
        if Path(name).parent.name == "tuned" and name.endswith(".json"):
            found = json.loads(results.read(name))
            for by_tokens in found["configs"].values():
                for entry in by_tokens.values():
                    read(entry)
            yield Path(name).name, found


def keep_section(path: Path, text: str) -> None:
    """Replaces the section of the same title; without one, it is appended."""
    old = path.read_text(encoding="utf-8") if path.exists() else HEAD
    head, *sections = re.split("^(?=## )", old, flags=re.MULTILINE)
    title = text.partition("\n")[0]
    titles = [own.partition("\n")[0] for own in sections]
    sections = [own.rstrip() for own in sections] + [text] * (title not in titles)
    sections = [text if own.partition("\n")[0] == title else own for own in sections]
    write_whole(path, ("\n\n".join(own.strip() for own in (head, *sections)) + "\n").encode())


def keep_tuned(path: Path, found: dict[str, Any]) -> None:
    configs = json.loads(path.read_text())["configs"] if path.exists() else {}
    for key, by_tokens in found["configs"].items():
        both = configs.get(key, {}) | by_tokens
        configs[key] = dict(sorted(both.items(), key=lambda item: int(item[0])))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps({**found, "configs": configs}, indent=1) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what ci/gpu.sh left: its --out")
    parser.add_argument("--into", type=Path, default=ROOT, metavar="FOLDER", help="default: this checkout")
    options = parser.parse_args(arguments)
    try:
        state = read_state(options.folder / "state.json")
        if state.mode == "rehearsal" and options.into.resolve() == ROOT:
            parser.error(
                f"{options.folder}: got a rehearsal, want results of a GPU; to look at these, add --into FOLDER"
            )
        with zipfile.ZipFile(options.folder / "results.zip") as results:
            text, tiles = section(state, results), list(tuned(results))
    except (OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
        parser.error(f"{options.folder}: got no results of tools/gpu_job.py, want its --out ({error})")
    options.into.mkdir(parents=True, exist_ok=True)
    keep_section(options.into / "RESULTS.md", text)
    for name, found in tiles:
        keep_tuned(options.into / "kernels" / "tuned" / name, found)
    print(
        f"RESULTS.md: {text.partition(chr(10))[0].removeprefix('## ')}", *(f"kernels/tuned/{name}" for name, _ in tiles)
    )


if __name__ == "__main__":
    main()
