"""The reference's checkpoint names and loads, beyond what is asked of every engine: hostile and broken files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_inputs import limited
from safetensors.torch import load_file, save_file

from moe_conformance.engine import CheckpointName
from moe_conformance.errors import CheckpointError, ConfigError, DenseModelError, Nonconformance
from moe_conformance.model.families.describe import describe
from moe_conformance.model.families.families import BY_SLUG
from moe_conformance.reference_impl.checkpoint import loading, remap, saving
from moe_conformance.reference_impl.checkpoint.places import Places
from moe_conformance.suites.describe.families import flat_keys, layer_keys
from moe_conformance.suites.load import checkpoint, families
from moe_conformance.suites.load.loaded import loads_whole

RECIPE = {"style": "plain", "widths": "distinct", "shards": 2, "shuffled": False}
FIRST, LAST = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.experts.10.down_proj.weight"
TENSORS = 11  # of a layer: three of the router, two of the experts, two of the dense MLP, four norms


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint of single experts in two shards, in a folder of its own."""
    inside = tmp_path / "checkpoint"
    inside.mkdir()
    checkpoint.write(inside, RECIPE)
    return inside


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], shards: int = 1) -> None:
    """Change the tensors and write them again, with an index that agrees."""
    named = load_file(folder / FIRST) | load_file(folder / LAST)
    for file in (FIRST, LAST, INDEX):
        (folder / file).unlink()
    change(named)
    checkpoint.save(folder, named, shards)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        loading.load(folder)
    return str(caught.value)


@pytest.mark.parametrize("widths", checkpoint.WIDTHS)
def test_the_checkpoint_has_the_names_and_shapes_of_transformers(widths: str) -> None:
    module = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")
    for multimodal, name in ((False, "Gemma4ForCausalLM"), (True, "Gemma4ForConditionalGeneration")):
        cls = getattr(module, name)
        config = checkpoint.config(widths, multimodal)
        with torch.device("meta"):
            model = cls(cls.config_class.from_dict(config))
        want = {n: tuple(t.shape) for n, t in model.state_dict().items() if n != "lm_head.weight"}  # tied
        meta = {n: torch.empty(s, device="meta") for n, s in checkpoint.shapes(widths).items()}
        got = checkpoint.styled(meta, "multimodal-packed" if multimodal else "packed")
        assert {n: tuple(t.shape) for n, t in got.items()} == want
        assert config["architectures"] == [name]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("model.layers.10.experts.3.gate_proj.weight", "layers.10.experts.3.gate_proj.weight"),
        ("model.layers.1.moe.experts.10.up_proj.g_idx", "layers.1.experts.10.up_proj.g_idx"),
        ("model.language_model.layers.0.moe.experts.7.down_proj.qzeros", "layers.0.experts.7.down_proj.qzeros"),
        ("language_model.model.layers.0.experts.7.down_proj.bias", "layers.0.experts.7.down_proj.bias"),
        ("model.layers.0.router.proj.weight", "layers.0.router.proj"),
        ("model.language_model.layers.0.router.scale", "layers.0.router.scale"),
        ("model.layers.0.moe.per_expert_scale", "layers.0.router.per_expert_scale"),
        # Outside the MoE block: left alone.
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("model.layers.0.experts_norm.weight", "model.layers.0.experts_norm.weight"),
        (
            "model.vision_tower.layers.0.experts.0.up_proj.weight",
            "model.vision_tower.layers.0.experts.0.up_proj.weight",
        ),
        ("model.layers.0.experts\n", "model.layers.0.experts\n"),
    ],
)
def test_a_name_reaches_its_target_and_stays(name: str, target: str) -> None:
    config = checkpoint.config("distinct", layers=11, experts=11)
    assert remap.remap(config, [CheckpointName(name)]) == {name: (target,)}
    assert remap.remap(config, [CheckpointName(target)]) == {target: (target,)}


