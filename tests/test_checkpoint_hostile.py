"""`checkpoint` on folders that nobody vouches for: one error of the project, soon and in little memory."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import INDEX, T, config_of, file_of, floats, raw_file, write

from moe_conformance.checkpoints.command import judged
from moe_conformance.checkpoints.headers import MOST_HEADER
from moe_conformance.cli import main
from moe_conformance.errors import CheckpointError

FIRST, LAST = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def invoke(*arguments: str) -> tuple[int, str]:
    """Exit code, and what was printed to either stream."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output), pytest.raises(SystemExit) as ended:
        main(["checkpoint", *arguments])
    return int(ended.value.code or 0), output.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model", config_of("qwen3_moe"), floats("qwen3_moe"))


def entry(shape: Any = (2,), offsets: Any = (0, 4), dtype: Any = "BF16", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def header(text: Any, data: bytes = b"") -> bytes:
    return raw_file(text if isinstance(text, bytes) else json.dumps(text).encode(), data)


DEEP = b"[" * 1000 + b"]" * 1000
TWICE = b"{" + b",".join(b'"a":1,"a":1' for _ in range(10_000)) + b"}"
# A shard: its bytes, and what must be said of it.
SHARDS: dict[str, tuple[bytes, str]] = {
    "length-huge": (struct.pack("<Q", 2**63) + b"{}", f"at most {MOST_HEADER}"),
    "length-minus-one": (struct.pack("<q", -1) + b"{}", f"at most {MOST_HEADER}"),
    "length-just-above": (struct.pack("<Q", MOST_HEADER + 1) + b"{}", f"at most {MOST_HEADER}"),
    "length-beyond-the-file": (struct.pack("<Q", 1000) + b"{}", "in a file of 10"),
    "length-zero": (struct.pack("<Q", 0), "not readable as JSON"),
    "too-short": (b"\1\2\3", "3 bytes"),
    "no-json": (header(b"}{"), "not readable as JSON"),
    "no-object": (header([1, 2]), "a JSON list"),
    "no-utf-8": (header(b'{"\xff\xfe":1}'), "not UTF-8"),
    "deep": (header(b'{"a":' + DEEP + b"}"), "recursion"),
    "very-deep": (header(b'{"a":' + b"[" * 100_000 + b"}"), "not readable as JSON"),
    "keys-twice": (header(TWICE), "a given twice"),
    "names-twice": (
        header(b'{"a":%s,"a":%s}' % ((json.dumps(entry(), separators=(",", ":")).encode(),) * 2), bytes(4)),
        "a given twice",
    ),
    "entry-no-object": (header({"a": 3}), "want dtype, shape and data_offsets"),
    "entry-without-shape": (header({"a": {"dtype": "BF16", "data_offsets": [0, 4]}}), "want dtype, shape"),
    "dtype-unknown": (header({"a": entry(dtype="F7", code="import os")}, bytes(4)), "of dtype 'F7'"),
    "dtype-no-text": (header({"a": entry(dtype=["BF16"])}, bytes(4)), "of dtype ['BF16']"),
    "shape-negative": (header({"a": entry((-2,))}, bytes(4)), "not negative"),
    "shape-of-floats": (header({"a": entry((2.0,))}, bytes(4)), "not negative"),
    "shape-of-booleans": (header({"a": entry((True, 2))}, bytes(4)), "not negative"),
    "shape-no-list": (header({"a": {"dtype": "BF16", "shape": 2, "data_offsets": [0, 4]}}), "lists of integers"),
    "shape-overflows": (header({"a": entry((2**40, 2**40, 2**40))}, bytes(4)), "below 2**63"),
    "shape-of-many-digits": (
        header(b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,4]}}' % (b"9" * 5000)),
        "2**63",
    ),
    "shape-of-twenty-digits": (
        header(b'{"a":{"dtype":"U8","shape":[99999999999999999999],"data_offsets":[0,4]}}'),
        "2**63",
    ),
    "shape-with-a-gap": (header(b'{"a":{"dtype":"U8","shape":[2,,2],"data_offsets":[0,4]}}', bytes(4)), "a list of"),
    "shape-of-many-sizes": (header({"a": entry((1,) * 1000 + (2,))}, bytes(4)), "at most 64 sizes"),
    "offsets-backwards": (header({"a": entry(offsets=(4, 0))}, bytes(4)), "in -4 bytes"),
    "offsets-negative": (header({"a": entry(offsets=(-4, 0))}, bytes(4)), "not negative"),
    "offsets-three": (header({"a": entry(offsets=(0, 2, 4))}, bytes(4)), "not negative"),
    "offsets-beyond": (header({"a": entry(offsets=(0, 4))}, bytes(2)), "2 bytes of data"),
    "offsets-far-beyond": (header({"a": entry(offsets=(2**40, 2**40 + 4))}, bytes(4)), "leaves a hole"),
    "offsets-of-another-size": (header({"a": entry(offsets=(0, 6))}, bytes(6)), "in 6 bytes"),
    "overlapping": (header({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6)), "overlaps"),
    "the-same-bytes": (header({"a": entry(), "b": entry()}, bytes(4)), "overlaps"),
    "hole": (header({"a": entry(), "b": entry(offsets=(6, 10))}, bytes(10)), "leaves a hole"),
    "bytes-behind": (header({"a": entry()}, bytes(400)), "396 bytes that are of no tensor"),
    "half-a-byte": (header({"a": entry((3,), (0, 2), "F4")}, bytes(2)), "whole number of bytes"),
    "between-entries": (
        header(
            b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},!!"b":{"dtype":"U8","shape":[],"data_offsets":[4,5]}}',
            bytes(5),
        ),
        "not readable as JSON",
    ),
    "behind-the-object": (
        header(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"b":{"dtype":"U8"}', bytes(4)),
        "not readable as JSON",
    ),
    "a-pickle": (b"\x80\x05cos\nsystem\n(S'touch /tmp/x'\ntR.", f"at most {MOST_HEADER}"),
}


