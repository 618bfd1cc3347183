"""Whether the steps up to the tuning fit into a short loan of a GPU, estimated from a rehearsal without one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gpu_steps import PLANNED, Step, limit_of

# What a loan is: seconds of one job, and cores beside the GPU.
BUDGET, CORES = 480.0, 16
LAST = "tuning"
# Seconds of one core that Triton 3.6 takes for one kernel of sm_90: 0.34 for the 112 of the launches, 0.39 for those of
# the table (measured by ahead-of-time compiles), and 0.25 for each of the few launchers that they share.
COMPILE = 0.5
# The busiest core of a step of several processes, over the even share.
UNEVEN = 2.0
# Guesses, for no GPU has run this: until a process has a context; and for one figure, its answer checked and its clock
# run twenty times.
START, FIGURE = 10.0, 1.0
# One candidate of the tuning, a guess too: 10 ms of launches, before each of which the cache is flushed.
CANDIDATE = 0.05


def needed(step: Step, computed: float) -> float:
    """Seconds beside a GPU. What a core did interpreting is taken for what it does launching, which is less."""
    parallel = any("{jobs}" in word or "{workers}" in word for word in step.command)
    share = CORES if parallel else 1
    compiling = COMPILE * max(step.kernels / share, step.longest)
    return START + computed * (UNEVEN / CORES if parallel else 1) + compiling + FIGURE * step.figures


def estimate(steps: Sequence[Step], computed: Mapping[str, float]) -> Iterator[str]:
    """Lines of Markdown. computed: in the rehearsal, seconds of a core by step, of those that ran."""
    yield f"## Estimate: {BUDGET:g} s beside one GPU and {CORES} cores, nothing compiled before"
    yield ""
    yield "| step | rehearsed, core s | kernels | in one process | needs, s | limit, s | ends at, s |"
    yield "|---|---|---|---|---|---|---|"
    now, short, candidates = 0.0, [], ""
    for position, step in enumerate(steps):
        limit = limit_of(step, steps[position:], BUDGET - now)
        if limit is None:
            short.append(f"{step.name} is not begun")
            continue
        if step.name == LAST:
            # It uses whatever time is left.
            seconds = PLANNED * limit
            done = (seconds - START) / (COMPILE / CORES + CANDIDATE)
            candidates = f"{min(1.0, done / step.kernels):.0%} of its {step.kernels} candidates"
        elif step.name in computed:
            seconds = needed(step, computed[step.name])
            if seconds > limit:
                short.append(f"{step.name} needs {seconds:.0f} s and gets {limit:.0f}")
        else:
            seconds = 0.0
        now += min(seconds, limit)
        took = f"{computed[step.name]:.0f}" if step.name in computed else "not rehearsed"
        one = step.longest if step.longest else step.kernels
        yield f"| {step.name} | {took} | {step.kernels} | {one} | {seconds:.0f} | {limit:.0f} | {now:.0f} |"
        if step.name == LAST:
            break
    verdict = f"do not fit: {'; '.join(short)}" if short else f"fit: they end at {now:.0f} s of {BUDGET:g}"
    yield ""
    yield f"The steps down to {LAST} {verdict}; {LAST} gets through {candidates or 'nothing'}."
    yield ""
    yield (
        f"Assumed: {START:g} s until a process has a context on the GPU (a guess). What the rehearsal's processes "
        f"computed, interpreting, on {CORES} cores where a step has several, {UNEVEN:g} times an even share. "
        f"{COMPILE:g} s of a core a kernel, as many at once as there are cores, those of one process one by one. "
        f"{FIGURE:g} s a figure, {CANDIDATE:g} s a candidate of the tuning (guesses)."
    )
