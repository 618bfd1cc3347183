"""`moe-conformance checkpoint`: what it prints, in which form, and with which exit code."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoint_folders import T, config_of, file_of, floats, quantised, write

from moe_conformance.checkpoints import engines
from moe_conformance.checkpoints.command import judged
from moe_conformance.checkpoints.findings import Findings
from moe_conformance.checkpoints.headers import Damaged, read_header
from moe_conformance.checkpoints.report import text
from moe_conformance.cli import main

UP = "model.layers.5.mlp.experts.3.up_proj.weight"


def invoke(*arguments: str) -> tuple[int, str, str]:
    """Exit code, and what was printed to either stream."""
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error), pytest.raises(SystemExit) as ended:
        main(["checkpoint", *arguments])
    return int(ended.value.code or 0), out.getvalue(), error.getvalue()


@pytest.fixture
def sound(tmp_path: Path) -> str:
    return str(write(tmp_path / "sound", config_of("qwen3_moe"), floats("qwen3_moe")))


@pytest.fixture
def defect(tmp_path: Path) -> str:
    tensors = floats("qwen3_moe")
    del tensors[UP]
    return str(write(tmp_path / "defect", config_of("qwen3_moe"), tensors))


def test_a_sound_folder_is_one_line_and_a_count(sound: str) -> None:
    code, out, error = invoke(sound)
    assert (code, error) == (0, "")
    assert out == (
        f"{sound}: qwen3_moe, 3 layers with 11 experts; 102 tensors in 2 files, 0.2 MB\n\n"
        "no defects, no notes (headers alone; --values reads the numbers too)\n"
    )


def test_a_defect_says_what_was_got_what_is_wanted_and_what_to_do(defect: str) -> None:
    code, out, _ = invoke(defect)
    assert code == 1
    assert out.splitlines()[2:] == [
        "defect: missing: model-00001-of-00002.safetensors",
        f"  {UP}",
        "  got no such tensor",
        "  want BF16 [24, 40], as its like",
        "  download the shard that has it, or mend the export",
        "",
        "1 defect, no notes (headers alone; --values reads the numbers too)",
    ]


def test_json_is_whole_and_says_the_same(defect: str, sound: str) -> None:
    code, out, _ = invoke(defect, "--json")
    found = json.loads(out)
    assert (code, found["sound"], found["record"], found["tensors"], found["values"]) == (1, False, True, 101, False)
    (finding,) = found["findings"]
    assert finding == {
        "kind": "missing",
        "level": "defect",
        "files": ["model-00001-of-00002.safetensors"],
        "tensors": [UP],
        "count": 1,
        "got": "no such tensor",
        "want": "BF16 [24, 40], as its like",
        "do": "download the shard that has it, or mend the export",
    }
    code, out, _ = invoke(sound, "--json", "--values")
    assert json.loads(out)["values"] is True


def test_markdown_has_a_row_a_finding(defect: str, sound: str) -> None:
    code, out, _ = invoke(defect, "--markdown")
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert code == 1 and len(rows) == 3 and UP in rows[2] and rows[2].count(" | ") == 6
    assert "|" not in invoke(sound, "--markdown")[1]


@pytest.mark.parametrize("arguments", [[], ["--json", "--markdown"], ["--valeus"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], sound: str) -> None:
    assert invoke(*([sound] if arguments else []), *arguments)[0] == 2


def test_a_dense_model_is_nothing_to_judge(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
    folder = write(tmp_path / "model", config, {"model.layers.0.mlp.up_proj.weight": T("BF16", (8, 8))}, shards=1)
    code, out, error = invoke(str(folder))
    assert (code, out) == (2, "") and "no routed experts" in error


def test_what_many_tensors_share_is_one_finding(tmp_path: Path) -> None:
    config, tensors = quantised("fp8-block", "each")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("weight_scale_inv")}
    judgement = judged(write(tmp_path / "model", config, tensors))
    assert [(finding.kind, finding.count) for finding in judgement.findings] == [
        ("scales-missing", 3 * 11 * 2),
        ("scales-missing", 3 * 11),
    ]
    first, _ = judgement.findings
    assert len(first.files) == len(first.tensors) == 66
    assert set(first.files) == {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert "and 1 more file" in text(judgement)


def test_a_header_that_another_writer_laid_out_is_read(tmp_path: Path) -> None:
    """Spaces, keys in another order or unheard of, escapes, data in another order than the names."""
    entries = {
        "b\u00e9": {"shape": [2], "data_offsets": [4, 8], "dtype": "BF16"},
        "a": {"data_offsets": [0, 4], "dtype": "F32", "shape": [], "more": 1},
    }
    text = json.dumps({"__metadata__": {"format": "mlx"}, **entries}, indent=1).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    header = read_header(tmp_path / "x", "x")
    assert [(one.name, one.dtype, one.shape, one.begin, one.end) for one in header.tensors] == [
        ("b\u00e9", "BF16", (2,), 4, 8),
        ("a", "F32", (), 0, 4),
    ]
    assert (header.data, header.size) == (8 + len(text), 8)


def test_headers_are_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    """And refused where it refuses them."""
    safetensors = pytest.importorskip("safetensors")
    numpy = pytest.importorskip("safetensors.numpy")
    import numpy as np

    kinds = (np.float32, np.float16, np.int8, np.uint8, np.int64, np.bool_)
    arrays = {f"t{n}.{kind.__name__}": np.ones((n, 3), kind) for n in range(3) for kind in kinds}
    numpy.save_file(arrays, tmp_path / "x", {"format": "pt", "more": '"}'})
    with safetensors.safe_open(tmp_path / "x", "np") as file:
        theirs = {
            name: (part.get_dtype(), tuple(part.get_shape()))
            for name in file.keys()  # noqa: SIM118 - not a mapping
            for part in (file.get_slice(name),)
        }
    assert {one.name: (one.dtype, one.shape) for one in read_header(tmp_path / "x", "x").tensors} == theirs
    whole = (tmp_path / "x").read_bytes()
    for size in (0, 7, 8, 9, 100, len(whole) - 1):
        (tmp_path / "y").write_bytes(whole[:size])
        with pytest.raises(safetensors.SafetensorError):
            safetensors.safe_open(tmp_path / "y", "np")
        with pytest.raises(Damaged):
            read_header(tmp_path / "y", "y")


def test_an_engine_that_does_not_have_the_architecture_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srt" / "models").mkdir(parents=True)
    (tmp_path / "srt" / "models" / "tiny.py").write_text("class TinyMoeForCausalLM(nn.Module): ...")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(engines, "find_spec", lambda package: spec if package == "sglang" else None)
    for architecture, count in (("TinyMoeForCausalLM", 0), ("OtherMoeForCausalLM", 1)):
        findings = Findings()
        engines.unheard_of({"architectures": [architecture]}, findings)
        assert [(one.level, one.kind) for one in findings.all()] == [("note", "engine")] * count


@pytest.mark.nightly
def test_headers_are_read_in_the_time_that_safetensors_takes(tmp_path: Path) -> None:
    """50,020 tensors in 100 shards: at most 1.5 times."""
    safetensors = pytest.importorskip("safetensors")
    config = {**config_of("qwen3_moe"), "num_hidden_layers": 61, "num_experts": 273, "hidden_size": 8}
    config |= {"moe_intermediate_size": 4, "mlp_only_layers": [], "decoder_sparse_step": 1}
    folder = write(tmp_path / "model", config, floats("qwen3_moe", config=config), shards=100)
    files = sorted(folder.glob("*.safetensors"))

    def theirs() -> float:
        began = time.process_time()
        for path in files:
            with safetensors.safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(name)
                    part.get_shape(), part.get_dtype()
        return time.process_time() - began

    def ours() -> float:
        began = time.process_time()
        found = [read_header(path, path.name) for path in files]
        assert sum(len(header.tensors) for header in found) == 50_020
        return time.process_time() - began

    assert judged(folder).is_sound
    pairs = [(ours(), theirs()) for _ in range(7)]
    assert min(ours for ours, _ in pairs) <= 1.5 * min(theirs for _, theirs in pairs)


@pytest.mark.nightly
@pytest.mark.parametrize("original", [True, False])
def test_nothing_is_said_of_what_the_real_models_write(original: bool, tmp_path: Path) -> None:
    """Every family's tiny model, saved by transformers in the names of the hub and of its modules; values too."""
    pytest.importorskip("transformers", minversion="5.24")
    import tiny_models

    for family in tiny_models.FAMILIES:
        for widths in ("distinct", "square-gate-up"):
            folder = tmp_path / f"{family}-{widths}"
            model = tiny_models.build(family, widths)
            model.save_pretrained(folder, max_shard_size="100KB", save_original_format=original)
            found = [finding for finding in judged(folder, values=True).findings if finding.kind != "engine"]
            assert found == [], family


def test_the_command_says_its_exit_codes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moe_conformance", "checkpoint", "--help"], text=True, capture_output=True, check=True
    )
    assert "exit code 0: sound" in done.stdout and "--values" in done.stdout


def test_a_single_file_by_its_makers_names_is_judged(tmp_path: Path) -> None:
    """Where nothing else is there: Mistral's consolidated.safetensors."""
    folder = write(tmp_path / "model", config_of("qwen3_moe"), floats("qwen3_moe"), shards=1)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    assert judged(folder).findings == ()
    (folder / "consolidated.safetensors").write_bytes(file_of({"a": T("BF16", (2,))}))
    assert not judged(folder).is_sound
