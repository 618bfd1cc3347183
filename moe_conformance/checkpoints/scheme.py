"""What a config says about how weights are stored: quantization_config, and ModelOpt's own file."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from moe_conformance.model.families.bounds import DEEPEST, MOST_WIDTH
from moe_conformance.quote import plainly, quoted

# One form of weights with all that belongs to them; forms.py has the names and shapes of each.
Kind = Literal["fp8", "int8", "packed", "mxfp4", "mxfp6", "mxfp8", "nvfp4", "gptq", "awq", "bnb4", "bnb8"]
HF_QUANT = "hf_quant_config.json"
KEYS = ("quantization_config", "compression_config")
# Where names of modules that were left as they were stand.
LEFT = (
    *("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules", "exclude"),
    *("llm_int8_skip_modules", "modules_in_block_to_quantize_not"),
)


@dataclass(frozen=True)
class Scheme:
    """What the weights of a checkpoint may look like; empty sets leave it open.

    method: as the config calls it. kinds: of the forms that it may have. blocks: rows and columns of a tile with a
    scale of its own. groups: columns that share one; 0 for a whole row. bits: of "packed", "gptq" and "awq". symmetric:
    has no zero points. static: activations have given scales. ordered: columns of a group do not lie together. left:
    patterns of modules that are not quantised.
    known: whether the tensors of this method are known; if not, they are not judged.
    """

    method: str
    kinds: frozenset[Kind] = frozenset()
    blocks: frozenset[tuple[int, int]] = frozenset()
    groups: frozenset[int] = frozenset()
    strategies: frozenset[str] = frozenset()
    bits: frozenset[int] = frozenset()
    symmetric: frozenset[bool] = frozenset()
    static: bool = False
    ordered: bool = False
    left: tuple[str, ...] = ()
    known: bool = True

    def leaves(self, module: str) -> bool:
        """Whether the config says that the module, by its path, is stored as it was."""
        named, patterns = self._left
        if named and not named.isdisjoint(_parts(module)):
            return True
        return any(_is_meant(pattern, module) for pattern in patterns)

    @cached_property
    def _left(self) -> tuple[frozenset[str], tuple[str, ...]]:
        """Whole paths, or what paths begin with, which may be tens of thousands; and the other patterns."""
        roots = ("model.", "language_model.")
        named = frozenset(name for name in self.left if name.startswith(roots) and "*" not in name)
        return named, tuple(dict.fromkeys(name for name in self.left if name not in named))


class Contradiction(Exception):
    """A value that no writer of that key writes."""


def scheme_of(config: Mapping[str, Any], modelopt: Mapping[str, Any] | None) -> Scheme | None:
    """None for a model that is not quantised. modelopt: the content of hf_quant_config.json. Raises Contradiction."""
    found = [value for level in _levels(config) for key in KEYS if (value := level.get(key)) is not None]
    if wrong := [value for value in found if not isinstance(value, Mapping)]:
        raise Contradiction(f"quantization_config: got {quoted(wrong[0])}, want a map")
    own = [_read(value) for value in found if value]
    theirs = [_modelopt(modelopt)] if modelopt is not None else []
    if own and theirs and own[0].kinds and theirs[0].kinds and not own[0].kinds & theirs[0].kinds:
        raise Contradiction(
            f"config.json says {own[0].method} ({', '.join(sorted(own[0].kinds))}) and {HF_QUANT} "
            f"{', '.join(sorted(theirs[0].kinds))}, want one form"
        )
    return next(iter(own + theirs), None)


def _levels(config: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    yield config
    for key in ("text_config", "language_config", "llm_config", "thinker_config"):
        below = config.get(key)
        if isinstance(below, Mapping) and depth < DEEPEST:
            yield from _levels(below, depth + 1)


def _read(given: Mapping[str, Any]) -> Scheme:
    method = given.get("quant_method", given.get("quant_type", ""))
    if not isinstance(method, str):
        raise Contradiction(f"quant_method: got {quoted(method)}, want text")
    method = plainly(method)
    left = _left(given)
    match method:
        case "fp8" | "fbgemm_fp8":
            block = given.get("weight_block_size")
            # DeepSeek-V4 says fp8 and stores its experts as e2m1 with scales in e8m0.
            return Scheme(
                method,
                frozenset(("fp8", "mxfp4", "mxfp8")),
                _block(block),
                strategies=frozenset() if block is None else frozenset(("block",)),
                static=given.get("activation_scheme") == "static",
                left=left,
            )
        case "mxfp4":
            return Scheme(method, frozenset(("mxfp4",)), groups=frozenset((32,)), left=left)
        case "compressed-tensors":
            return _compressed(given, left)
        case "modelopt" | "modelopt_fp4" | "modelopt_mxfp8" | "modelopt_mixed":
            return _modelopt(given)
        case "gptq" | "awq" | "gptq_marlin" | "awq_marlin":
            return _integers(method, "gptq" if method.startswith("gptq") else "awq", given, left)
        case "auto-round" | "intel/auto-round":
            return _auto_round(method, given, left)
        case "torchao":
            return _torchao(given)
        case "quark":
            return _quark(given, left)
        case "bitsandbytes":
            four, eight = given.get("load_in_4bit"), given.get("load_in_8bit")
            kinds = {"bnb4"} if four else {"bnb8"} if eight else {"bnb4", "bnb8"}
            return Scheme(method, frozenset(kinds), left=left)  # type: ignore[arg-type]
    return Scheme(method or "of an unnamed method", left=left, known=False)


def _auto_round(method: str, given: Mapping[str, Any], left: tuple[str, ...]) -> Scheme:
    """AutoRound writes the forms of others. extra_config: modules, by name or expression, that are otherwise."""
    packing, data, bits = (given.get(key) for key in ("packing_format", "data_type", "bits"))
    packing = packing if isinstance(packing, str) else "auto_round:auto_gptq"
    extra = given.get("extra_config")
    other: set[int] = set()
    floats: list[str] = []
    for module, said in extra.items() if isinstance(extra, Mapping) else ():
        own = said.get("bits") if isinstance(said, Mapping) else None
        if isinstance(own, int) and own >= 16:
            floats.append(f"re:{module}" if re.search(r"[*\\]", module) else module)
        elif isinstance(own, int):
            other.add(_whole("bits", own, 2))
    left += tuple(floats)
    if data == "int" or data is None:
        if "llm_compressor" in packing:
            return Scheme(method, left=left, known=False)
        found = _integers(method, "awq" if "awq" in packing else "gptq", given, left)
        return replace(found, bits=found.bits | other)
    kinds: Mapping[Any, Kind] = {("mx_fp", 4): "mxfp4", ("mx_fp", 8): "mxfp8", ("nv_fp", 4): "nvfp4", ("fp", 8): "fp8"}
    kind = kinds.get((data, bits)) if isinstance(bits, int) and isinstance(data, str) and not other else None
    if kind is None:
        return Scheme(method, left=left, known=False)
    block = _block(given.get("weight_block_size"))
    return Scheme(
        method, frozenset((kind,)), block, static=given.get("act_dynamic") is False and kind == "fp8", left=left
    )


# Of torchao's configs, those whose tensors are codes, scales and zero points of the matrix' own shape.
_TORCHAO: Mapping[str, Kind] = {
    "Float8WeightOnlyConfig": "fp8",
    "Float8DynamicActivationFloat8WeightConfig": "fp8",
    "Int8WeightOnlyConfig": "int8",
    "Int8DynamicActivationInt8WeightConfig": "int8",
}


def _torchao(given: Mapping[str, Any]) -> Scheme:
    """The names of the modules are expressions in the config's own language: whatever is left as it was may be."""
    said = frozenset(_configs(given.get("quant_type")))
    kinds = frozenset(_TORCHAO[name] for name in said if name in _TORCHAO)
    return Scheme("torchao", kinds, left=("*",), known=bool(said) and said <= _TORCHAO.keys())


