"""Loads and saves of every MoE family's checkpoints, against folders that the real models wrote."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers", minversion="5.24", reason="the families here are those of transformers 5.24")
import record_facts
import tiny_models
import written_out
from tiny_models import FAMILIES
from transformers import AutoConfig

from moe_conformance.engine import CheckpointName
from moe_conformance.engines.transformers import remapping
from moe_conformance.errors import CheckpointError, ConfigError
from moe_conformance.model.families.families import RECORDS
from moe_conformance.oracle.naming import entries
from moe_conformance.oracle.stored import tensor_of
from moe_conformance.reference_impl.checkpoint.files import open_shards
from moe_conformance.reference_impl.checkpoint.loading import load
from moe_conformance.reference_impl.checkpoint.names import READ_PREFIXES, names_of
from moe_conformance.reference_impl.checkpoint.places import Places
from moe_conformance.reference_impl.checkpoint.saving import save


def is_laid_out(family: str) -> bool:
    """Whether its files lie otherwise than the canonical tensors: a shape that is the same both ways would hide it."""
    names = RECORDS[family].names
    assert names is not None
    packed = [piece for piece in names.written if "{e}" not in piece.pattern and "experts." in piece.target]
    halves = any(piece.half is not None for piece in packed)
    return halves or names.once_transposed or any(set(piece.ops) - {"row"} for piece in names.written)


LAID_OUT = tuple(filter(is_laid_out, FAMILIES))
SQUARE = [(family, widths) for family in LAID_OUT for widths in ("square-gate-up", "square-down")]
MODELS = [*((family, "distinct") for family in FAMILIES), *SQUARE]


@functools.cache
def written(family: str, widths: str = "distinct", original: bool = True) -> Path:
    """The folder that the real model writes, in the names of the hub or of the modules. Shards and an index."""
    folder = Path(_FOLDERS.name) / f"{family}-{widths}-{original}"
    model = tiny_models.build(family, widths)
    model.save_pretrained(folder, max_shard_size="100KB", save_original_format=original)
    return folder


_FOLDERS = tempfile.TemporaryDirectory()


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def headers(folder: Path) -> set[tuple[str, tuple[int, ...], str]]:
    with ExitStack() as stack:
        return {(entry.name, entry.shape, entry.dtype) for entry in open_shards(folder, stack)[1]}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert sorted(got) == sorted(want)
    differ = [n for n in want if got[n].dtype != want[n].dtype or not torch.equal(got[n], want[n])]
    assert not differ


def test_a_family_whose_layers_no_spec_can_say_is_refused() -> None:
    left = set(RECORDS) - set(FAMILIES)
    assert left == {name for name, record in RECORDS.items() if record.method.unsaid}
    for name in left:
        with pytest.raises(ConfigError, match=name):
            Places({"model_type": name, "num_experts": 6, "num_hidden_layers": 2})


@pytest.mark.parametrize(("family", "widths"), MODELS)
def test_a_load_gives_the_parameters_of_the_real_modules(family: str, widths: str) -> None:
    folder = written(family, widths)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_same(load(folder), tiny_models.canonical(tiny_models.build(family, widths)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_real_model_writes_the_names_that_are_written_out(family: str) -> None:
    """Those against which the records' names are held, wherever transformers is not at hand."""
    found = list(written_out.real_names(written(family), written(family, original=False)))
    assert found == record_facts.lines(RECORDS[family])[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_suites_checkpoints_are_those_of_the_real_model(family: str) -> None:
    """Name for name and value for value; of experts that compute nothing, the names alone."""
    real, held = written(family), tiny_models.canonical(tiny_models.build(family))
    theirs = tensors(real)
    found = {entry.name: entry for entry in entries(RECORDS[family], config(real), "hub")}
    assert found.keys() <= theirs.keys()
    ours = {name: tensor_of(entry, held) for name, entry in found.items() if entry.parts}
    padded = [name for name, entry in found.items() if any("padded" in piece.ops for piece in entry.pieces)]
    assert ours and not padded
    assert_same(ours, {name: theirs[name] for name in ours})
    locate = Places(config(real)).locate
    assert {name for name in theirs if locate(name)} == ours.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modules_own_names_are_read_too(family: str) -> None:
    assert_same(load(written(family, original=False)), tiny_models.canonical(tiny_models.build(family)))


@pytest.mark.parametrize(("family", "widths"), MODELS)
def test_a_save_writes_what_the_real_model_writes(family: str, widths: str, tmp_path: Path) -> None:
    real = written(family, widths)
    assert_save_writes_it_again(real, tmp_path, family)


def assert_save_writes_it_again(real: Path, folder: Path, family: str) -> None:
    """Names, shapes, dtypes and values; what has no place is not ours, but for rows that no one reads."""
    save(folder, config(real), load(real), shards=3)
    places = Places(config(real))
    ours, theirs = headers(folder), headers(real)
    assert ours <= theirs
    assert not [name for name, _, _ in theirs - ours if places.locate(name) or ".mlp.experts." in name]
    assert_same(load(folder), load(real))
    got, want = tensors(folder), tensors(real)
    assert [name for name in got if not torch.equal(got[name], want[name])] == unread(family, got)


# What a config can switch on or off in a family's tensors.
SWITCHED = [
    ("nemotron_h", {"mlp_bias": True}),
    ("nemotron_h", {"moe_latent_size": None}),
    ("nllb-moe", {"router_bias": True, "encoder_ffn_dim": 28}),
    ("nllb-moe", {"decoder_sparse_step": 0}),
    ("switch_transformers", {"router_bias": True}),
    ("switch_transformers", {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 0}),
    ("cohere2_moe", {"num_shared_experts": 0}),
    ("lfm2_moe", {"use_expert_bias": False}),
    ("longcat_flash", {"zero_expert_num": 0}),
    ("deepseek_v4", {"mlp_layer_types": ["moe", "hash_moe", "hash_moe"]}),
]


@pytest.mark.parametrize(("family", "own"), SWITCHED)
def test_tensors_that_a_config_switches(family: str, own: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_models.build.__wrapped__(family, **own)
    model.save_pretrained(tmp_path / "real")
    assert_same(load(tmp_path / "real"), tiny_models.canonical(model))
    assert_save_writes_it_again(tmp_path / "real", tmp_path / "ours", family)


@pytest.mark.parametrize("family", tiny_models.TEXT_ONLY)
def test_the_text_part_of_a_multimodal_model_alone(family: str, tmp_path: Path) -> None:
    model = tiny_models.build(family, text_only=True)
    model.save_pretrained(tmp_path / "real")
    assert_same(load(tmp_path / "real"), tiny_models.canonical(model))
    assert_save_writes_it_again(tmp_path / "real", tmp_path / "ours", family)


def test_identity_experts_that_a_config_leaves_out_are_as_many_as_its_class_has(tmp_path: Path) -> None:
    """Rows that nothing reads are written for each of them: 256, where longcat_flash does not say."""
    said = config(written("longcat_flash"))
    del said["zero_expert_num"]
    places = Places(said)
    save(tmp_path, said, {name: torch.zeros(shape) for name, shape in places.wanted.items()})
    experts = {
        int(found[1]) for name in tensors(tmp_path) if (found := re.search(r"layers\.0\.mlp\.experts\.(\d+)\.", name))
    }
    assert experts == set(range(said["n_routed_experts"] + 256))


def unread(family: str, names: dict[str, Tensor]) -> list[str]:
    """Gate and up rows of longcat_flash's identity experts."""
    behind = tuple(f"experts.{e}.{part}" for e in range(12, 16) for part in ("gate", "up"))
    return [n for n in names if family == "longcat_flash" and any(part in n for part in behind)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_real_model_loads_what_was_saved(family: str, tmp_path: Path) -> None:
    """Our tensors and, beside them, the real model's that have to do with no expert."""
    real, model = written(family), tiny_models.build(family)
    save(tmp_path, config(real), load(real))
    ours = load_file(tmp_path / "model.safetensors")
    places = Places(config(real))
    rest = {n: t for n, t in tensors(real).items() if not places.locate(n) and ".mlp.experts." not in n}
    assert not rest.keys() & ours.keys()
    save_file(ours | rest, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same(tiny_models.canonical(loaded), tiny_models.canonical(model))


def damaged(folder: Path, real: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    """Load the real folder's tensors, changed, and return what the refusal says."""
    places = Places(config(real))
    named = {name: tensor for name, tensor in tensors(real).items() if places.locate(name)}
    change(named)
    save_file({name: tensor.clone() for name, tensor in named.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text((real / "config.json").read_text())
    with pytest.raises(CheckpointError) as refused:
        load(folder)
    return str(refused.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_may_be_missing_unknown_or_double(family: str, tmp_path: Path) -> None:
    real = written(family)
    places = Places(config(real))
    names = {name for name, _, _ in headers(real)}
    ours = sorted(name for name in names if places.locate(name))
    tensor, piece, expert, _ = places.locate(ours[-1])[0]
    said = damaged(tmp_path, real, lambda named: named.pop(ours[-1]))
    assert (tensor if expert is None and piece.half is None else ours[-1]) in said
    unheard = f"{ours[0].rpartition('.')[0]}.unheard"
    assert unheard in damaged(tmp_path, real, lambda named: named.update({unheard: named[ours[0]]}))
    modules = tensors(written(family, original=False))
    if again := {name: modules[name] for name in sorted(modules.keys() - names) if places.locate(name)}:
        twice = damaged(tmp_path, real, lambda named: named.update(again))
        assert "hold the same weights" in twice and any(name in twice for name in again)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_of_another_shape_is_named(family: str, tmp_path: Path) -> None:
    real = written(family)
    places = Places(config(real))
    shapes = {name: shape for name, shape, dtype in headers(real) if dtype == "F32" and places.locate(name)}
    if places.names.once_transposed:  # its packed experts may be, and have a test of their own
        shapes = {name: shape for name, shape in shapes.items() if "experts" not in name}
    name = max(shapes, key=lambda name: (len(shapes[name]), name))
    turned = damaged(tmp_path, real, lambda named: named.update({name: named[name].mT.contiguous()}))
    assert name in turned and "config.json" in turned


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "nemotron_h", "ernie4_5_vl_moe_text", "longcat_flash"])
def test_an_expert_or_layer_too_many_is_refused(family: str, tmp_path: Path) -> None:
    real = written(family)
    name = sorted(name for name in tensors(real) if "experts.3." in name)[-1]
    for other in (name.replace("experts.3.", "experts.77."), name.replace("layers.", "layers.9")):
        assert other in damaged(tmp_path, real, lambda named, other=other: named.update({other: named[name].clone()}))


def test_layers_for_multi_token_prediction_are_not_read(tmp_path: Path) -> None:
    real = written("deepseek_v3")
    named = tensors(real)
    extra = {n.replace("layers.2.", "layers.3."): t for n, t in named.items() if "layers.2.mlp" in n}
    values = config(real)
    assert values["num_nextn_predict_layers"] == 1 and values["num_hidden_layers"] == 3
    save_file(named | {name: tensor.clone() for name, tensor in extra.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert_same(load(tmp_path), load(real))
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_nextn_predict_layers": 0}))
    with pytest.raises(CheckpointError, match=r"layers\.3"):
        load(tmp_path)


@pytest.mark.parametrize("prefix", READ_PREFIXES)
def test_a_model_under_every_prefix(prefix: str, tmp_path: Path) -> None:
    real = written("mixtral")
    named = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors(real).items()}
    tower = {f"vision_tower.{name}": tensor.clone() for name, tensor in named.items()}
    save_file(named | tower, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((real / "config.json").read_text())
    assert_same(load(tmp_path), load(real))


@pytest.mark.parametrize("widths", ["distinct", "square-gate-up", "square-down"])
@pytest.mark.parametrize("version", ["4.57.1", "5.23.0", None])
def test_packed_experts_that_transformers_4_transposed(widths: str, version: str | None, tmp_path: Path) -> None:
    """The shape says which it is, or the version; a folder that does not say is refused."""
    real = written("qwen3_vl_moe_text", widths)
    four = version is not None and version < "5"
    named = tensors(real)
    packed = [name for name in named if "experts.gate_up" in name or "experts.down" in name]
    if four:
        named |= {name: named[name].mT.contiguous() for name in packed}
    save_file(named, tmp_path / "model.safetensors")
    values = {k: v for k, v in config(real).items() if k != "transformers_version"}
    (tmp_path / "config.json").write_text(json.dumps(values | ({"transformers_version": version} if version else {})))
    if version is None and widths != "distinct":
        with pytest.raises(CheckpointError, match="may be transposed or not"):
            load(tmp_path)
    else:
        assert_same(load(tmp_path), load(real))


def test_a_save_refuses_other_tensors_than_the_models(tmp_path: Path) -> None:
    real = written("mixtral")
    whole = load(real)
    name = "layers.1.experts.w2"
    for wrong, said in (
        ({n: t for n, t in whole.items() if n != name}, f"{name} is missing"),
        (whole | {"layers.7.router.proj": whole["layers.1.router.proj"]}, "layers.7.router.proj is unknown"),
        (whole | {name: whole[name].mT}, f"{name}: got shape"),
    ):
        with pytest.raises(CheckpointError, match=said):
            save(tmp_path / "none", config(real), wrong)
    assert not (tmp_path / "none").exists()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("model_type", "architecture", "before"),
    [
        ("kimi_k25", "Kimi_K25ForConditionalGeneration", "model.language_model."),
        ("qwen3_omni_moe", "Qwen3OmniMoeForConditionalGeneration", "thinker.model.language_model."),
    ],
)
def test_a_wrapper_of_which_no_tiny_model_is_made_has_its_layers_where_the_record_says(
    model_type: str, architecture: str, before: str
) -> None:
    config = AutoConfig.for_model(model_type).to_dict() | {"architectures": [architecture]}
    if "talker_config" in config:  # which its class leaves out, and its model asks for
        config["talker_config"]["text_config"]["shared_expert_intermediate_size"] = 28
        config["talker_config"]["spatial_merge_size"] = 2
    named = f"{names_of({'model_type': model_type}).prefix}layers.5.mlp.gate.weight"
    assert remapping.remap(config, [CheckpointName(named)]) == {named: (f"{before}layers.5.mlp.gate.weight",)}
