"""Limits of a stage that are numbers: which dtypes, how many pairs, which multiples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from moe_conformance.protocol.features import near
from moe_conformance.protocol.stages import STAGES

DTYPES = ("float64", "float32", "bfloat16", "float16")
LETTERS = ("H", "D", "F")
# The sizes that a call of each stage shows; a block's other sizes are in a config that only the engine reads.
EXTENTS: Mapping[str, tuple[str, ...]] = {
    "route": ("dtype", "tokens", "top_k", "pairs", "experts"),
    "router_module": ("dtype", "top_k", "experts", "H"),
    "align": ("tokens", "top_k", "pairs", "experts"),
    "experts": ("dtype", "tokens", "top_k", "pairs", "experts", "D", "F"),
    "shard": ("dtype", "tokens", "top_k", "pairs", "experts", "D", "F"),
    "exchange": ("dtype", "tokens", "top_k", "pairs", "experts", "D", "F"),
    "layer": ("dtype", "tokens", "top_k", "pairs", "experts", "H", "D", "F"),
    "block": ("dtype", "tokens", "H"),
    "replicate": ("tokens", "top_k", "pairs", "experts"),
    "capture_session": ("tokens", "top_k", "pairs", "experts"),
    "capture_store": ("tokens", "top_k", "pairs", "experts"),
    "expert_map": ("experts",),
}


@dataclass(frozen=True)
class Limits:
    """What an engine's stage takes at most; a case beyond it is not judged, and the message says which limit.

    dtypes: of x or logits, as torch writes them without "torch."; empty: any. pairs: T K. tokens: T. top_k: K.
    experts: E. multiples: letter (H, D, F) -> number that the width must be a multiple of.
    """

    dtypes: frozenset[str] = frozenset()
    pairs: int | None = None
    tokens: int | None = None
    top_k: int | None = None
    experts: int | None = None
    multiples: Mapping[str, int] = field(default_factory=dict)

    def exceeded(self, extent: Mapping[str, Any]) -> str | None:
        """The first limit that a call is beyond, with got and want; extent as `extent_of` gives it."""
        dtype = extent.get("dtype")
        if self.dtypes and dtype is not None and dtype not in self.dtypes:
            return f"dtype: got {dtype}, want {' or '.join(sorted(self.dtypes))}"
        for item in fields(self):
            most = getattr(self, item.name)
            if isinstance(most, int) and extent.get(item.name, 0) > most:
                return f"{item.name}: got {extent[item.name]}, want at most {most}"
        for letter, number in self.multiples.items():
            if extent.get(letter, 0) % number:
                return f"{letter}: got {extent[letter]}, want a multiple of {number}"
        return None


def complaints(limits: object) -> list[str]:
    """What is wrong with what an adapter's `limits()` gives; empty where nothing is."""
    if not isinstance(limits, Mapping):
        return [f"limits: got {type(limits).__name__}, want a mapping of stage to Limits"]
    found = []
    for stage, said in limits.items():
        where = f"limits[{stage!r}]"
        if stage not in STAGES:
            found.append(f"limits: got stage {stage!r}, want one of {', '.join(STAGES)}{near(stage, STAGES)}")
        elif not isinstance(said, Limits):
            found.append(f"{where}: got {type(said).__name__}, want Limits")
        else:
            found += [f"{where}.{problem}" for problem in (*_problems(said), *_idle(stage, said))]
    return found


def _idle(stage: str, limits: Limits) -> Iterator[str]:
    """Limits on sizes that a call of this stage does not show; they would never apply."""
    there = EXTENTS.get(stage, ())
    said = [item.name for item in fields(limits) if item.name != "multiples" and getattr(limits, item.name)]
    for name in (*said, *(limits.multiples if isinstance(limits.multiples, Mapping) else ())):
        if ("dtype" if name == "dtypes" else name) not in there:
            known = ", ".join(there) or "nothing"
            yield f"{name}: got a limit of what {stage} is not told, want one of {known}; refuse such calls instead"


def _problems(limits: Limits) -> list[str]:
    found = []
    if not isinstance(limits.dtypes, (frozenset, set)) or not limits.dtypes <= set(DTYPES):
        found.append(f"dtypes: got {limits.dtypes!r}, want a set out of {', '.join(DTYPES)}")
    for name in ("pairs", "tokens", "top_k", "experts"):
        most = getattr(limits, name)
        if most is not None and (type(most) is not int or most < 1):
            found.append(f"{name}: got {most!r}, want a number from 1 up, or None")
    if not isinstance(limits.multiples, Mapping):
        return [*found, f"multiples: got {limits.multiples!r}, want a mapping of letter to number"]
    for letter, number in limits.multiples.items():
        if letter not in LETTERS or type(number) is not int or number < 1:
            found.append(f"multiples: got {letter!r}: {number!r}, want {' or '.join(LETTERS)} and a number from 1 up")
    return found


def extent_of(inputs: Any) -> dict[str, Any]:
    """dtype, tokens, top_k, pairs, experts and widths of a stage's inputs, as far as they have them."""
    from moe_conformance.protocol.align import AlignInputs
    from moe_conformance.protocol.capture import CaptureSpec
    from moe_conformance.protocol.exchange import ExchangeInputs
    from moe_conformance.protocol.experts import ExpertsInputs
    from moe_conformance.protocol.layer import BlockInputs, LayerInputs
    from moe_conformance.protocol.ranks import ExpertMapSpec, ReplicateInputs, ShardInputs
    from moe_conformance.protocol.routing import RouteInputs, RouterSpec

    found: dict[str, Any] = {}
    match inputs:
        case RouteInputs():
            found = _of(
                inputs.logits, top_k=inputs.routing.top_k, experts=inputs.routing.experts(inputs.logits.shape[-1])
            )
        case RouterSpec():
            found = {"dtype": _name(inputs.dtype), "H": inputs.hidden_size, "experts": inputs.num_experts}
            found["top_k"] = inputs.routing.top_k
        case AlignInputs():
            found = {"tokens": len(inputs.ids), "top_k": inputs.ids.shape[-1], "experts": inputs.experts}
        case ExpertsInputs():
            found = _of(inputs.x, top_k=inputs.ids.shape[-1], experts=inputs.experts, D=inputs.x.shape[-1])
            found["F"] = inputs.mlp.width
        case ShardInputs():
            return extent_of(inputs.whole)
        case (ExchangeInputs() as first, *_):
            found = _of(first.x, top_k=first.ids.shape[-1], experts=first.maps.shape[-1], D=first.x.shape[-1])
            found |= {"F": first.mlp.width, "tokens": max(len(rank.x) for rank in inputs)}
        case LayerInputs():
            spec = inputs.spec
            found = _of(inputs.x, top_k=spec.routing.top_k, experts=spec.num_experts, H=spec.hidden_size)
            found |= {"D": spec.latent.width if spec.latent else spec.hidden_size, "F": spec.experts.width}
        case BlockInputs():
            found = _of(inputs.x.flatten(0, 1), H=inputs.x.shape[-1])
        case ReplicateInputs():
            found = {"tokens": len(inputs.ids), "top_k": inputs.ids.shape[-1], "experts": inputs.experts}
        case CaptureSpec():
            found = {"tokens": inputs.max_tokens, "top_k": inputs.top_k, "experts": inputs.experts}
        case ExpertMapSpec():
            found = {"experts": inputs.experts}
    if "tokens" in found and "top_k" in found:
        found["pairs"] = found["tokens"] * found["top_k"]
    return found


def _of(x: Any, **others: int) -> dict[str, Any]:
    return {"dtype": _name(x.dtype), "tokens": len(x), **others}


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