def _configs(said: Any, depth: int = 0) -> Iterator[str]:
    """The types of the configs of weights in torchao's own words."""
    if isinstance(said, Mapping) and depth < 3 * DEEPEST:
        name = said.get("_type")
        if isinstance(name, str) and name.endswith("Config") and name not in ("FqnToConfig", "ModuleFqnToConfig"):
            yield plainly(name)
        for value in said.values():
            yield from _configs(value, depth + 1)


def _quark(given: Mapping[str, Any], left: tuple[str, ...]) -> Scheme:
    """AMD's: float8, of which a tensor or a row has a scale, and MXFP4. Layers may have a config of their own."""
    own = [given.get(key) for key in ("layer_quant_config", "layer_type_quant_config")]
    layers = [level for levels in own if isinstance(levels, Mapping) for level in levels.values()]
    forms = {_of_quark(level) for level in (given.get("global_quant_config"), *layers)}
    kinds = frozenset(form for form in forms if form is not None)
    return Scheme("quark", kinds, left=("*",) if layers else left, known=None not in forms)


def _of_quark(level: Any) -> Kind | None:
    weight = level.get("weight") if isinstance(level, Mapping) else None
    if not isinstance(weight, Mapping):
        return None
    match weight.get("dtype"), weight.get("qscheme"), weight.get("group_size"):
        case "fp8_e4m3", "per_tensor" | "per_channel", _:
            return "fp8"
        case "fp4", "per_group", 32:
            return "mxfp4"
    return None


