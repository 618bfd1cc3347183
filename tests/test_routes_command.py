"""`moe-conformance routes`: what it reads, what it refuses, what it prints, and with which exit code."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_routes import Record, recorded, shifted

from moe_conformance.cli import main
from moe_conformance.routes.command import judged
from moe_conformance.suites.generate.models import whole_model


def invoke(*arguments: Any) -> tuple[int, str, str]:
    """Exit code, and what was printed to either stream."""
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error), pytest.raises(SystemExit) as ended:
        main(["routes", *map(str, arguments)])
    return int(ended.value.code or 0), out.getvalue(), error.getvalue()


@pytest.fixture(scope="module")
def model() -> Iterator[tuple[Path, Record]]:
    with tempfile.TemporaryDirectory() as folder:
        whole = whole_model("qwen3-moe")
        whole.write(Path(folder))
        requests = [prompt + tokens for prompt, tokens in zip(whole.prompts, whole.tokens, strict=True)]
        yield Path(folder), recorded(Path(folder), requests)


def in_base64(array: Any) -> str:
    held = io.BytesIO()
    np.save(held, array)
    return base64.b64encode(held.getvalue()).decode()


def as_npy(record: Record, folder: Path) -> list[Any]:
    np.save(folder / "record.npy", record.ids[0].astype(np.uint8))
    np.save(folder / "tokens.npy", record.tokens[0])
    return [folder / "record.npy", "--tokens", folder / "tokens.npy"]


def as_lines(form: str, record: Record, folder: Path) -> list[Any]:
    """The answers of vLLM's objects or server, or of SGLang's."""
    lines = []
    for tokens, ids in zip(record.tokens, record.ids, strict=True):
        prompt, answer = tokens[:-8].tolist(), tokens[-8:].tolist()
        if form == "sglang":
            meta = {"routed_experts": base64.b64encode(ids.astype("<i4").tobytes()).decode()}
            lines.append({"input_ids": prompt, "output_ids": answer, "meta_info": meta, "shape": ids.shape[1:]})
        else:
            routed = in_base64(ids.astype(np.uint8)) if form == "vllm-server" else ids.tolist()
            lines.append({"prompt_token_ids": prompt, "token_ids": answer, "routed_experts": routed})
    (folder / "record.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [folder / "record.jsonl"]


@pytest.mark.parametrize("form", ["npy", "vllm", "vllm-server", "sglang"])
def test_every_form_of_a_record_is_read(form: str, model: tuple[Path, Record], tmp_path: Path) -> None:
    folder, record = model
    for change, code in ((record, 0), (shifted(1)(record), 1)):
        given = as_npy(change, tmp_path) if form == "npy" else as_lines(form, change, tmp_path)
        assert invoke(folder, *given)[0] == code


def test_columns_may_be_of_moe_layers_alone(model: tuple[Path, Record], tmp_path: Path) -> None:
    folder, record = model
    compact = replace(record, ids=tuple(ids[:, list(record.moe_layers)] for ids in record.ids))
    assert judged(folder, compact.save(tmp_path / "record.safetensors")).is_sound


def test_dense_layers_in_a_record_of_moe_layers_alone_are_named(model: tuple[Path, Record], tmp_path: Path) -> None:
    folder, record = model
    compact = replace(record, ids=tuple(ids[:, : len(record.moe_layers)] for ids in record.ids))
    found = judged(folder, compact.save(tmp_path / "record.safetensors"))
    assert [finding.kind for finding in found.findings] == ["dense-counted"]


def test_a_sample_of_rows_says_which_they_are(model: tuple[Path, Record], tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    folder, record = model
    rows = np.arange(0, 40, 3)
    parts = {"tokens.7": record.tokens[0], "routed_experts.7": record.ids[0][rows], "positions.7": rows}
    save_file(parts, tmp_path / "record.safetensors")
    assert judged(folder, tmp_path / "record.safetensors").findings == ()
    save_file({**parts, "positions.7": rows + 1}, tmp_path / "record.safetensors")
    assert [finding.kind for finding in judged(folder, tmp_path / "record.safetensors").findings] == ["shifted"]


def test_one_wrong_row_is_a_defect_with_its_place(model: tuple[Path, Record], tmp_path: Path) -> None:
    """In float32, where nothing but near ties is open."""
    folder, record = model
    record.ids[1][20, 2] = sorted(set(range(8)) - set(record.ids[1][20, 2].tolist()))[:2]
    try:
        code, out, _ = invoke(folder, record.save(tmp_path / "record.safetensors"))
    finally:
        record.ids[1][20] = recorded(folder, [record.tokens[1].tolist()]).ids[0][20]
    assert code == 1
    assert "defect: unlike: record.safetensors\n  request 1 (rows 20 of layers 2)\n" in out


def test_single_rows_in_bfloat16_are_counted(model: tuple[Path, Record], tmp_path: Path) -> None:
    """The record of the model in bfloat16: a few others, as many as are expected; with every tenth wrong, too many."""
    folder, record = model
    own = recorded(folder, [tokens.tolist() for tokens in record.tokens], "bfloat16")
    found = judged(folder, own.save(tmp_path / "record.safetensors"), dtype="bfloat16")
    assert found.findings == () and found.expected < 10
    for ids in own.ids:
        ids[::5, 2, 0] = (ids[::5, 2, 1] + 1) % 8
    found = judged(folder, own.save(tmp_path / "record.safetensors"), dtype="bfloat16")
    assert [(finding.level, finding.kind) for finding in found.findings][-1] == ("note", "more-differ")


def test_text_says_layers_places_and_what_to_do(model: tuple[Path, Record], tmp_path: Path) -> None:
    folder, record = model
    code, out, error = invoke(folder, shifted(1)(record).save(tmp_path / "record.safetensors"))
    assert (code, error) == (1, "")
    lines = out.splitlines()
    assert lines[0].endswith("record.safetensors: 4 requests, 117 rows; 3 layers, 2 with 8 experts, float32")
    assert [line.split("|")[1].strip() for line in lines[2:6]] == ["layer", "------:", "1", "2"]
    assert "defect: shifted: record.safetensors" in lines
    assert any(line.startswith("  request 0 (rows 0, 2-46), request 1") for line in lines)
    assert "of 1 position earlier" in out and "  record each step's rows at its own positions" in out


def test_json_says_every_row(model: tuple[Path, Record], tmp_path: Path) -> None:
    folder, record = model
    code, out, _ = invoke(folder, record.save(tmp_path / "record.safetensors"), "--json")
    said = json.loads(out)
    assert (code, said["sound"], said["rows"], said["findings"]) == (0, True, 117, [])
    assert [len(one["rows"]) for one in said["cells"]] == [len(ids) for ids in record.ids]
    assert said["cells"][0]["rows"][0] == "00"
    assert [layer["layer"] for layer in said["layers"]] == [1, 2]


def test_markdown_has_both_tables(model: tuple[Path, Record], tmp_path: Path) -> None:
    folder, record = model
    _, out, _ = invoke(folder, shifted(1)(record).save(tmp_path / "record.safetensors"), "--markdown")
    assert out.startswith("# `") and "| layer |" in out and "| defect | shifted |" in out


def npy(change: Any) -> Any:
    def write(record: Record, folder: Path) -> list[Any]:
        given = as_npy(record, folder)
        np.save(folder / "record.npy", change(record.ids[0]), allow_pickle=True)
        return given

    return write


class Touching:
    """A pickle that leaves a file behind if anybody opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def cut(record: Record, folder: Path) -> list[Any]:
    given = as_npy(record, folder)
    path = folder / "record.npy"
    path.write_bytes(path.read_bytes()[:-5])
    return given


