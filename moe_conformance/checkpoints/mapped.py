"""Names that an installed engine would not map, by its own classes, rules and loaders; no value is read.

Of every tensor of the model, not of its experts alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_conformance.checkpoints.findings import Findings
from moe_conformance.checkpoints.folder import CONFIG, Folder
from moe_conformance.errors import CheckpointError, Unsupported, UsageError
from moe_conformance.quote import plainly

# Whose own loader is followed, in a process of its own; the package of each, and its name in prose.
SERVERS: Mapping[str, str] = {"vllm": "vLLM", "sglang": "SGLang"}
# A 600 GB model takes its loader two minutes without values.
SECONDS = 1800


def ask(engines: Sequence[str]) -> None:
    """Raises UsageError for an engine that is not installed, before anything is read."""
    for engine in engines:
        if absent := [name for name in ("torch", engine) if find_spec(name) is None]:
            raise UsageError(f"--{engine}: {absent[0]} is not installed here; install it, or leave the option out")


def hold_against(engine: str, folder: Folder, findings: Findings) -> None:
    """engine: "transformers", or of SERVERS."""
    if engine in SERVERS:
        hold_against_server(engine, folder, findings)
    else:
        hold_against_transformers(folder, findings)


def hold_against_transformers(folder: Folder, findings: Findings) -> None:
    """Only folders of plain floats: what a quantiser's tensors are put into depends on the kernels installed."""
    import torch

    from moe_conformance.engines.transformers.skeleton import built, sources

    if folder.config.get("quantization_config") or folder.modelopt:
        _not_judged("transformers", "the folder is quantised", findings)
        return
    try:
        model = built(folder.path, folder.config, torch.bfloat16)
    except (Unsupported, CheckpointError) as error:
        _not_judged("transformers", str(error), findings)
        return
    filled = sources(model, folder.tensors)
    state = model.state_dict()
    for target, names in filled.items():
        if target not in state and not _is_ignored(model, "unexpected", target):
            _unmapped("transformers", folder, names, findings)
    if not folder.whole:
        return  # what is in a shard that could not be read is not missing
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name in state:
        if name not in filled and name not in tied and not _is_ignored(model, "missing", name):
            _unfilled("transformers", name, findings)


def _is_ignored(model: Any, what: str, name: str) -> bool:
    """By the model's class itself: positions, draft layers, tied weights."""
    patterns = getattr(model, f"_keys_to_ignore_on_load_{what}", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def hold_against_server(engine: str, folder: Folder, findings: Findings) -> None:
    """engine: of SERVERS."""
    name, found = SERVERS[engine], _traced(engine, folder)
    for tensor, words in found.get("raised", ()):
        findings.add(
            "refused",
            folder.tensors[tensor].file,
            tensor,
            got=f"{plainly(words)[:300]}, from {name} {found['release']} at this tensor",
            want="names and shapes that its loader takes",
            do="rename or remove it, take config.json from where the tensors come from, or take another release",
        )
    if found["why"]:
        _not_judged(name, plainly(found["why"])[:600], findings)
        return
    _unmapped(name, folder, found["unmapped"], findings)
    is_quantised = bool(folder.config.get("quantization_config") or folder.modelopt)
    for what, got in (("unfilled", "no tensor"), ("partial", "tensors for a part alone")):
        for parameter in found[what] if folder.whole else ():
            _unfilled(name, parameter, findings, got, is_quantised)


def _traced(engine: str, folder: Folder) -> dict[str, Any]:
    from moe_conformance.running.child import python

    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        command = python("moe_conformance.engines.traced", engine, str(folder.path.absolute()), str(answer))
        try:
            done = subprocess.run(
                command,
                env={**os.environ, **_environment(engine)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"why": f"it took more than {SECONDS} s"}
        if done.returncode == 0 and answer.exists():
            found: dict[str, Any] = json.loads(answer.read_text())
            return found
        last = done.stdout.decode(errors="replace").strip().splitlines()[-1:] or ["without a word"]
        return {"why": f"its process ended with exit code {done.returncode}: {last[0]}"}


def _environment(engine: str) -> Mapping[str, str]:
    if engine == "vllm":
        from moe_conformance.engines.vllm import VLLM

        return VLLM.environment()
    from moe_conformance.engines.sglang import SGLang

    return SGLang.environment()


def _unmapped(engine: str, folder: Folder, names: list[str], findings: Findings) -> None:
    for name in names:
        findings.add(
            "unmapped",
            folder.tensors[name].file,
            name,
            got=f"a tensor that {engine}'s model has no place for, and leaves out",
            want="names that its class maps",
            do="rename it, or see that nothing needs it, as a draft layer",
            level="note",
        )


def _unfilled(engine: str, name: str, findings: Findings, got: str = "no tensor", is_quantised: bool = False) -> None:
    """Of a quantised model a note: what a quantiser need not write has a value from the start, as scales of a cache."""
    findings.add(
        "unfilled",
        CONFIG,
        name,
        got=f"{got} that {engine} would put there",
        want="one for every parameter of the model, which is drawn at random otherwise",
        do="mend the export, or take config.json from where the tensors come from",
        level="note" if is_quantised and not re.search(r"(weight|weight_packed|qweight)$", name) else "defect",
    )


def _not_judged(engine: str, why: str, findings: Findings) -> None:
    findings.add(
        "engine",
        CONFIG,
        got=f"names that were not held against {engine}: {why}",
        want="a model that it builds on this machine",
        do="see what it says of missing and unexpected keys when it loads the folder",
        level="note",
    )
