"""Names of the tensors that are tried, what an engine says of them, and which may share a parameter."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from moe_conformance.engine import CheckpointName, Engine, Target
from moe_conformance.errors import CheckpointError, Nonconformance
from moe_conformance.suites.load import checkpoint
from moe_conformance.suites.load.cases import WIDTHS
from moe_conformance.suites.remap.cases import PACKED_PARTS, PARTS, ROUTER, spell, spell_router

LAYERS, EXPERTS = 12, 12  # indices of one and of two digits, the one a prefix of the other
SOME = (0, 1, 10, 11)
_SCALARS = ("weight_scale_2", "input_scale", "weight_global_scale")

Targets = tuple[str | Target, ...]

# A tensor, whatever its name: layer, part, expert (None: packed or a router's), suffix.
Tensor = tuple[int, str, int | None, str]


def _shape(part: str, suffix: str, packed: bool) -> tuple[int, ...]:
    """Widths of the "distinct" config; a packed tensor has the experts first."""
    hidden, width = WIDTHS["distinct"]
    matrix = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}.get(part, (width, hidden))
    full: tuple[int, ...] = {"bias": matrix[:1], "g_idx": matrix[1:]}.get(suffix, matrix)
    if suffix in _SCALARS:
        full = ()
    return (EXPERTS, *full) if packed else full


def names_of(style: str, suffixes: Sequence[str]) -> dict[Tensor, CheckpointName]:
    """Expert and router tensors of some layers, as a checkpoint of this style names them."""
    packed = "packed" in style.split("-")
    parts, experts = (PACKED_PARTS, (None,)) if packed else (PARTS, SOME)
    named: dict[Tensor, CheckpointName] = {
        (layer, part, expert, suffix): CheckpointName(
            spell(style, layer, part, expert, suffix), _shape(part, suffix, packed)
        )
        for layer in SOME
        for part in parts
        for expert in experts
        for suffix in suffixes
    }
    shapes = dict(zip(ROUTER, ((EXPERTS, 64), (64,), (EXPERTS,)), strict=True))
    for layer in SOME:
        for part in ROUTER:
            named[layer, part, None, ""] = CheckpointName(spell_router(style, layer, part), shapes[part])
    return named


def config_of(style: str) -> dict[str, Any]:
    return checkpoint.config("distinct", "multimodal" in style, LAYERS, EXPERTS)


def remapped(engine: Engine, style: str, named: dict[Tensor, CheckpointName]) -> dict[Tensor, Targets]:
    """What the engine says of each tensor."""
    try:
        got = engine.remap(config_of(style), list(named.values()))
    except CheckpointError as error:
        raise Nonconformance(f"names of style {style}: refused ({error}), want engine names") from error
    targets = {}
    for tensor, entry in named.items():
        mapped = got.get(entry.name)
        if not isinstance(mapped, tuple) or not mapped or not all(isinstance(t, str | Target) for t in mapped):
            raise Nonconformance(f"{entry.name}: got {mapped!r}, want a tuple of engine names or Targets, at least one")
        targets[tensor] = mapped
    return targets


def slots(targets: Targets) -> set[str | Target]:
    """Targets without their ".weight": an engine may write a bare name for the weights themselves."""
    return {
        target.removesuffix(".weight")
        if isinstance(target, str)
        else target._replace(parameter=target.parameter.removesuffix(".weight"))
        for target in targets
    }


def may_share(target: str | Target, tensors: Collection[Tensor]) -> bool:
    """Whether these tensors may all be (in) this parameter, or in this part of it.

    They make up a fused parameter: of one layer and suffix, gate and up or one part, of one expert or of all.
    """
    layers, parts, experts, suffixes = (set(column) for column in zip(*tensors, strict=True))
    same_kind = len(layers) == len(suffixes) == 1 and (len(parts) == 1 or parts == {"gate_proj", "up_proj"})
    whole = len(tensors) == len(parts) * len(experts) and (len(experts) == 1 or experts == set(SOME))
    if isinstance(target, Target):
        whole = whole and (target.expert is None or len(experts) == 1) and (target.shard is None or len(parts) == 1)
    return same_kind and whole


def unpacked(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a packed one holds, for the experts that are tried."""
    layer, part, _, suffix = tensor
    for expert in SOME:
        for half in ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,):
            yield layer, half, expert, suffix
