"""Faults of names and loads: the prefix that is added twice, and its relatives.

Faults of `remap` rename what the reference returns; faults of `load` act on the folder, or on what was loaded.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from moe_conformance.engine import CheckpointName, Target
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.errors import CheckpointError
from moe_conformance.reference_impl.checkpoint import loading
from moe_conformance.reference_impl.checkpoint.arrange import to_canonical

if TYPE_CHECKING:
    from torch import Tensor

    from moe_conformance.model.families.naming import Piece
    from moe_conformance.reference_impl.checkpoint.places import Places, Sizes


class _Renamed(Faulty):
    """The reference, with `rename` applied to each of its targets."""

    def rename(self, name: str, target: str) -> str:
        raise NotImplementedError

    def remap(self, config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str, ...]]:
        mapped = super().remap(config, names)
        return {name: tuple(self.rename(name, target) for target in targets) for name, targets in mapped.items()}


class PrefixTwice(_Renamed):
    """vllm#41206: single experts get `.moe` whether or not they have it."""

    def rename(self, name: str, target: str) -> str:
        return target.replace(".experts.", ".moe.moe.experts." if ".moe.experts." in name else ".moe.experts.")


class PrefixTwicePacked(_Renamed):
    def rename(self, name: str, target: str) -> str:
        doubled = ".moe.gate_up_proj" in name or ".moe.down_proj" in name
        return target.replace(".experts.", ".moe.moe.experts." if doubled else ".moe.experts.")


class RootTwice(_Renamed):
    """The own root is put before names that have it."""

    def rename(self, name: str, target: str) -> str:
        return "decoder." + target

    def remap(self, config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str, ...]]:
        bare = [CheckpointName(entry.name.removeprefix("decoder."), entry.shape) for entry in names]
        mapped = super().remap(config, bare)
        own = {entry.name: mapped[entry.name.removeprefix("decoder.")] for entry in names}
        return {n: tuple("decoder." + t for t in ts) if n.startswith("decoder.") else ts for n, ts in own.items()}


class SecondScaleUnmapped(_Renamed):
    """The pattern for `.moe` names knows weight and weight_scale, not weight_scale_2."""

    def rename(self, name: str, target: str) -> str:
        return name if ".moe." in name and name.endswith(".weight_scale_2") else target


class GroupIndexUnmapped(_Renamed):
    def rename(self, name: str, target: str) -> str:
        return name if ".moe." in name and name.endswith(".g_idx") else target


class SuffixLost(_Renamed):
    """A bias lands on the weight."""

    def rename(self, name: str, target: str) -> str:
        return target.removesuffix("bias") + "weight" if target.endswith(".bias") else target


class MultimodalPackedKept(_Renamed):
    """The multimodal prefix goes from single experts and stays on packed ones."""

    def rename(self, name: str, target: str) -> str:
        single = any(segment.isdecimal() for segment in name.partition("experts.")[2].split("."))
        return target if single or "language_model." not in name else "language_model." + target


class ExpertTenIsOne(_Renamed):
    """The pattern takes one digit."""

    def rename(self, name: str, target: str) -> str:
        segments = target.split(".")
        if "experts" in segments[:-1]:
            at = segments.index("experts") + 1
            segments[at] = segments[at][0]
        return ".".join(segments)


class _Fused(Faulty):
    """Expert tensors are parts of one parameter a layer and suffix, as `place` says."""

    def place(self, segments: list[str]) -> Target:
        """segments: layers I experts E PART SUFFIX."""
        raise NotImplementedError

    def remap(self, config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str | Target, ...]]:  # type: ignore[override]
        mapped = super().remap(config, names)
        return {name: tuple(map(self._placed, targets)) for name, targets in mapped.items()}

    def _placed(self, target: str) -> str | Target:
        segments = target.split(".")
        return self.place(segments) if len(segments) == 6 and segments[2] == "experts" else target


class FusedWithDown(_Fused):
    """Gate, up and down of an expert are said to be one part."""

    def place(self, segments: list[str]) -> Target:
        layers, layer, experts, expert, _, suffix = segments
        return Target(f"{layers}.{layer}.{experts}.w.{suffix}", int(expert))