@pytest.mark.parametrize("shard", SHARDS)
def test_a_hostile_shard_is_a_defect_that_names_it(shard: str, folder: Path) -> None:
    content, words = SHARDS[shard]
    (folder / LAST).write_bytes(content)
    code, said = invoke(str(folder))
    assert (code, LAST in said, words in said) == (1, True, True), said
    assert ("download the file again" in said or "save the file again" in said) and "Traceback" not in said
    assert said.count("defect: ") == 1, said


def replaced(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def linked(file: str, target: str) -> Callable[[Path], object]:
    return lambda folder: ((folder / file).unlink(), (folder / file).symlink_to(target))


def piped(file: str) -> Callable[[Path], object]:
    return lambda folder: ((folder / file).unlink(missing_ok=True), os.mkfifo(folder / file))


def names(shard: str) -> bytes:
    return json.dumps({"weight_map": {"a": shard}}).encode()


def configured(**keys: Any) -> Callable[[Path], object]:
    return replaced("config.json", json.dumps({**config_of("qwen3_moe"), **keys}).encode())


# What is done to a folder; the exit code; what must be said.
FOLDERS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "config-missing": (lambda folder: (folder / "config.json").unlink(), 2, "config.json: not there"),
    "config-empty": (replaced("config.json", b""), 2, "config.json: not readable as JSON"),
    "config-no-utf-8": (replaced("config.json", b"\xff\xfe{}"), 2, "config.json: not readable as JSON"),
    "config-a-list": (replaced("config.json", b"[]"), 2, "a JSON list"),
    "config-deep": (replaced("config.json", b'{"text_config":' + b'{"a":' * 100_000), 2, "not readable as JSON"),
    "config-nested": (
        replaced("config.json", b'{"text_config":' * 1000 + b"{}" + b"}" * 1000),
        2,
        "recursion",
    ),
    "config-twice": (replaced("config.json", TWICE), 2, "a given twice"),
    "config-of-many-digits": (replaced("config.json", b'{"num_experts":' + b"9" * 100_000 + b"}"), 2, "JSON"),
    "config-of-five-levels": (
        replaced("config.json", b'{"text_config":' * 5 + b"{}" + b"}" * 5),
        1,
        "at most 4 levels",
    ),
    "config-a-pipe": (piped("config.json"), 2, "a pipe or a device"),
    "config-a-device": (linked("config.json", "/dev/zero"), 2, "a link to /dev/zero"),
    "config-elsewhere": (linked("config.json", "/etc/passwd"), 2, "a link to /etc/passwd"),
    "config-a-folder": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
        2,
        "JSON",
    ),
    "experts-absurd": (configured(num_experts=10**12), 1, "want an integer from"),
    "layers-absurd": (configured(num_hidden_layers=10**9), 1, "want an integer from"),
    "width-absurd": (configured(moe_intermediate_size=10**30), 1, "want an integer from"),
    "experts-many": (configured(num_experts=2**18, num_hidden_layers=2048), 1, "11 experts"),
    "experts-infinite": (replaced("config.json", b'{"model_type":"qwen3_moe","num_experts":Infinity}'), 1, "inf"),
    "model-type-no-text": (configured(model_type=["qwen3_moe"]), 1, "model_type"),
    "model-type-long": (configured(model_type="x" * 10**6), 0, "no-record"),
    "quantisation-a-list": (configured(quantization_config=[1]), 1, "want a map"),
    "quantisation-of-nonsense": (
        configured(quantization_config={"quant_method": "compressed-tensors", "config_groups": {"a": 3}}),
        1,
        "want a map with weights",
    ),
    "block-of-nothing": (
        configured(quantization_config={"quant_method": "fp8", "weight_block_size": [0, 0]}),
        1,
        "weight_block_size",
    ),
    "block-no-list": (configured(quantization_config={"quant_method": "fp8", "weight_block_size": 128}), 1, "rows and"),
    "method-no-text": (configured(quantization_config={"quant_method": 8}), 1, "quant_method: got 8"),
    "ignore-no-list": (
        configured(quantization_config={"quant_method": "fp8", "ignore": "lm_head"}),
        1,
        "list of names",
    ),
    "groups-a-list": (
        configured(quantization_config={"quant_method": "compressed-tensors", "config_groups": [3]}),
        1,
        "config_groups: got [3]",
    ),
    "modelopt-a-list": (replaced("hf_quant_config.json", b'{"quantization": [3]}'), 1, "quantization: got [3]"),
    "group-of-nothing": (configured(quantization_config={"quant_method": "gptq", "group_size": -7}), 1, "group_size"),
    "ignore-of-a-slow-pattern": (
        configured(quantization_config={"quant_method": "fp8", "ignore": ["re:(a+)+$", "re:(.*)*" * 100]}),
        1,
        "no tensor in such a form",
    ),
    "index-traversal": (replaced(INDEX, names("../../etc/passwd.safetensors")), 2, "in the same folder"),
    "index-absolute": (replaced(INDEX, names("/etc/passwd.safetensors")), 2, "in the same folder"),
    "index-with-zero": (replaced(INDEX, names("a\0.safetensors")), 2, "in the same folder"),
    "index-no-safetensors": (replaced(INDEX, names("pytorch_model.bin")), 2, "the name of a .safetensors file"),
    "index-number": (replaced(INDEX, b'{"weight_map":{"a":3}}'), 2, "the name of a .safetensors file"),
    "index-long-name": (replaced(INDEX, names("x" * 300 + ".safetensors")), 1, "File name too long"),
    "index-deep": (replaced(INDEX, b'{"weight_map":' + DEEP + b"}"), 2, "recursion"),
    "index-twice": (replaced(INDEX, TWICE), 2, "a given twice"),
    "index-a-pipe": (piped(INDEX), 2, "a pipe or a device"),
    "index-empty": (replaced(INDEX, b"{}"), 2, "no weight_map"),
    "shard-a-pipe": (piped(LAST), 1, "a pipe, a device or a folder"),
    "shard-a-device": (linked(LAST, "/dev/zero"), 1, "a link to /dev/zero"),
    "shard-elsewhere": (linked(LAST, "/etc/passwd"), 1, "a link to /etc/passwd"),
    "shard-a-loop": (linked(LAST, LAST), 1, LAST),
    "shard-a-folder": (lambda folder: ((folder / LAST).unlink(), (folder / LAST).mkdir()), 1, LAST),
    "a-pickle-beside": (piped("pytorch_model.bin"), 0, "may run code"),
    "a-stray-pipe-beside": (piped("other.safetensors"), 0, "no part of the model"),
    "no-tensors": (lambda folder: [path.unlink() for path in folder.glob("model*")], 2, "has neither"),
}