@pytest.mark.parametrize("block", ["experts", "moe", "moe.experts"])
@pytest.mark.parametrize("end", ["", ".weight_scale"])
def test_a_packed_name_reaches_every_expert(block: str, end: str) -> None:
    config = checkpoint.config("distinct", experts=3)
    name = f"model.layers.0.{block}.gate_up_proj{end}"
    parts = [f"{e}.{part}" for e in range(3) for part in ("gate_proj", "up_proj")]
    want = tuple(f"layers.0.experts.{part}{end or '.weight'}" for part in parts)
    assert remap.remap(config, [CheckpointName(name, (3, 96, 64))])[name] == want


@pytest.mark.parametrize(
    "rest",
    [
        "moe.moe.experts.0.gate_proj.weight",
        "experts.experts.0.gate_proj.weight",
        "experts.0.gate_proj.weight_scale_3",
        "experts.0.w1.weight",
        "experts.01.gate_proj.weight",
        "experts.٣.gate_proj.weight",
        "experts.-1.gate_proj.weight",
        "experts.11.gate_proj.weight",
        f"experts.{'9' * 5000}.gate_proj.weight",
        "experts.0.gate_proj.weight\n",
        "experts",
        "mlp.experts.0.gate_proj.weight",
        "router.bias",
        "moe.router.scale",
    ],
)
def test_an_unknown_name_in_the_block_is_refused(rest: str) -> None:
    with pytest.raises(CheckpointError, match=r"rename|remove|different models"):
        remap.remap(checkpoint.config("distinct"), [CheckpointName(f"model.layers.0.{rest}")])


@pytest.mark.parametrize("layer", ["3", "01", "9" * 5000])
def test_a_layer_that_the_model_lacks_is_refused(layer: str) -> None:
    with pytest.raises(CheckpointError, match="layer"):
        remap.remap(checkpoint.config("distinct"), [CheckpointName(f"model.layers.{layer}.router.scale")])


def test_packed_experts_of_another_number_are_refused() -> None:
    with pytest.raises(CheckpointError, match="want 11 experts first"):
        remap.remap(checkpoint.config("distinct"), [CheckpointName("model.layers.0.experts.down_proj", (10, 64, 48))])


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a/../b.safetensors", "..\\x.safetensors"])
def test_a_shard_outside_the_folder_is_never_opened(folder: Path, shard: str) -> None:
    (folder / LAST).rename(folder.parent / "outside.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {n: shard if f == LAST else f for n, f in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    assert "in the same folder" in refusal(folder)


def test_shards_may_be_links_as_in_the_hubs_cache(folder: Path) -> None:
    (folder / LAST).rename(folder.parent / "blob")
    (folder / LAST).symlink_to(folder.parent / "blob")
    assert len(loading.load(folder)) == TENSORS * checkpoint.LAYERS


def test_what_was_loaded_outlives_the_file(folder: Path) -> None:
    want = checkpoint.write(folder, RECIPE | {"style": "packed"})
    loaded = loading.load(folder)
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as stream:
            stream.write(b"\xff" * file.stat().st_size)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("value", [7, None, ["x"], "model.bin", "", "."])
def test_an_index_that_names_no_safetensors_file_is_refused(folder: Path, value: object) -> None:
    edit(folder / INDEX, lambda index: index["weight_map"].update({DOWN: value}))
    assert DOWN in refusal(folder)


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, '{"a": 1, "a": 2}', "\ud800"])
def test_json_garbage_is_refused(folder: Path, file: str, text: str) -> None:
    (folder / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert file in refusal(folder)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_weight_map_is_refused(folder: Path, weight_map: object) -> None:
    edit(folder / INDEX, lambda index: index.update(weight_map=weight_map))
    assert "weight_map" in refusal(folder)


def test_a_tensor_that_only_the_index_has_is_refused(folder: Path) -> None:
    edit(folder / INDEX, lambda index: index["weight_map"].update(ghost=FIRST))
    assert "in the index but not in its shard, first ghost" in refusal(folder)


def test_a_tensor_that_only_a_shard_has_is_refused(folder: Path) -> None:
    edit(folder / INDEX, lambda index: index["weight_map"].pop(DOWN))
    assert "in a shard but not in the index" in refusal(folder)


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(folder: Path) -> None:
    edit(
        folder / INDEX,
        lambda index: index["weight_map"].update({DOWN: LAST if DOWN in load_file(folder / FIRST) else FIRST}),
    )
    assert DOWN in refusal(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
@pytest.mark.parametrize("file", [FIRST, LAST])
def test_a_shard_cut_anywhere_is_refused(folder: Path, file: str, keep: int) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:keep])
    assert file in refusal(folder)


