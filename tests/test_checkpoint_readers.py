"""Each refusal of `checkpoint` beside another reader: what that one loads right is refused with a reason, or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_folders import QUANTISED, T, quantised, write
from test_checkpoint_defects import EXPERTS, PLANTED, base
from test_checkpoint_hostile import SHARDS

from moe_conformance.checkpoints.command import judged
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


Parts = dict[str, Any]
# Sizes that the tiles and groups of every form divide: libraries ask for that, engines do not.
ROWS, COLUMNS = 32, 64
STEM = f"{EXPERTS}.3.up_proj"


def compressed(parts: Parts, said: Any) -> Any:
    """By compressed-tensors."""
    library = pytest.importorskip("compressed_tensors.compressors.base", reason="the quantiser's own library")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(**said["config_groups"]["group_0"]["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=said["format"])
    return library.BaseCompressor.get_value_from_registry(said["format"]).decompress(parts, scheme)["weight"]


def eight_bits(parts: Parts, said: Any) -> Any:
    """Tiles, and one scale a tensor, by compressed-tensors, which has them under other names."""
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    if tile := said.get("weight_block_size"):
        weights |= {"strategy": "block", "block_structure": tile}
    names = {"weight_scale_inv": "weight_scale", "scale": "weight_scale"}
    named = {names.get(end, end): part for end, part in parts.items()}
    return compressed(named, {"config_groups": {"group_0": {"weights": weights}}, "format": "float-quantized"})


def gptq(parts: Parts, said: Any) -> Any:
    layer = pytest.importorskip("auto_round_extension.torch.qlinear_torch", reason="the quantiser's own library")
    import torch

    matrix = layer.QuantLinear(said["bits"], said["group_size"], COLUMNS, ROWS, False, g_idx=True)
    matrix.load_state_dict(parts)
    return matrix(torch.eye(COLUMNS)).T


def awq(parts: Parts, said: Any) -> Any:
    library = pytest.importorskip("auto_round.export.export_to_awq.utils", reason="the quantiser's own library")
    group = said["group_size"]
    return library.dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], said["bits"], group).T


def four_bits(parts: Parts, said: Any) -> Any:
    library = pytest.importorskip("bitsandbytes.functional", reason="the quantiser's own library")
    import torch

    held = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [ROWS, COLUMNS]}
    held |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0}
    state = {end: part for end, part in parts.items() if end != "weight"}
    for end in [end for end in state if "quant_state" in end and state[end].dtype == torch.uint8]:
        state[end] = torch.frombuffer(bytearray(json.dumps(held).encode()), dtype=torch.uint8)
    return library.dequantize_4bit(parts["weight"], library.QuantState.from_dict(state, torch.device("cpu")))


def vectors(parts: Parts, said: Any) -> Any:
    library = pytest.importorskip("bitsandbytes.functional", reason="the quantiser's own library")
    return library.int8_vectorwise_dequant(parts["weight"], parts["SCB"])


# By form, who else reads a matrix of it.
READERS: dict[str, Callable[[Parts, Any], Any]] = {
    **dict.fromkeys(("fp8-block", "fp8-e8m0", "fp8-tensor"), eight_bits),
    **dict.fromkeys(("fp8-channel", "mxfp4", "nvfp4", "int4", "int4-points", "int8"), compressed),
    **{"gptq": gptq, "awq": awq, "bnb-nf4": four_bits, "bnb-int8": vectors},
}
# By form, tensors changed in a way that leaves what the library reads as it was, and why `checkpoint` refuses them.
READ: dict[str, dict[str, str]] = {
    "fp8-tensor": dict.fromkeys(
        ("input_scale missing", "input_scale mistyped"),
        "it reads weights alone; by the config activations are quantised by this scale",
    ),
    "bnb-nf4": dict.fromkeys(
        (
            *("weight mistyped", "weight.quant_map mistyped"),
            *("weight.nested_absmax mistyped", "weight.nested_quant_map mistyped"),
        ),
        "its code for a CPU takes the bytes by their address, whatever they are said to be",
    ),
    "bnb-int8": {"weight_format mistyped": "this function reads none; its modules raise for another than 0"},
}
# Reads past the end of what is too short: what it finds there is anything.
UNBOUNDED = ("bnb-nf4",)
KINDS = {
    **{"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu"},
    **{"U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "F64": "float64"},
}
# The same bytes as what they are not.
MISTYPED = {"F32": "I32", "BF16": "I16", "F16": "I16", "F8_E4M3": "I8", "F8_E8M0": "I8", "U8": "I8", "I8": "U8"}
MISTYPED |= {"I32": "F32", "I64": "F64"}


def tensor_of(entry: T) -> Any:
    """Random bytes: of floats below 100, which are all finite."""
    import torch

    most = 255 if entry.dtype in ("U8", "I8") else 100
    data = entry.data or np.random.default_rng(0).integers(1, most, entry.size, np.uint8).tobytes()
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, KINDS[entry.dtype])).reshape(entry.shape)


def changes(entry: T) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """What a writer can get wrong about one tensor that there is."""
    import torch

    yield "mistyped", lambda tensor: tensor.view(getattr(torch, KINDS[MISTYPED[entry.dtype]]))
    for axis, which in enumerate(("row", "column")):
        if axis < len(entry.shape) and entry.shape[axis] > 1:
            yield (
                f"a {which} short",
                lambda tensor, axis=axis: tensor.narrow(axis, 0, tensor.shape[axis] - 1).contiguous(),
            )


def entry_of(tensor: Any) -> T:
    names = {kind: name for name, kind in KINDS.items()}
    return T(names[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))


def read(form: str, parts: Parts, said: Any) -> Any:
    """None for what the library refuses."""
    try:
        found = READERS[form](dict(parts), said)
    except Exception:  # whichever it raises
        return None
    return found if tuple(found.shape) == (ROWS, COLUMNS) else None


@pytest.mark.parametrize("form", READERS)
def test_a_matrix_is_refused_as_the_quantisers_library_refuses_it(form: str, tmp_path: Path) -> None:
    """Each tensor of the matrix in turn not there, a row or a column short, of another type: refused.

    But for what the library reads as it reads the sound matrix.
    """
    torch = pytest.importorskip("torch")
    config, tensors = quantised(form, "each", hidden_size=COLUMNS, moe_intermediate_size=ROWS)
    said = config["quantization_config"]
    parts = {name.removeprefix(f"{STEM}."): tensor_of(tensors[name]) for name in tensors if name.startswith(f"{STEM}.")}
    want = read(form, parts, said)
    assert want is not None and judged(write(tmp_path / "sound", config, tensors)).is_sound
    same = set()
    for end, part in parts.items():
        others = {other: tensor for other, tensor in parts.items() if other != end}
        rest = {name: entry for name, entry in tensors.items() if name != f"{STEM}.{end}"}
        tried = [("missing", others, rest)]
        for what, change in changes(tensors[f"{STEM}.{end}"]):
            if form in UNBOUNDED and what.endswith("short"):
                continue
            changed = change(part)
            tried.append((what, {**others, end: changed}, {**rest, f"{STEM}.{end}": entry_of(changed)}))
        for what, planted, entries in tried:
            found = read(form, planted, said)
            is_same = found is not None and torch.equal(*(torch.nan_to_num(one.double()) for one in (found, want)))
            if judged(write(tmp_path / f"{end} {what}", config, entries)).is_sound:
                assert is_same, f"{end} {what}: taken, and not read"
            elif is_same:
                same.add(f"{end} {what}")
    assert same == set(READ.get(form, ()))