def headed(header: bytes) -> Any:
    def write(record: Record, folder: Path) -> list[Any]:
        given = as_npy(record, folder)
        (folder / "record.npy").write_bytes(b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header)
        return given

    return write


def line(**keys: Any) -> Any:
    said = {"prompt_token_ids": [1, 2], "token_ids": [3, 4], "routed_experts": [[[0, 1]] * 3] * 3, **keys}

    def write(_: Record, folder: Path) -> list[Any]:
        (folder / "record.jsonl").write_text(json.dumps(said))
        return [folder / "record.jsonl"]

    return write


# What is wrong with a record -> how it is written, and what must be said of it.
BAD: dict[str, tuple[Any, str]] = {
    "floats": (npy(lambda ids: ids.astype(np.float32)), "got float32, want integers"),
    "booleans": (npy(lambda ids: ids > 0), "got bool, want integers"),
    "two-dimensions": (npy(lambda ids: ids[:, 0]), "want [rows, layers, k]"),
    "layers": (npy(lambda ids: np.repeat(ids, 2, axis=1)), "got [layers, k] [6, 2], want [3, 2] or [2, 2]"),
    "another-k": (npy(lambda ids: ids[:, :, :1]), "got [layers, k] [3, 1], want [3, 2]"),
    "no-rows": (npy(lambda ids: ids[:0]), "want at least one"),
    "too-many-rows": (npy(lambda ids: np.repeat(ids, 2, axis=0)), "want at most 48"),
    "text": (npy(lambda ids: ids.astype("U4")), "want integers"),
    "cut": (cut, "save it again"),
    "header-huge": (headed(b"{'descr': '<i4', 'fortran_order': False, 'shape': (10**12, 3, 2), }"), "not readable"),
    "shape-huge": (headed(b"{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000, 3, 2), }\n"), "save it"),
    "header-deep": (headed(b"[" * 9000), "not readable as .npy"),
    "header-long": (headed(b" " * 10**6 + b"{}\n"), "not readable as .npy"),
    "header-of-code": (headed(b"__import__('os').abort()\n"), "not readable as .npy"),
    "no-npy": (lambda r, f: [*as_npy(r, f)[:1], "--tokens", __file__], "is no .npy file"),
    "no-tokens": (lambda r, f: as_npy(r, f)[:1], "--tokens: got none"),
    "not-there": (lambda r, f: [f / "record.jsonl"], "not readable (No such file"),
    "another-ending": (lambda r, f: [f / "record.npz"], "want .npy, .safetensors or .jsonl"),
    "no-json": (lambda r, f: [(f / "a.jsonl").write_text("{") and f / "a.jsonl"], "not readable as JSON"),
    "empty": (lambda r, f: [(f / "a.jsonl").write_text("\n") and f / "a.jsonl"], "got no request"),
    "uneven-lists": (line(routed_experts=[[[0, 1]], [[0]]]), "lists of different lengths"),
    "null": (line(routed_experts=[[[0, None]]]), "want integers"),
    "no-base64": (line(routed_experts="?"), "not readable as base64"),
    "no-shape": (line(routed_experts="AAAAAAAAAAA="), "want [layers, k] beside SGLang's"),
    "lacks-tokens": (line(token_ids=None), "want prompt_token_ids or input_ids"),
    "token-beyond": (line(token_ids=[3, 96]), "got token id 96, want 0 to 96 exclusive"),
    "token-negative": (line(token_ids=[3, -1]), "got token id -1"),
    "huge-number": (line(token_ids=[3, 10**30]), "want integers"),
    "rank-no-number": (line(rank="0"), "rank: got '0'"),
    "positions-beyond": (line(positions=[0, 1, 9]), "want ascending, below 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_one_error(name: str, model: tuple[Path, Record], tmp_path: Path) -> None:
    folder, record = model
    write, words = BAD[name]
    code, out, error = invoke(folder, *write(record, tmp_path))
    assert (code, out) == (2, "") and words in error, error
    assert error.count("\n") == 1 and "Traceback" not in error


def test_a_pickle_is_never_opened(model: tuple[Path, Record], tmp_path: Path) -> None:
    folder, record = model
    objects = np.array([Touching(tmp_path / "opened"), None], dtype=object)
    code, _, error = invoke(folder, *npy(lambda ids: objects)(record, tmp_path))
    assert code == 2 and "got object, want integers" in error
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("a tensor of another name", {"ids.0": np.zeros(3, np.int64)}, "got tensor ids.0"),
        ("no experts", {"tokens.0": np.zeros(3, np.int64)}, "got tokens alone"),
        ("floats", {"tokens.0": np.zeros(3), "routed_experts.0": np.zeros((3, 3, 2))}, "got F64, want integers"),
    ],
)
def test_bad_safetensors_are_one_error(
    name: str, change: Any, words: str, model: tuple[Path, Record], tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    save_file(change, tmp_path / "record.safetensors")
    code, _, error = invoke(model[0], tmp_path / "record.safetensors")
    assert code == 2 and words in error, error


def test_ids_that_no_expert_has_are_a_defect(model: tuple[Path, Record], tmp_path: Path) -> None:
    """Whatever they are, and without an error."""
    folder, record = model
    rng = np.random.default_rng(0)
    for low, high in ((-5, 5), (8, 9), (-(2**62), 2**62), (0, 70_000)):
        ids = tuple(rng.integers(low, high, part.shape) for part in record.ids)
        assert not judged(folder, replace(record, ids=ids).save(tmp_path / "record.safetensors")).is_sound


def test_a_weight_that_lacks_is_named(model: tuple[Path, Record], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, record = model
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    code, _, error = invoke(tmp_path, record.save(tmp_path / "record.safetensors"))
    assert code == 2 and "model.layers.1" in error and "moe-conformance checkpoint" in error


def test_several_faults_are_named_each_by_itself(model: tuple[Path, Record], tmp_path: Path) -> None:
    """And a row of the end that happens to be that of the start makes no shift of all."""
    folder, record = model
    ids = [part.copy() for part in record.ids]
    ids[0] = np.roll(ids[0], 1, axis=0)
    ids[1][-6:] = 0
    ids[3][5:] = record.ids[0][5:16]
    found = judged(folder, replace(record, ids=tuple(ids)).save(tmp_path / "record.safetensors"))
    assert [(finding.kind, finding.tensors) for finding in found.findings] == [
        ("shifted", ("request 0 (rows 0, 2-46)",)),
        ("stale", ("request 3 (rows 5-15)",)),
        ("padded", ("request 1 (rows 40-45)",)),
    ]
