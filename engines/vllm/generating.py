"""The running engine: `LLM` in a process of its own, which serves one folder and ends."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch

from moe_conformance.engine import RECORDS, Generated, GenerateInputs, Unsupported, called_by_engine
from moe_conformance.engines.vllm import device


def features() -> frozenset[str]:
    """None without compiled libraries: no model of vLLM's runs on a CPU without its attention."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    if not any(Path(vllm.__path__[0]).glob("_C*.so")):
        raise ImportError("vllm._C")
    returns_routes = "enable_return_routed_experts" in inspect.signature(EngineArgs).parameters
    types = {record.model_type for record in RECORDS.values()}
    schedules = {"step_tokens", "prefix_cache", "answers_each", "preemption", "withdrawn", "ranks", "bfloat16"}
    return frozenset({*schedules, *types, *(["routed_experts"] * returns_routes)})


class EngineFailed(Exception):
    """The engine raised or died."""


def generate(inputs: GenerateInputs) -> Generated:
    """Raises EngineFailed with what the engine raised, or how it died."""
    if inputs.routed and device.interprets():
        if inputs.answers_each > 1:
            raise Unsupported("vLLM draws several answers by a Triton kernel that Triton's interpreter does not take")
        if inputs.ranks > 1:
            raise Unsupported("vLLM spawns its ranks for a CPU, where none has the Triton that returning routes takes")
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch) / "question.json", Path(scratch) / "answer.json"
        question.write_text(json.dumps({**asdict(inputs), "folder": str(inputs.folder)}))
        environment = {
            **os.environ,
            # The engine in the process that asks; one core; nothing compiled.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_CACHE_ROOT": scratch,
            **({"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if inputs.ranks > 1 else {}),
            # Its runner that returns routes wants Triton, which is interpreted then.
            "TRITON_INTERPRET": str(int(inputs.routed and device.interprets())),
        }
        command = [sys.executable, "-P", "-m", "moe_conformance.engines.vllm.serving", str(question), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
        if not answer.exists():
            last = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()][-3:]
            _fail(f"LLM: exit code {done.returncode}: {' / '.join(last)}")
        said = json.loads(answer.read_text())
    if "failed" in said:
        # What a build lacks, and a machine on which its workers do not start.
        if any(words in said["failed"] for words in ("not supported", "WorkerProc initialization failed")):
            raise Unsupported(f"vLLM: {said['failed']}")
        _fail(said["failed"])
    routed = said["routed"] and tuple(map(torch.tensor, said["routed"]))
    return Generated(tuple(map(tuple, said["tokens"])), routed or None)


@called_by_engine
def _fail(words: str) -> NoReturn:
    """What the engine raised, or how it died, in its own words: its failure, though it came as text."""
    raise EngineFailed(words)
