"""What an engine is: a name, its capabilities and the stages it implements."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from weakref import WeakSet

from moe_conformance.errors import Unsupported
from moe_conformance.model.description import CaptureShape, MoESpec
from moe_conformance.protocol.align import Aligned, AlignInputs
from moe_conformance.protocol.capture import CaptureReader, CaptureSession, CaptureSpec, CaptureStore
from moe_conformance.protocol.checkpoint import CheckpointName, Target
from moe_conformance.protocol.exchange import Exchanged, ExchangeInputs
from moe_conformance.protocol.experts import ExpertsInputs
from moe_conformance.protocol.generate import Generated, GenerateInputs
from moe_conformance.protocol.layer import BlockInputs, BlockOutput, LayerInputs
from moe_conformance.protocol.limits import Limits
from moe_conformance.protocol.ranks import ExpertMapSpec, Replicated, ReplicateInputs, ShardInputs
from moe_conformance.protocol.routing import RouteInputs, RouterHandle, RouterSpec, Routing
from moe_conformance.protocol.stages import PROTOCOL_VERSION
from moe_conformance.protocol.update import UpdateInputs

if TYPE_CHECKING:
    from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class EngineInfo:
    """name: as listed; version: of the engine judged, not of the adapter; device: "cpu", "cuda", ..."""

    name: str
    version: str
    device: str = "cpu"


class Repro(NamedTuple):
    """source: Python that needs the engine and torch alone, finds its tensors as `t["name"]`, and sets `got` to what
    the stage returns. tensors: by those names."""

    source: str
    tensors: Mapping[str, Tensor]


# Code of functions marked by `called_by_engine`: tracebacks hold code, not functions. Weak, for closures come and go.
_CALLED_BY_ENGINE: WeakSet[CodeType] = WeakSet()


def called_by_engine(function: _Function) -> _Function:
    """Mark a function of an adapter that the engine calls back: a hook, a stand-in for a kernel, a loader's iterator.

    What raises in it, or in what it calls, is then the engine's fault, for the engine chose the arguments. Arguments
    that its signature does not take stay the adapter's fault. The function itself is returned unchanged. Put the mark
    next to the function: below @staticmethod and the like. Raises TypeError where there is no function.
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        raise TypeError(
            f"called_by_engine: got {type(function).__name__}, want a function; below @staticmethod or @property, "
            "and on the __call__ of a class"
        )
    _CALLED_BY_ENGINE.add(code)
    return function


def is_called_by_engine(code: CodeType) -> bool:
    """Whether this is the code of a marked function."""
    return code in _CALLED_BY_ENGINE


def is_signature_of_marked(error: TypeError) -> bool:
    """Whether Python raised this because a marked function was called with arguments that its signature lacks.

    Such a call has no frame of the function, so only the message tells, which begins with the function's name.
    """
    name = _SIGNATURE.match(str(error))
    return name is not None and any(code.co_qualname == name[1] for code in _CALLED_BY_ENGINE)


_SIGNATURE = re.compile(r"(.+?)\(\) (?:takes|got|missing) ")


def _not_offered(stage: str) -> Unsupported:
    return Unsupported(f"{stage}: the adapter does not offer this stage")