@pytest.mark.parametrize("hostile", FOLDERS)
def test_a_hostile_folder_is_one_error(hostile: str, folder: Path) -> None:
    change, code, words = FOLDERS[hostile]
    change(folder)
    got, said = invoke(str(folder))
    assert (got, words in said) == (code, True), said
    assert "Traceback" not in said and len(said) < 5000
    if code == 2:
        assert said.count("\n") == 1 and said.startswith("moe-conformance: ") and ";" in said


@pytest.mark.parametrize("given", ["nowhere", "model/config.json", "x" * 300, "a\0b"])
def test_what_is_no_folder_is_refused(given: str, folder: Path) -> None:
    code, said = invoke(str(folder.parent / given))
    assert code == 2 and "point to the model's folder" in said


def test_a_folder_of_everything_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_conformance.checkpoints.folder.MOST_FILES", 3)
    code, said = invoke(str(folder))
    assert code == 2 and "more than 3 files" in said


def test_a_file_without_rights_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user who may not read it; root, as whom tests may run, may read all."""
    real = os.open

    def denied(path: Any, *arguments: Any, **more: Any) -> int:
        if str(path).endswith((LAST, "hidden.json")):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", denied)
    code, said = invoke(str(folder))
    assert code == 1 and f"unreadable: {LAST}" in said and "Permission denied" in said


def test_names_that_would_drive_a_terminal_are_shown_as_text(folder: Path) -> None:
    evil = "model.layers.5.mlp.experts.\x1b[31m\n.weight"
    (folder / LAST).write_bytes(file_of({evil: T("BF16", (2,))}))
    for form in ((), ("--json",), ("--markdown",)):
        code, said = invoke(str(folder), *form)
        assert code == 1 and "\x1b" not in said and r"\x1b[31m" in said.replace(r"\u001b", r"\x1b")


def cost(*command: str) -> tuple[float, int]:
    """Seconds of the processor, and MiB."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Traceback" not in done.stderr, done.stderr
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, int(done.stdout.splitlines()[-1]) if done.stdout else 0


