"""The steps of tools/gpu_job.py, most valuable first: what a short loan of a GPU should answer first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """A command, and what it may cost.

    command: words in which {python}, {out} (a folder for its results), {seconds} (that it should take), {jobs} (cores)
    and {workers} (processes that share the GPU) are filled in. weight: its share of the remaining budget, relative to
    the steps after it. limit: seconds at which it is killed at the latest. least: it is not begun with fewer seconds
    left.
    needs: gpu, triton, transformers, idle (nobody else on the GPU), or a program on the PATH. memory: free GiB.
    rehearsal: the command without a GPU, interpreted; empty for a step that has none.
    For tools/gpu_estimate.py, kernels: that it compiles where the cache has none; longest: of them, those that one of
    its processes compiles; figures: that it times.
    """

    name: str
    command: tuple[str, ...]
    weight: float
    limit: float
    least: float = 20
    needs: tuple[str, ...] = ("gpu", "triton")
    memory: float = 2
    rehearsal: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    kernels: int = 0
    longest: int = 0
    figures: int = 0


# The share of its seconds that a step should plan with; the rest is for Python's start and end, and writing last
# results.
PLANNED = 0.75
# The step whose facts.json says what the others can have: it is part of every call.
DEVICE = "device"
PYTHON = "{python}"
FACTS = (PYTHON, "tools/gpu_device.py", "--out", "{out}")
TIMED = ("gpu", "triton", "idle")
INTERPRETED = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
# Each tensor in its own allocation, so that an access beside it is noticed.
SANITIZED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def conformance(*engines: str, tier: str = "core") -> tuple[str, ...]:
    chosen = (word for engine in engines for word in ("--engine", engine))
    known = ("--known", "ci/known_transformers.toml")
    command = (PYTHON, "-m", "moe_conformance.cli", "run", "--tier", tier, *chosen, *known)
    return (*command, "-n", "{workers}", "--out", "{out}")


def pytest(*words: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", "{out}/junit.xml", *words)


def launches(*words: str) -> tuple[str, ...]:
    return (PYTHON, "tools/twins.py", "--out", "{out}/twins.jsonl", "--seconds", "{seconds}", *words)


def table(*words: str) -> tuple[str, ...]:
    return (PYTHON, "benchmarks/kernels.py", *words, "--out", "{out}", "--seconds", "{seconds}")


def sanitizer(tool: str) -> str:
    return f"compute-sanitizer --tool {tool} --error-exitcode 9"


def limit_of(step: Step, waiting: Sequence[Step], left: float) -> float | None:
    """Seconds that it may take; None if too few are left to begin. waiting: this step and those after it."""
    if left < step.least:
        return None
    share = left * step.weight / sum(other.weight for other in waiting) if left < math.inf else left
    return round(min(step.limit, max(share, step.least)), 1)


TUNED = tuple(f"--model={name}" for name in ("gemma4", "qwen3", "deepseek-fp8", "gpt-oss"))
BATCHES = tuple(f"--tokens={tokens}" for tokens in (64, 8, 4096, 1))
TUNE = (PYTHON, "benchmarks/tune.py", "--out", "{out}/tuned", "--seconds", "{seconds}")
# Weights are by worth more than by need: what an early step leaves goes to those behind it. In eight minutes the first
# seven are meant to fit (tools/gpu_estimate.py). A limit is what a step may take where there is no budget. Kernels were
# counted without a GPU, by what each launch would specialise for an H200: of the launches' 112, 13 are in one process,
# of the triton engine's 811 (interpreted, with the tiles of an H200), 159 in one check, which one worker runs.
STEPS = (
    Step(DEVICE, FACTS, 1, 60, 30, (), 0, FACTS),
    Step(
        "launches", launches("--jobs", "{jobs}"), 8, 600,
        rehearsal=launches("--jobs", "{jobs}"), kernels=112, longest=13,
    ),
    Step("targets", table("--targets"), 10, 600, 30, TIMED, 16, table("--targets"), kernels=19, figures=29),
    Step("triton", conformance("triton"), 16, 900, rehearsal=conformance("triton"), kernels=811, longest=159),
    Step(
        "reference", conformance("moe_conformance.engines.reference:ReferenceOnGPU"), 4, 900, needs=("gpu",),
        rehearsal=conformance("reference"),
    ),
    Step(
        "transformers", conformance("moe_conformance.engines.transformers:TransformersOnGPU"), 5, 900,
        needs=("gpu", "transformers"),
        rehearsal=conformance("transformers"),
    ),
    Step(
        "tuning",
        (*TUNE, *TUNED, *BATCHES, "--jobs", "{jobs}"), 12, 600, 60, TIMED, 48,
        (*TUNE, "--model", "gemma4", "--dry-run"), kernels=4163,
    ),
    Step(
        "vllm", conformance("vllm", "vllm-triton", "vllm-flashinfer-cutlass", "vllm-flashinfer-trtllm"), 4, 1800, 60,
        ("gpu", "vllm"), 16,
    ),
    Step("quick", table("--quick"), 1, 180, 30, TIMED, 16, table("--quick")),
    Step("graphs", pytest("-n", "0", "tests/test_gpu.py"), 1, 180),
    Step(
        "memcheck", launches("--jobs", "{workers}", "--under", sanitizer("memcheck")), 1, 600, 30,
        ("gpu", "triton", "compute-sanitizer"), environment=SANITIZED,
    ),
    Step(
        "racecheck", launches("--jobs", "{workers}", "--under", sanitizer("racecheck")), 0.5, 600, 30,
        ("gpu", "triton", "compute-sanitizer"),
    ),
    Step("table", table(), 1, 900, 60, TIMED, 16, table("--model", "nemotron-padded", "--tokens", "3")),
    Step("twins", pytest("-n", "{workers}", "tests/kernel_twins"), 0.5, 900, 60, memory=16),
    Step(
        "memcheck-twins", (*sanitizer("memcheck").split(), *pytest("-n", "0", "tests/kernel_twins")), 0.2, 900, 60,
        ("gpu", "triton", "compute-sanitizer"), 16, environment=SANITIZED,
    ),
    Step(
        "interpreted", pytest("-n", "{jobs}", "tests/test_kernels.py", "tests/kernel_twins"),
        0.2, 900, 60, ("triton",), 0, pytest("-n", "0", "tests/kernel_twins/test_padding.py"), INTERPRETED,
    ),
    Step(
        "aot", (PYTHON, "tools/aot.py"), 0.2, 600, 60, ("triton",), 0,
        (PYTHON, "tools/aot.py", "--only", "gate_up Gemma", "--target", "sm_90"), {"TRITON_INTERPRET": "0"},
    ),
)  # fmt: skip