class Engine:
    """Base with every stage unsupported. Adapters may derive from it, or only look like it.

    A stage may refuse a call that it was declared for, by raising Unsupported with the engine's own reason; refusals
    are listed by reason and never count as a pass.
    """

    name: str = ""
    # The protocol that the adapter was written for; docs/migrating.md says what each number changed.
    protocol: int = PROTOCOL_VERSION

    @classmethod
    def environment(cls) -> Mapping[str, str]:
        """Environment variables that the engine's process needs before anything is imported."""
        return {}

    @classmethod
    def missing(cls) -> str | None:
        """Why the engine cannot start here, or None. Must be cheap: no heavy import."""
        return None

    @property
    def info(self) -> EngineInfo:
        raise NotImplementedError

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        """Stage -> the optional features of it that are offered, as protocol/features.py lists them."""
        raise NotImplementedError

    def limits(self) -> Mapping[str, Limits]:
        """Stage -> the numbers it cannot go beyond, where it has any."""
        return {}

    def ran(self) -> str:
        """What of the engine computed since this was last asked, in its own words: a kernel's class, its variant.

        Results carry it. "" where there is nothing to say.
        """
        return ""

    def repro(self, inputs: Any) -> Repro:
        """How a script would make the same call of the engine, for the stage of these inputs, without the adapter.

        `moe-conformance repro` writes it for a bug report. Without it, or where it raises Unsupported, the script
        drives the engine through its adapter.
        """
        raise Unsupported("repro: the adapter does not say how it calls the engine")

    def describe(self, config: Any) -> MoESpec:
        """config: a transformers config, nested or flat, or its plain dict."""
        raise _not_offered("describe")

    def capture_shape(self, config: Any, side: Literal["worker", "reader"]) -> CaptureShape:
        """The buffer sizes that one side of the capturer takes from the config."""
        raise _not_offered("capture_shape")

    def route(self, inputs: RouteInputs) -> Routing:
        """Ids and weights, [T, inputs.slots] each, of router logits."""
        raise _not_offered("route")

    def router_module(self, spec: RouterSpec) -> RouterHandle:
        """Build the router; its tensors are filled afterwards, by the names that the handle gives."""
        raise _not_offered("router_module")

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        """The routed sum [T, D] at the routing given, in x's dtype."""
        raise _not_offered("experts")

    def align(self, inputs: AlignInputs) -> Aligned:
        """Sort pairs by expert, each expert's into whole blocks."""
        raise _not_offered("align")

    def layer(self, inputs: LayerInputs) -> Tensor:
        """Return the layer's output [T, H], in x's dtype."""
        raise _not_offered("layer")

    def block(self, inputs: BlockInputs) -> BlockOutput:
        """Compute the MoE block of a layer as the model of this config does."""
        raise _not_offered("block")

    def capture_session(self, spec: CaptureSpec) -> CaptureSession:
        """A capturer with a buffer of these sizes."""
        raise _not_offered("capture_session")

    def capture_store(self, spec: CaptureSpec) -> CaptureStore:
        """A store of spec.max_tokens slots."""
        raise _not_offered("capture_store")

    def capture_reader(self, address: object) -> CaptureReader:
        """Open, in any process, what `capture_store` made."""
        raise _not_offered("capture_reader")

    def expert_map(self, spec: ExpertMapSpec) -> Tensor:
        """[E] integer: the rank's local id of each expert, ascending with global ids; -1 for those of other ranks."""
        raise _not_offered("expert_map")

    def replicate(self, inputs: ReplicateInputs) -> Replicated:
        """Choose a physical expert for each pair and count the load."""
        raise _not_offered("replicate")

    def shard(self, inputs: ShardInputs) -> Tensor:
        """Return this rank's part [T, D], in x's dtype: summed over all ranks it is the layer's output."""
        raise _not_offered("shard")

    def exchange(self, ranks: Sequence[ExchangeInputs]) -> Sequence[Exchanged]:
        """Dispatch, compute and combine on the ranks that this process plays: all of them, or one.

        One of several is the rank of that number of torch.distributed's default group, which is initialised; the other
        ranks call at the same time, each in a process of its own. Calls with the same ranks may follow each other.
        """
        raise _not_offered("exchange")

    def remap(self, config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str | Target, ...]]:
        """The engine's own name, or names, for each checkpoint tensor of a model with this config (a plain dict).

        Where the engine fuses tensors into one parameter, several have its name, or each a Target that says which part
        of the parameter it is. Gate and up of one expert or of all may share a name so, and any one part of all
        experts.
        """
        raise _not_offered("remap")

    def load(self, folder: Path) -> Mapping[str, Tensor]:
        """Load a checkpoint folder (config.json, safetensors with an index) and return what now lies in the model.

        Keys: layers.I.NAME for each name of the layer's `LayerSpec.tensors`: layers.I.experts.w13 [E, 2F, H] with gate
        above up, layers.I.experts.w2 [E, H, F], layers.I.router.proj [E, H] and so on; encoder.layers.I.NAME of an
        encoder. A folder may have the MoE layers of a model alone.
        Raises if a parameter of them is left unwritten or a key unconsumed, naming which.
        """
        raise _not_offered("load")

    def update(self, inputs: UpdateInputs) -> Sequence[Tensor]:
        """The block's output [T, H] before any push, and after each: one block, never built anew."""
        raise _not_offered("update")

    def generate(self, inputs: GenerateInputs) -> Generated:
        """Serve a whole model: load the folder, answer its requests greedily, and say which experts each token had."""
        raise _not_offered("generate")