MEASURED = """
import contextlib, io, sys
from moe_conformance.cli import main
try:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(["checkpoint", sys.argv[1]])
except SystemExit:
    pass
assert not {"torch", "numpy", "safetensors", "transformers"} & sys.modules.keys()
# Not ru_maxrss, which begins with what the parent had.
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
QUICK: dict[str, Callable[[Path], object]] = {
    "sound": lambda folder: None,
    "experts-many": configured(num_experts=2**18, num_hidden_layers=2048),
}
SLOW: dict[str, Callable[[Path], object]] = {
    "a-header-of-braces": replaced(LAST, header(b"[" * (MOST_HEADER - 8))),
    "keys-by-the-million": replaced(LAST, header(b"{" + b'"a":1,' * 1_000_000 + b'"b":1}')),
    "layers-many": configured(num_hidden_layers=2048, mlp_only_layers=[]),
    "left-many": configured(quantization_config={"quant_method": "fp8", "ignore": ["re:.*.*.*x" * 9] * 10_000}),
}


@pytest.mark.parametrize("hostile", [*QUICK, *(pytest.param(name, marks=pytest.mark.nightly) for name in SLOW)])
def test_it_costs_no_more_than_ten_bare_interpreters_and_200_megabytes(hostile: str, tmp_path: Path) -> None:
    """And imports neither torch nor numpy nor safetensors. The least of eight runs: others compute beside."""
    folder = write(tmp_path / "model", config_of("qwen3_moe"), floats("qwen3_moe"))
    (QUICK | SLOW)[hostile](folder)
    bare = min(cost("-c", "pass")[0] for _ in range(4))
    seconds, memory = cost("-c", MEASURED, str(folder))
    for _ in range(7):
        if seconds >= 10 * max(bare, 0.02):
            seconds, memory = min((seconds, memory), cost("-c", MEASURED, str(folder)))
    assert memory < 200
    assert seconds < 10 * max(bare, 0.02)


def test_headers_that_are_too_much_together_are_one_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_conformance.checkpoints.folder.MOST_HEADERS", 5000)
    with pytest.raises(CheckpointError, match=r"headers of more than 5000 bytes together, up to model-0000"):
        judged(folder)
