"""Each refusal of `checkpoint` beside another reader: what that one loads right is refused with a reason, or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import QUANTISED, Tensors, write
from test_checkpoint_defects import EXPERTS, PLANTED, base
from test_checkpoint_hostile import SHARDS

from moe_conformance.checkpoints.headers import Damaged, read_header

# Files that safetensors reads, and why they are refused all the same.
READ_BY_SAFETENSORS = {
    "names-twice": "which of the two a reader takes is its own affair",
    "shape-of-many-sizes": "no tensor of a model has 1,001 dimensions, and torch takes 64 in most of what it does",
}
# Planted defects that transformers loads without a word, and why they are defects all the same.
LOADED_BY_TRANSFORMERS = {
    "number-with-zeros": "vLLM and SGLang look for experts.3, and leave experts.03 out",
    "doubled-spelling": "which of the two spellings is taken depends on the order of names",
    "mistyped": "it casts integers to floats as they are: codes without their scales",
    "router-of-integers": "it casts integers to floats as they are: codes without their scales",
    "floats-though-config-says": "asked to dequantise, it takes floats as they are; kernels of that form do not",
    "draft-expert-missing": "it reads no draft layers; vLLM and SGLang do, for speculative decoding",
    "table-of-floats": "ids above 256 are rounded by bfloat16; an engine that indexes with the table raises",
}
FLOATS = [name for name, (form, *_) in PLANTED.items() if form.partition("/")[0] not in QUANTISED]


def test_files_are_refused_as_safetensors_refuses_them(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    pytest.importorskip("torch")
    taken = []
    for name, (content, _) in SHARDS.items():
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(Damaged):
            read_header(tmp_path / "x", "x")
        try:
            with safetensors.safe_open(tmp_path / "x", "pt") as file:
                for tensor in file.keys():  # noqa: SIM118 - not a mapping
                    file.get_tensor(tensor)
        except Exception:  # whichever it raises, it refuses the file
            continue
        taken.append(name)
    assert taken == list(READ_BY_SAFETENSORS)


@pytest.mark.nightly
@pytest.mark.parametrize("defect", ["", *FLOATS])
def test_defects_are_such_as_transformers_does_not_load(defect: str, tmp_path: Path) -> None:
    """Reports of missing, unexpected and mismatched keys are refusals: it goes on with what it draws at random."""
    pytest.importorskip("transformers", minversion="5.24")
    from moe_conformance.engines.transformers.loading import load

    form, change, *_ = PLANTED[defect] if defect else ("float", lambda config, tensors: None)
    config, tensors = base(form)
    change(config, tensors)
    folder = write(tmp_path / "model", config, tensors)
    if not defect or defect in LOADED_BY_TRANSFORMERS:
        assert load(folder)
        return
    with pytest.raises(Exception):  # noqa: B017 - many kinds, most of them not its own
        load(folder)


# Of compressed-tensors' forms, planted defects of a matrix that the library decompresses, and why they are defects.
DECOMPRESSED = {
    "mxfp4-scale-short": "it takes the one scale for all groups of the row; engines read one for each 32 columns",
}
# NVFP4 is left out: the library takes rows of whole groups alone, and those here are of 40 columns.
COMPRESSED = [name for name, (form, *_) in PLANTED.items() if form in ("fp8-channel", "mxfp4", "int4", "int4-points")]


def decompressed(form: str, tensors: Tensors, stem: str) -> Any:
    """One matrix, by the library itself."""
    library = pytest.importorskip("compressed_tensors.compressors.base", reason="the quantiser's own library")
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    dtypes = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "U8": "uint8", "I32": "int32", "I64": "int64"}
    parts = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{stem}."):
            data = tensor.data or bytes([1]) * tensor.size
            kind = getattr(torch, dtypes.get(tensor.dtype, "float32"))
            parts[name.removeprefix(f"{stem}.")] = torch.frombuffer(bytearray(data), dtype=kind).reshape(tensor.shape)
    said = QUANTISED[form][0]
    weights = QuantizationArgs(**said["config_groups"]["group_0"]["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=said["format"])
    compressor = library.BaseCompressor.get_value_from_registry(said["format"])
    return compressor.decompress(parts, scheme)["weight"]


@pytest.mark.parametrize("defect", COMPRESSED)
def test_defects_are_such_as_compressed_tensors_does_not_decompress(defect: str) -> None:
    form, change, _, words, *_ = PLANTED[defect]
    config, tensors = base(form)
    stem = f"{EXPERTS}.3.up_proj"
    assert tuple(decompressed(form, tensors, stem).shape) == (24, 40)
    change(config, tensors)
    try:
        found = decompressed(form, tensors, stem)
    except Exception:  # whichever it raises, it refuses the matrix
        assert defect not in DECOMPRESSED
        return
    assert tuple(found.shape) != (24, 40) or defect in DECOMPRESSED, (defect, words)
