"""Rows as Markdown, and what is asked of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Row = Mapping[str, Any]
# Why there is no time, as a row has it and as it reads.
REASONS = {"wrong": "WRONG: ", "error": "ERROR: ", "note": ""}

# Where the figures come from: what peers publish for the same shapes is a little below each.
LAUNCH_BOUND_US = 3.0
SHARES = {8: 0.7, 64: 0.9, 4096: 0.5}
RIVALS = ("transformers grouped_mm", "torch grouped_mm")
# The launches of a layer, and by how much it may be longer than they are together, recorded in one graph.
PARTS, MORE = ("logits", "route", "align", "gate_up", "down", "combine"), 1.3
# The rows that the targets name, all of Gemma 4, the most important first.
TARGETS = (
    *(("experts", tokens) for tokens in (*SHARES, 1)),
    *((kernel, tokens) for tokens in (8, 64, 1) for kernel in ("route", "align", "capture")),
    *((kernel, 1) for kernel in ("logits", "gate_up", "down", "combine", "layer")),
)
MET, MISSED, UNKNOWN = "met", "NOT MET", "NOT JUDGED"


def markdown(facts: Mapping[str, Any], rows: list[Row]) -> str:
    interpreted = facts["device"].startswith("cpu")
    columns = ["kernel", "model", "T", "floor us", "us", "20-80 %", "share", "launches", "others, us"]
    named = ("device", "date", "torch", "triton", "transformers", "vllm")
    lines = [
        f"`{facts['command']}`",
        ", ".join(f"{key} {facts[key] or 'not installed'}" for key in named) + f"; {facts['seconds']} s",
        "",
    ]
    if interpreted:
        lines += ["**No GPU: tiny sizes in Triton's interpreter, one call each. No column says how fast a kernel is.**"]
    else:
        lines += [f"copy {facts['bandwidth'] / 1e12:.2f} TB/s, bf16 product {facts['matmul'] / 1e12:.0f} TFLOP/s"]
    lines += [clocks(facts["clocks"]), "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows if "us" in row]
    lines += list(section("Not timed", notes(rows)))
    return "\n".join([*lines, *section("Targets", [] if interpreted else targets(rows))])


def clocks(found: Mapping[str, Any]) -> str:
    if "note" in found:
        return f"Clocks not recorded: {found['note']}."
    (sm, usual, fastest), (memory, usually, most) = found["sm"], found["memory"]
    rest = f"memory {usually} MHz ({memory} to {most}), {found['readings']} readings"
    return f"While timing: SM {usual} MHz ({sm} to {fastest}), {rest}."


def cells(row: Row) -> list[str]:
    floor, us = row["floor_us"], row["us"]
    others = ", ".join(
        f"{name} {number(entry['us'])}" + " (eager)" * (entry["how"] != row["how"])
        for name, entry in row["contenders"].items()
        if "us" in entry
    )
    return [
        row["kernel"],
        row["model"],
        str(row["tokens"]),
        "" if floor is None else number(floor),
        number(us),
        f"{number(row['us_20'])}-{number(row['us_80'])}",
        "" if floor is None else f"{floor / us:.2f}",
        "" if row.get("launches") is None else str(row["launches"]),
        others,
    ]


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def notes(rows: list[Row]) -> list[str]:
    """Everything that was not timed, and why; one line for all rows of one reason."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        for name, entry in {"": row, **row.get("contenders", {})}.items():
            reason = next((f"{word}{entry[key]}" for key, word in REASONS.items() if key in entry), None)
            if reason:
                which = found.setdefault((name, reason), {}).setdefault(f"{row['kernel']} {row['model']}", [])
                which.append(str(row["tokens"]))
    lines = []
    for (name, reason), which in found.items():
        rows_of_it = "; ".join(f"{where} T={','.join(sizes)}" for where, sizes in which.items())
        lines.append(f"{name + ': ' if name else ''}{rows_of_it}: {reason}")
    return lines


def targets(rows: list[Row], whole: bool = False) -> list[str]:
    """A line a target, those that are not met first. whole: say of each that could not be judged that it was not."""
    lines = []
    times = {(row["kernel"], row["model"], row["tokens"]): row.get("us") for row in rows}

    def judge(row: Row, met: bool | None, what: str) -> None:
        if met is not None or whole:
            word = UNKNOWN if met is None else MET if met else MISSED
            lines.append(f"{word}: {row['kernel']} {row['model']} T={row['tokens']}: {what}")

    for row in rows:
        kernel, model, tokens, us = row["kernel"], row["model"], row["tokens"], row.get("us")
        if us is None:
            judge(row, None, next((f"{word}{row[key]}" for key, word in REASONS.items() if key in row), "not timed"))
            continue
        if kernel in ("route", "align", "capture") and tokens <= 64:
            launched = row.get("launches")
            counted = "launches not counted" if launched is None else f"{launched} launches"
            want = f"want {LAUNCH_BOUND_US:g} us at most in one"
            judge(row, us <= LAUNCH_BOUND_US and launched in (1, None), f"{number(us)} us, {counted}; {want}")
        if kernel == "experts" and model == "gemma4" and (least := SHARES.get(tokens)):
            share = row["floor_us"] / us
            judge(row, share >= least, f"{share:.2f} of the floor, want {least}")
        if kernel == "experts":
            for name in RIVALS:
                theirs = row["contenders"].get(name, {}).get("us")
                met, what = (None, "no time") if theirs is None else (us <= theirs, number(theirs))
                judge(row, met, f"{number(us)} us, {name} {what}; want no more")
        if kernel == "layer" and tokens == 1:
            parts = [times.get((part, model, tokens)) for part in PARTS if part != "align" or row["aligned"]]
            known = [part for part in parts if part is not None]
            met = us <= MORE * sum(known) if len(known) == len(parts) else None
            judge(row, met, f"{number(us)} us, its kernels {number(sum(known))}; want at most {MORE:g} times that")
    order = (MISSED, UNKNOWN, MET)
    return sorted(lines, key=lambda line: order.index(line.partition(":")[0]))


def section(title: str, lines: list[str]) -> Iterator[str]:
    if lines:
        yield from ["", f"## {title}", "", *(f"- {line}" for line in lines)]