def _left(given: Mapping[str, Any]) -> tuple[str, ...]:
    found: list[str] = []
    for key in LEFT:
        value = given.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(entry, str) for entry in value)):
            raise Contradiction(f"{key}: got {quoted(value)}, want a list of names")
        found += value or ()
    return tuple(found)


def _block(value: Any) -> frozenset[tuple[int, int]]:
    if value is None:
        return frozenset()
    if not isinstance(value, list) or len(value) != 2:
        raise Contradiction(f"weight_block_size: got {quoted(value)}, want rows and columns")
    return frozenset(((_whole("weight_block_size", value[0]), _whole("weight_block_size", value[1])),))


def _whole(key: str, value: Any, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= MOST_WIDTH:
        raise Contradiction(f"{key}: got {quoted(value)}, want an integer from {least} to {MOST_WIDTH}")
    return value


def _integers(method: str, kind: Kind, given: Mapping[str, Any], left: tuple[str, ...]) -> Scheme:
    """GPTQ and AWQ, whose zero points are stored where they are all the same, too.

    dynamic: GPTQModel's, by expressions of modules: those that are left as they were (-:), and other widths (+:).
    """
    dynamic = given.get("dynamic")
    modules = dynamic if isinstance(dynamic, Mapping) else {}
    left += tuple(f"re:{module[2:]}" for module in modules if module.startswith("-:"))
    own = [said for module, said in modules.items() if not module.startswith("-:") and isinstance(said, Mapping)]
    bits, group = given.get("bits", given.get("w_bit", 4)), given.get("group_size", given.get("q_group_size", 128))
    return Scheme(
        method,
        frozenset((kind,)),
        bits=frozenset(_whole("bits", one.get("bits", bits), 2) for one in ({}, *own)),
        groups=frozenset(max(_whole("group_size", one.get("group_size", group), -1), 0) for one in ({}, *own)),
        # A group that is the whole row has one order.
        ordered=group != -1 and all(one.get("desc_act", given.get("desc_act")) is True for one in ({}, *own)),
        left=left,
    )


# compressed-tensors' words; others are not judged.
_FORMATS: Mapping[str, Kind] = {
    "float-quantized": "fp8",
    "int-quantized": "int8",
    "pack-quantized": "packed",
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
    "mxfp6-pack-quantized": "mxfp6",
    "mxfp8-quantized": "mxfp8",
}


MOST_GROUPS = 1000  # of modules with a form of their own


def _compressed(given: Mapping[str, Any], left: tuple[str, ...]) -> Scheme:
    groups = given.get("config_groups")
    if groups is not None and not isinstance(groups, Mapping):
        raise Contradiction(f"config_groups: got {quoted(groups)}, want a map")
    if groups and len(groups) > MOST_GROUPS:
        raise Contradiction(f"config_groups: got {len(groups):,}, want at most {MOST_GROUPS:,}")
    common = given.get("format")
    kinds: set[Kind] = set()
    blocks: set[tuple[int, int]] = set()
    sizes: set[int] = set()
    strategies: set[str] = set()
    bits: set[int] = set()
    symmetric: set[bool] = set()
    orders: set[bool] = set()
    # No groups at all: nothing but the cache is quantised, or of what is said elsewhere nothing is known.
    known, static = bool(groups) or (common in (None, "dense") and not given.get("sparsity_config")), False
    for name, group in (groups or {}).items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise Contradiction(f"config_groups: {quoted(name)}: got {quoted(group)}, want a map with weights")
        said = group.get("format") or common
        kind = _FORMATS.get(said) if isinstance(said, str) else None
        if said == "naive-quantized":
            kind = "int8" if weights.get("type") == "int" else "fp8"
        if kind is None:
            known = False
        else:
            kinds.add(kind)
        strategy = weights.get("strategy")
        if isinstance(strategy, str):
            strategies.add(strategy)
        if (size := weights.get("group_size")) is not None and strategy in ("group", "tensor_group", None):
            sizes.add(max(_whole("group_size", size, -1), 0))
        blocks |= _block(weights.get("block_structure")) if strategy == "block" else set()
        bits.add(_whole("num_bits", weights.get("num_bits", 8), 1))
        symmetric.add(weights.get("symmetric", True) is not False)
        orders.add(weights.get("actorder") in ("group", "dynamic"))
        inputs = group.get("input_activations")
        static |= isinstance(inputs, Mapping) and inputs.get("dynamic") is False
    if not known:
        return Scheme("compressed-tensors", left=left, known=False)
    return Scheme(
        "compressed-tensors",
        frozenset(kinds),
        frozenset(blocks),
        frozenset(sizes),
        frozenset(strategies),
        frozenset(bits),
        frozenset(symmetric),
        static,
        orders == {True},
        left,
    )


def _modelopt(given: Mapping[str, Any]) -> Scheme:
    """As in hf_quant_config.json, below `quantization`, or as in config.json."""
    found = given.get("quantization", given)
    if not isinstance(found, Mapping):
        raise Contradiction(f"quantization: got {quoted(found)}, want a map")
    algorithm = str(found.get("quant_algo") or "").upper()
    left = _left(found) + (_left(given) if found is not given else ())
    kinds: Mapping[str, Kind] = {
        "FP8": "fp8",
        "FP8_PB_WO": "fp8",
        "FP8_BLOCK_SCALES": "fp8",
        "FP8_PER_CHANNEL_PER_TOKEN": "fp8",
        "NVFP4": "nvfp4",
        "NVFP4_AWQ": "nvfp4",
        "W4A16_NVFP4": "nvfp4",
        "W4A8_NVFP4_FP8": "nvfp4",
        "MXFP4": "mxfp4",
        "W4A8_MXFP4_FP8": "mxfp4",
        "MXFP8": "mxfp8",
    }
    names = [algorithm]
    layers = found.get("quantized_layers")
    if algorithm == "MIXED_PRECISION":  # each layer has its own
        layers = layers if isinstance(layers, Mapping) else {}
        own = [layer.get("quant_algo") for layer in layers.values() if isinstance(layer, Mapping)]
        names, left = [str(name or "").upper() for name in own], ("*",)
    known = not any(name and name not in kinds for name in names)
    return Scheme("modelopt", frozenset(kinds[name] for name in names if name in kinds), left=left, known=known)


def _parts(module: str) -> Iterator[str]:
    """What a path begins with, and every path within it."""
    yield from (module[:at] for at in range(1, len(module) + 1))
    at = [-1, *(i for i, letter in enumerate(module) if letter == "."), len(module)]
    yield from (module[first + 1 : last] for i, first in enumerate(at) for last in at[i + 1 :])


_PLAIN = re.compile(r"[A-Za-z0-9_.*\-]*")


def _is_meant(pattern: str, module: str) -> bool:
    """A name, a part of a path, a glob, or a regular expression (re:) that is a glob in other words.

    Any other regular expression might take forever, so it is taken to match every module.
    """
    if pattern.startswith("re:"):
        bare = pattern[3:].removeprefix("^").removesuffix("$").replace(".*", "*").replace(r"\.", ".")
        return not _PLAIN.fullmatch(bare) or fnmatch.fnmatchcase(module, bare + "*" * (not pattern.endswith("$")))
    if "*" in pattern:
        return fnmatch.fnmatchcase(module, pattern)
    return f".{pattern}." in f".{module}." or module.startswith(pattern)