@pytest.mark.parametrize("size", [0, 2**63, 2**64 - 1])
def test_a_shard_with_a_lying_header_is_refused(folder: Path, size: int) -> None:
    data = (folder / LAST).read_bytes()
    (folder / LAST).write_bytes(size.to_bytes(8, "little") + data[8:])
    assert LAST in refusal(folder)


def test_a_folder_in_place_of_a_shard_is_refused(folder: Path) -> None:
    (folder / LAST).unlink()
    (folder / LAST).mkdir()
    assert LAST in refusal(folder)


def test_a_folder_without_tensors_or_config_is_refused(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config("distinct")))
    assert "neither" in refusal(tmp_path)


def test_one_file_beside_an_index_is_refused(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    assert "remove the one that is not meant" in refusal(folder)


def _under_two_names(named: dict[str, torch.Tensor]) -> None:
    named[DOWN.replace("experts", "moe.experts")] = named[DOWN].clone()


def _packed_too(named: dict[str, torch.Tensor]) -> None:
    named["model.layers.1.experts.down_proj"] = torch.zeros(checkpoint.EXPERTS, 64, 48, dtype=torch.bfloat16)


def _router_twice(named: dict[str, torch.Tensor]) -> None:
    named["model.layers.1.moe.per_expert_scale"] = named["model.layers.1.router.per_expert_scale"].clone()


@pytest.mark.parametrize("change", [_under_two_names, _packed_too, _router_twice])
@pytest.mark.parametrize("shards", [1, 2])
def test_one_tensor_in_two_styles_is_refused(folder: Path, change: Callable, shards: int) -> None:
    retensor(folder, change, shards)
    assert "hold the same weights; remove one of them" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_integers_without_a_quantization_config_are_refused(folder: Path, dtype: torch.dtype) -> None:
    retensor(folder, lambda named: named.update({n: t.to(dtype) for n, t in named.items() if ".experts." in n}))
    assert "want one of F64, F32, F16, BF16" in refusal(folder)


def test_one_expert_of_another_dtype_is_refused(folder: Path) -> None:
    retensor(folder, lambda named: named.update({DOWN: named[DOWN].float()}))
    assert "F32" in refusal(folder)


def test_scales_without_a_quantization_config_are_refused(folder: Path) -> None:
    scales = {f"model.layers.0.experts.{e}.down_proj.weight_scale": torch.ones(1) for e in range(checkpoint.EXPERTS)}
    retensor(folder, lambda named: named.update(scales))
    assert "no quantization_config" in refusal(folder)


@pytest.mark.parametrize("experts", [10, 12])
def test_a_config_of_another_number_of_experts_is_refused(folder: Path, experts: int) -> None:
    edit(folder / "config.json", lambda config: config.update(num_experts=experts))
    assert "config.json" in refusal(folder) or "missing" in refusal(folder)


def test_a_config_with_a_further_layer_says_what_is_missing(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(checkpoint.config("distinct", layers=4)))
    message = refusal(folder)
    assert all(f"layers.3.{name}" in message for name in ("experts.w13", "experts.w2", "router.proj", "router.scale"))


def test_a_dense_or_silent_config_is_refused_as_such(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(enable_moe_block=False, num_experts=None))
    with pytest.raises(DenseModelError):
        loading.load(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError):
        loading.load(folder)


def test_tensors_outside_the_block_are_not_judged(folder: Path) -> None:
    extra = {"model.vision_tower.patch.weight": torch.zeros(2), "model.rotary_emb.inv_freq": torch.ones(4)}
    retensor(folder, lambda named: named.update(extra))
    assert len(loading.load(folder)) == TENSORS * checkpoint.LAYERS


@pytest.mark.parametrize("file", ["config.json", INDEX, FIRST])
@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder", "a link to itself", "a file without end"])
def test_what_is_no_file_is_refused_at_once(folder: Path, file: str, kind: str) -> None:
    path = folder / file
    path.unlink()
    made = {
        "a pipe": lambda: os.mkfifo(path),
        "a device": lambda: path.symlink_to("/dev/zero"),
        "a folder": path.mkdir,
        "a link to itself": lambda: path.symlink_to(path),
        "a file without end": lambda: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 2**33),
    }
    made[kind]()
    with limited(10):
        assert refusal(folder)