class FusedExpertsOverwriteOneAnother(_Fused):
    """Every other expert is said to be part of the one before it."""

    def place(self, segments: list[str]) -> Target:
        layers, layer, experts, expert, part, suffix = segments
        return Target(f"{layers}.{layer}.{experts}.w.{suffix}", int(expert) // 2 * 2, part)


Loaded = dict[str, "Tensor"]


def _is_packed(folder: Path) -> bool:
    return any(b".gate_up_proj" in file.read_bytes() for file in folder.glob("*.safetensors"))


class GateUpSwappedPacked(Faulty):
    def load(self, folder: Path) -> Loaded:
        loaded = super().load(folder)
        if _is_packed(folder):
            loaded |= {key: w13.roll(w13.shape[1] // 2, 1) for key, w13 in loaded.items() if key.endswith(".w13")}
        return loaded


class ExpertsInStringOrder(Faulty):
    """Experts of a per-expert checkpoint are stacked 0, 1, 10, 2, ..."""

    def load(self, folder: Path) -> Loaded:
        loaded = super().load(folder)
        if not _is_packed(folder):
            for key in [key for key in loaded if ".experts.w" in key]:
                loaded[key] = loaded[key][sorted(range(len(loaded[key])), key=str)]
        return loaded


class SquareGateUpTransposed(Faulty):
    """The layout is read off the shape, and 2F = H reads as the other one."""

    owner = "w13"

    def load(self, folder: Path) -> Loaded:
        loaded = super().load(folder)
        square = [k for k, t in loaded.items() if k.endswith(f".experts.{self.owner}") and t.shape[1] == t.shape[2]]
        return loaded | {key: loaded[key].mT for key in square}


class SquareDownTransposed(SquareGateUpTransposed):
    owner = "w2"


class MissingExpertUnwritten(Faulty):
    """Coverage is counted in parameters, not in experts: what no expert wrote stays as allocated."""

    def load(self, folder: Path) -> Loaded:
        with patch("moe_conformance.reference_impl.checkpoint.loading._missing_slots", lambda *_: []):
            return super().load(folder)


class UpIsCountedWithGate(Faulty):
    """An expert is there once its gate is: where up is missing, memory stays as it was."""

    def load(self, folder: Path) -> Loaded:
        real = loading._missing_slots

        def missing(*arguments: Any) -> list[str]:
            return [name for name in real(*arguments) if "up_proj" not in name]

        with patch.object(loading, "_missing_slots", missing):
            return super().load(folder)


class VersionIsAsked(Faulty):
    """Whether packed experts lie transposed is asked of the version, which the config need not say."""

    def load(self, folder: Path) -> Loaded:
        real = loading._oriented

        def oriented(places: Places, plan: loading.Plan, config: Mapping[str, Any]) -> loading.Plan:
            if places.names.once_transposed and not config.get("transformers_version"):
                raise CheckpointError("transformers_version: got none, want that of the release that wrote it")
            return real(places, plan, config)

        with patch.object(loading, "_oriented", oriented):
            return super().load(folder)


class RouterScaleDefaults(Faulty):
    """A router scale that the checkpoint lacks keeps the module's default of one."""

    def load(self, folder: Path) -> Loaded:
        try:
            return super().load(folder)
        except CheckpointError as error:
            if "per_expert_scale" not in str(error):
                raise
        with patch("moe_conformance.reference_impl.checkpoint.loading._check", lambda *_, **__: None):
            loaded = super().load(folder)
        for key in [key for key in loaded if key.endswith(".router.proj")]:
            loaded.setdefault(key.replace("proj", "per_expert_scale"), loaded[key].new_ones(len(loaded[key])))
        return loaded


class SelectionBiasDefaults(Faulty):
    """TensorRT-LLM#15154: a checkpoint without a selection bias loads, and the parameter keeps what memory held."""

    def load(self, folder: Path) -> Loaded:
        real = loading._check

        def check(places: Places, plan: loading.Plan) -> None:
            wanted = {name: shape for name, shape in places.wanted.items() if not name.endswith(".selection_bias")}
            with patch.object(places, "wanted", wanted):
                real(places, plan)

        with patch.object(loading, "_check", check):
            return super().load(folder)


class ExtraExpertIgnored(Faulty):
    def load(self, folder: Path) -> Loaded:
        from moe_conformance.reference_impl.checkpoint import loading

        plan = loading._plan

        def tolerant(places: Any, stored: Sequence[Any]) -> Any:
            experts = max(sizes.experts for sizes in places.sizes.values())
            numbers = {entry: re.search(r"experts\.(\d+)\.", entry.name) for entry in stored}
            kept = [entry for entry in stored if not (found := numbers[entry]) or int(found[1]) < experts]
            return plan(places, kept)

        with patch.object(loading, "_plan", tolerant):
            return super().load(folder)


class UnknownTensorsSkipped(Faulty):
    """What matches no parameter is left out without a word."""

    def load(self, folder: Path) -> Loaded:
        from moe_conformance.reference_impl.checkpoint.places import Places

        locate = Places.locate

        def tolerant(places: Any, name: str) -> Any:
            try:
                return locate(places, name)
            except CheckpointError:
                return []

        with patch.object(Places, "locate", tolerant):
            return super().load(folder)


class ShapesUnchecked(Faulty):
    """Fewer experts than config.json says are loaded, and the others stay zero."""

    def load(self, folder: Path) -> Loaded:
        def grown(row: Tensor, piece: Piece, sizes: Sizes) -> Tensor:
            found = to_canonical(row, piece, sizes)
            missing = sizes.experts - len(found) if found.ndim == 3 else 0
            return torch.cat([found, found.new_zeros(missing, *found.shape[1:])]) if missing > 0 else found

        with patch.object(loading, "_fits", lambda *_, **__: None), patch.object(loading, "to_canonical", grown):
            return super().load(folder)


class TruncatedShardFilled(Faulty):
    """A shard cut short is read as far as it goes, and the rest is zero."""

    def load(self, folder: Path) -> Loaded:
        with tempfile.TemporaryDirectory() as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            for file in Path(copy).glob("*.safetensors"):
                data = file.read_bytes()
                start = 8 + int.from_bytes(data[:8], "little")
                header = json.loads(data[8:start])
                end = start + max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
                file.write_bytes(data.ljust(end, b"\0"))
            return super().load(Path(copy))


class FirstLoadStays(Faulty):
    """Tensors are cached by name, without the folder."""

    def __init__(self) -> None:
        self._loaded: Loaded = {}

    def load(self, folder: Path) -> Loaded:
        return {key: self._loaded.setdefault(key, tensor) for key, tensor in super().load(folder).items()}


class FolderIsReadOnce(Faulty):
    """vllm#32718: what a folder once gave is kept under its path."""

    def __init__(self) -> None:
        self._read: dict[Path, Loaded] = {}

    def load(self, folder: Path) -> Loaded:
        if folder not in self._read:
            self._read[folder] = super().load(folder)
        return self._read[folder]


class _Overwritten(Faulty):
    """Loads the shards with some tensors in the places of others."""

    def others(self, folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """By the name that they are taken for."""
        raise NotImplementedError

    def load(self, folder: Path) -> Loaded:
        from safetensors.torch import load_file, save_file

        others = self.others(folder, json.loads((folder / "config.json").read_text()))
        with tempfile.TemporaryDirectory() as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            for file in Path(copy).glob("model*.safetensors") if others else ():
                held = load_file(file)
                save_file({name: others.get(name, tensor) for name, tensor in held.items()}, file)
            return super().load(Path(copy))


class DraftIsTheLastLayer(_Overwritten):
    """Layers are numbered anew, and the draft layer is the last."""

    def others(self, folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        count = config.get("num_hidden_layers", 0)
        drafts = re.compile(rf"model\.layers\.{count}\.|mtp\.layers\.0\.")
        index = folder / "model.safetensors.index.json"
        if not index.exists() or "eh_proj" not in index.read_text():
            return {}
        held = {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}
        last = f"model.layers.{count - 1}."
        return {drafts.sub(last, name): tensor for name, tensor in held.items() if drafts.match(name)}


class ConsolidatedIsTaken(_Overwritten):
    """Every safetensors file of the folder is read, the last one in the order of names last."""

    def others(self, folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        file = folder / "consolidated.safetensors"
        held = load_file(file) if file.exists() else {}
        return {
            f"model.{name.replace('.feed_forward.', '.block_sparse_moe.')}": tensor for name, tensor in held.items()
        }


class ModulesAreAnotherLayer(_Renamed):
    """Counts the layers of names as the modules have them from the first one with experts."""

    def rename(self, name: str, target: str) -> str:
        if not re.search(r"\.experts\.(gate_up_proj|down_proj)$", name):
            return target
        return re.sub(r"layers\.(\d+)\.", lambda found: f"layers.{int(found[1]) - 1}.", target)


class MixtralUnderMlp(_Renamed):
    """MoE-Infinity#109: the name that transformers 5 has for the block is not known."""

    def rename(self, name: str, target: str) -> str:
        return name if ".mlp.experts." in name else target


class SharedExpertsAreRouted(_Renamed):
    """Takes a shared expert's tensors for those of expert 0."""

    def rename(self, name: str, target: str) -> str:
        return re.sub(r"shared\.(w13|w2)$", r"experts.0.\1", target)

    def remap(self, config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str, ...]]:
        mapped = super().remap(config, names)
        parts = {"gate_proj": "w13", "up_proj": "w13", "down_proj": "w2"}
        whole = re.compile(r"experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")
        return {
            name: tuple(whole.sub(lambda found: f"experts.{found[1]}.{parts[found[2]]}", t) for t in targets)
            for name, targets in mapped.items()
        }


class RowsAreNotInterleaved(Faulty):
    """Takes gate, up, gate, up for all gates above all ups."""

    def load(self, folder: Path) -> Loaded:
        from moe_conformance.reference_impl.checkpoint import arrange

        with patch.dict(arrange.OPS, {"interleaved": (arrange.OPS["row"][0], lambda tensor, _: tensor)}):
            return super().load(folder)


class SharedExpertsAreDealtOut(Faulty):
    """Shared experts' columns of w2 in the order of the files, which have them by expert."""

    def load(self, folder: Path) -> Loaded:
        from moe_conformance.reference_impl.checkpoint import arrange

        turned = lambda tensor, _: tensor.permute(1, 2, 0).flatten(1)  # noqa: E731
        with patch.dict(arrange.OPS, {"apart_columns": (arrange.OPS["apart_columns"][0], turned)}):
            return super().load(folder)


def _mutant(engine: type[Faulty], fault: str, case: str, check: str, *also: str) -> Mutant:
    bug_class = "weight-coverage" if check in (_BROKEN, _INCOMPLETE) else "double-prefix"
    return Mutant(engine, bug_class, fault, (case, check), frozenset(also))


_REACHES, _SHARE, _TWICE = (
    "every_style_of_a_tensor_reaches_one_target",
    "two_tensors_never_share_a_target",
    "mapping_twice_equals_mapping_once",
)
_LOAD, _EACH, _BROKEN = (
    "a_load_gives_every_tensor_of_the_checkpoint",
    "each_load_gives_its_own_checkpoint",
    "a_broken_checkpoint_is_refused",
)

_INCOMPLETE = "a_tensor_that_only_its_family_has_is_missed"
_FAMILY_LOAD, _FAMILY_NAMES = (
    "a_load_gives_every_tensor_of_every_family",
    "every_tensor_of_every_family_has_its_target",
)

_BESIDE = "a_load_takes_nothing_from_what_lies_beside_the_model"

MUTANTS = (
    _mutant(
        RowsAreNotInterleaved,
        "takes interleaved rows as they lie",
        "load-gpt-oss-hub",
        _FAMILY_LOAD,
        "quantised-scales",
    ),
    _mutant(SharedExpertsAreDealtOut, "deals out the shared experts' columns", "load-inkling-hub", _FAMILY_LOAD),
    _mutant(ModulesAreAnotherLayer, "counts layers of modules from another", "remap-qwen3-moe-modules", _FAMILY_NAMES),
    _mutant(MixtralUnderMlp, "leaves names below .mlp as they are", "remap-mixtral-modules", _FAMILY_NAMES),
    _mutant(SharedExpertsAreRouted, "shared experts land on expert 0", "remap-deepseek-v3-hub", _FAMILY_NAMES),
    _mutant(PrefixTwice, "adds .moe to names that have it", "remap-gemma4-moe-weight", _REACHES),
    _mutant(PrefixTwicePacked, "adds .moe to packed names that have it", "remap-gemma4-moe-packed", _REACHES),
    _mutant(RootTwice, "puts its own root before names that have it", "remap-gemma4-twice-plain", _TWICE),
    _mutant(SecondScaleUnmapped, "leaves weight_scale_2 of .moe names", "remap-gemma4-moe-weight-scale-2", _REACHES),
    _mutant(GroupIndexUnmapped, "leaves g_idx of .moe names", "remap-gemma4-moe-g-idx", _REACHES),
    _mutant(SuffixLost, "maps bias onto weight", "remap-gemma4-plain-every-suffix", _SHARE),
    _mutant(
        MultimodalPackedKept,
        "drops the multimodal prefix of single experts only",
        "remap-gemma4-multimodal-packed",
        _REACHES,
    ),
    _mutant(ExpertTenIsOne, "reads expert 10 as 1", "remap-gemma4-plain-every-suffix", _SHARE),
    _mutant(FusedWithDown, "gate, up and down are one part", "remap-gemma4-plain-every-suffix", _SHARE),
    _mutant(
        FusedExpertsOverwriteOneAnother,
        "two experts have one part of a fused parameter",
        "remap-gemma4-plain-every-suffix",
        _SHARE,
    ),
    _mutant(
        GateUpSwappedPacked,
        "swaps gate and up of packed experts",
        "load-gemma4-packed-one-file",
        _LOAD,
        "quantised-scales",
    ),
    _mutant(ExpertsInStringOrder, "stacks expert 10 before 2", "load-gemma4-plain-one-file", _LOAD),
    _mutant(
        SquareGateUpTransposed,
        "transposes w13 where 2F = H",
        "load-gemma4-packed-square-gate-up",
        _LOAD,
        "quantised-scales",
    ),
    _mutant(SquareDownTransposed, "transposes w2 where F = H", "load-gemma4-plain-square-down", _LOAD),
    _mutant(FirstLoadStays, "keeps the first load's tensors", "load-gemma4-packed-twice", _EACH, "quantised-scales"),
    _mutant(FolderIsReadOnce, "reads a folder once", "load-gemma4-plain-twice", _EACH),
    _mutant(DraftIsTheLastLayer, "takes a draft layer for the last", "load-deepseek-v3-beside-draft", _BESIDE),
    _mutant(ConsolidatedIsTaken, "reads consolidated.safetensors, too", "load-mixtral-beside-consolidated", _BESIDE),
    _mutant(MissingExpertUnwritten, "leaves a missing expert unwritten", "load-gemma4-plain-missing-expert", _BROKEN),
    _mutant(UpIsCountedWithGate, "leaves a missing up unwritten", "load-gemma4-plain-missing-up", _BROKEN),
    _mutant(
        VersionIsAsked,
        "refuses a config that says no version of transformers",
        "load-qwen3-vl-moe-hub-without-version",
        _FAMILY_LOAD,
    ),
    _mutant(RouterScaleDefaults, "fills in a router scale", "load-gemma4-packed-missing-router-scale", _BROKEN),
    _mutant(
        SelectionBiasDefaults,
        "takes a checkpoint without its selection bias",
        "load-deepseek-v3-without-router-selection-bias",
        _INCOMPLETE,
    ),
    _mutant(ExtraExpertIgnored, "ignores an expert that the config lacks", "load-gemma4-plain-extra-expert", _BROKEN),
    _mutant(UnknownTensorsSkipped, "skips what it has no place for", "load-gemma4-packed-unknown-tensor", _BROKEN),
    _mutant(ShapesUnchecked, "takes any shape", "load-gemma4-packed-fewer-experts", _BROKEN),
    _mutant(TruncatedShardFilled, "fills a truncated shard with zeros", "load-gemma4-packed-truncated-shard", _BROKEN),
)