def test_keys_given_twice_by_the_ten_thousand_are_refused_at_once(folder: Path) -> None:
    pairs = ",".join(f'"{number}": 0, "{number}": 1' for number in range(30_000))
    (folder / INDEX).write_text("{" + pairs + "}")
    with limited(10):
        assert "0, 1, 10, 100, 1000, 10000, 10001, 10002, ... given twice" in refusal(folder)


def test_experts_by_the_ten_thousand_are_placed_at_once(folder: Path) -> None:
    more = {f"model.layers.1.experts.{e}.down_proj.weight": torch.zeros(0) for e in range(11, 20_000)}
    retensor(folder, lambda named: named.update(more))
    edit(folder / "config.json", lambda config: config.update(num_experts=20_000))
    with limited(10):
        assert "got shape [11, 64], want [20000, 64]" in refusal(folder)


def test_of_many_missing_experts_the_first_are_named_at_once(folder: Path) -> None:
    def one_layer(named: dict[str, torch.Tensor]) -> None:
        for name in [name for name in named if ".layers." in name and ".layers.0." not in name]:
            del named[name]
        for name, rows in (("proj.weight", (2**18, 64)), ("per_expert_scale", (2**18,))):
            named[f"model.layers.0.router.{name}"] = torch.zeros(rows, dtype=torch.bfloat16)

    retensor(folder, one_layer)
    edit(folder / "config.json", lambda config: config.update(checkpoint.config("distinct", layers=1, experts=2**18)))
    with limited(10):
        message = refusal(folder)
    assert "18 or more tensors are missing from the checkpoint: model.layers.0.experts.11.gate_proj.weight, " in message


def test_a_shard_with_a_name_beyond_all_names_is_refused(folder: Path) -> None:
    edit(folder / INDEX, lambda index: index["weight_map"].update({DOWN: f"{'x' * 10_000}.safetensors"}))
    assert "not there, or no file" in refusal(folder)
    assert len(refusal(folder)) < 2000


@pytest.mark.parametrize("value", [7, True, "fp8", ["fp8"]])
def test_a_quantization_config_is_a_map(folder: Path, value: object) -> None:
    edit(folder / "config.json", lambda config: config.update(quantization_config=value))
    assert "quantization_config: got" in refusal(folder)


def test_an_activation_that_nobody_knows_is_refused_by_name(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(hidden_activation="xielu"))
    with pytest.raises(ConfigError, match="hidden_activation: got 'xielu', want one of 'silu'"):
        loading.load(folder)


def test_names_that_stand_for_more_than_any_model_has_are_refused() -> None:
    config = checkpoint.config("distinct", layers=5, experts=2**18)
    names = [CheckpointName(f"model.layers.{layer}.experts.gate_up_proj") for layer in range(5)]
    with limited(10), pytest.raises(CheckpointError, match="names: got 5 that stand for more than 1048576"):
        remap.remap(config, names)


@pytest.mark.parametrize("shards", [0, -1, 2.5, True, None, 10**9])
def test_a_save_into_a_number_of_shards_that_is_none_is_refused(folder: Path, shards: object) -> None:
    config, tensors = json.loads((folder / "config.json").read_text()), loading.load(folder)
    with pytest.raises(CheckpointError, match=r"shards: got .*, want an integer from 1 to"):
        saving.save(folder / "saved", config, tensors, shards)
    assert not (folder / "saved").exists()


@pytest.mark.parametrize("wrong", [None, 1.0, "meta", "sparse", torch.complex64, torch.int8])
def test_a_save_of_what_load_would_not_read_is_refused(folder: Path, wrong: object) -> None:
    config, tensors = json.loads((folder / "config.json").read_text()), loading.load(folder)
    tensor = tensors["layers.1.experts.w2"]
    special = {"meta": lambda: tensor.to("meta"), "sparse": lambda: tensor.float().to_sparse()}
    made = special[wrong]() if wrong in special else tensor.to(wrong) if isinstance(wrong, torch.dtype) else wrong
    with pytest.raises(CheckpointError, match=r"layers\.1\.experts\.w2: got .*, want shape"):
        saving.save(folder / "saved", config, tensors | {"layers.1.experts.w2": made})
    assert not (folder / "saved").exists()


def test_a_save_of_a_config_that_json_has_no_words_for_is_refused(folder: Path) -> None:
    config, tensors = json.loads((folder / "config.json").read_text()), loading.load(folder)
    with pytest.raises(CheckpointError, match=r"config: not what a config.json can say"):
        saving.save(folder / "saved", config | {"extra": {1, 2}}, tensors)
    assert not (folder / "saved").exists()
    (folder / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        saving.save(folder / "file" / "saved", config, tensors)


@pytest.mark.parametrize("slug", ["afmoe", "lfm2-moe", "zaya"])
def test_a_model_type_without_a_record_has_the_names_of_the_only_family_with_its_keys(slug: str) -> None:
    record = BY_SLUG[slug]
    keys = {"model_type": "never_heard_of", **layer_keys(record, record.ways[0])}
    assert Places(keys).names == record.names


def test_a_model_type_whose_keys_are_of_several_families_is_refused_with_those_and_the_near_names() -> None:
    record = BY_SLUG["deepseek-v3"]
    keys = {"model_type": "my_deepseek_v3", **layer_keys(record, record.ways[0])}
    with pytest.raises(ConfigError, match=r"families with these keys: .*axk1, deepseek_v3.*as deepseek_v3"):
        Places(keys)
    assert "families with these keys: axk1, deepseek_v3" in describe(keys).undetermined


def test_families_that_compute_alike_and_name_tensors_otherwise_are_not_guessed_between() -> None:
    record = BY_SLUG["sarvam-mla"]
    keys = {"model_type": "never_heard_of", **layer_keys(record, record.ways[0])}
    assert describe(keys).layers
    with pytest.raises(
        ConfigError, match=r"may be any of bailing_hybrid, sarvam_mla, sarvam_moe, whose checkpoints name"
    ):
        Places(keys)


def test_what_a_config_leaves_open_is_said_by_its_key() -> None:
    record = BY_SLUG["deepseek-v3"]
    spec = describe({"model_type": "deepseek_v3", **flat_keys(record), "routed_scaling_factor": "2.5"})
    assert spec.layers == () and "routed_scaling_factor: got '2.5', want a number" in spec.undetermined


@pytest.mark.parametrize(
    ("change", "loads"),
    [
        (lambda bias: bias - bias.mean(), True),  # chooses the same
        (lambda bias: bias.flip(-1), False),
        (lambda bias: bias * 1.001, False),
        (lambda bias: bias[:-1], False),
    ],
)
def test_a_selection_bias_may_be_loaded_off_by_a_constant(change: Any, loads: bool, tmp_path: Path) -> None:
    want = families.write(tmp_path, "deepseek-v3", "hub")

    class Loads:
        def load(self, folder: Path) -> Any:
            return {name: change(t) if name.endswith("selection_bias") else t for name, t in want.items()}

    with nullcontext() if loads else pytest.raises(Nonconformance):
        loads_whole(Loads(), tmp_path, want)  # type: ignore[arg-type]
