"""Engines that misbehave, for the harness's own tests. One stage each: what matters is how, not where."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from moe_conformance.engine import (
    AlignInputs,
    EngineInfo,
    LayerInputs,
    Limits,
    Routing,
    Unsupported,
    called_by_engine,
)
from moe_conformance.engines.reference import Reference
from moe_conformance.errors import Nonconformance

PROBE_WIDTH = 32  # the probe's layer; the fakes behave there, so that they are judged


class _Fake:
    info = EngineInfo("fake", "1", "cpu")

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        return {
            "layer": frozenset({"softmax", "renormalize", "output_scale", "shared", "latent", "padded_hidden"}),
        }


class _Routes(_Fake):
    """Has a second stage, which is as wrong, to see what becomes of it."""

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        return {**super().capabilities(), "route": frozenset({"softmax", "renormalize", "per_expert_scale"})}

    def route(self, inputs: Any) -> Routing:
        ids = inputs.logits.topk(inputs.routing.top_k).indices
        return Routing(ids, ids.float())


class AlwaysWrong(_Fake):
    name = "always-wrong"

    def layer(self, inputs: LayerInputs) -> Any:
        return inputs.x + 1


class Crashes(_Fake):
    name = "crashes"

    def layer(self, inputs: LayerInputs) -> Any:
        if inputs.spec.latent is not None:
            print("about to read address 1")
            ctypes.string_at(1)
        return inputs.x


class Hangs(_Fake):
    name = "hangs"

    def layer(self, inputs: LayerInputs) -> Any:
        if inputs.spec.latent is not None:
            time.sleep(1000)
        return inputs.x


class ClaimsTooLittle(_Routes):
    """Answers in a stage that it does not declare."""

    name = "claims-too-little"

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        return _Fake.capabilities(self)

    def layer(self, inputs: LayerInputs) -> Any:
        return inputs.x


class Misspells(_Fake):
    name = "misspells"

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        return {"layer": frozenset({"softmx", "renormalize", "scale"})}

    def layer(self, inputs: LayerInputs) -> Any:
        return inputs.x


class FailsItsProbe(_Routes):
    name = "fails-its-probe"

    def layer(self, inputs: LayerInputs) -> Any:
        return inputs.x[:1]


class DiesInItsProbe(_Routes):
    name = "dies-in-its-probe"

    def layer(self, inputs: LayerInputs) -> Any:
        if inputs.x.shape[-1] == PROBE_WIDTH:
            ctypes.string_at(1)
        return inputs.x


class Declines(_Fake):
    """Declares shared experts, and refuses them when called; says of the experts' width what it takes."""

    name = "declines"

    def limits(self) -> Mapping[str, Limits]:
        return {"layer": Limits(multiples={"D": 5})}

    def layer(self, inputs: LayerInputs) -> Any:
        if inputs.spec.shared is not None:
            raise Unsupported("no kernel for sm_35")
        return inputs.x + 1


class WritesIntoInputs(_Fake):
    name = "writes-into-inputs"

    def layer(self, inputs: LayerInputs) -> Any:
        inputs.x.numpy()[:] = 0  # behind torch's back, as a kernel does
        return inputs.x.clone()


class AdapterBroken(_Fake):
    """The adapter itself raises, where an engine would have answered."""

    name = "adapter-broken"

    def layer(self, inputs: LayerInputs) -> Any:
        if inputs.x.shape[-1] != PROBE_WIDTH:
            raise KeyError("a misspelt attribute")
        return inputs.x


class NotInstalled(_Fake):
    name = "not-installed"

    @classmethod
    def missing(cls) -> str | None:
        return "no package fake-engine; pip install fake-engine"


class Noisy(_Fake):
    """Prints where the harness talks, and is as wrong as the first."""

    name = "noisy"

    def layer(self, inputs: LayerInputs) -> Any:
        outcome = '{"verdict": "pass", "message": "", "facts": null, "refusal": null}'
        print('{"kind": "Answer", "number": 2, "outcome": ' + outcome + "}", flush=True)
        return inputs.x + 1


class Shouts(_Fake):
    """Raises with what no terminal, no file and no page takes as it is, and a megabyte of it."""

    name = "shouts"

    def layer(self, inputs: LayerInputs) -> Any:
        if inputs.x.shape[-1] != PROBE_WIDTH:
            raise Nonconformance("\x1b[31mred\x1b[0m \ud800 \x00\r ````" + "<b>" * 10_000_000)
        return inputs.x


class NothingToday(_Fake):
    """Declares nothing, and refuses what it has a method for."""

    name = "nothing-today"

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        return {}

    def layer(self, inputs: LayerInputs) -> Any:
        raise Unsupported("not today")


class WritesIntoWeights(Reference):
    """Right in its answer; what it spoils lies in a mapping of its inputs."""

    name = "writes-into-weights"

    def layer(self, inputs: LayerInputs) -> Any:
        output = super().layer(inputs)
        inputs.tensors["experts.w2"].zero_()
        return output


class RightAtLast(Reference):
    """Adds 1 to the first answer of its process behind the probe's, and is right in all that follow."""

    name = "right-at-last"

    def __init__(self) -> None:
        self.is_right = False

    def layer(self, inputs: LayerInputs) -> Any:
        output = super().layer(inputs)
        if inputs.x.shape[-1] == PROBE_WIDTH:
            return output
        was_right, self.is_right = self.is_right, True
        return output if was_right else output + 1


class DiesLater(_Fake):
    """Wrong, and dead a moment after its first answer, which the next item of the process finds."""

    name = "dies-later"

    def layer(self, inputs: LayerInputs) -> Any:
        if inputs.x.shape[-1] != PROBE_WIDTH:
            threading.Timer(0.3, os._exit, (5,)).start()
        return inputs.x + 1


class CallsBack(_Fake):
    """Its engine (tests/fake_library.py) calls functions of the adapter; what each does is the block size."""

    name = "calls-back"

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        return {"align": frozenset()}

    def align(self, inputs: AlignInputs) -> Any:
        import fake_library

        return fake_library.align(inputs.ids, CALLBACKS[inputs.block])


def _lookup(key: str) -> int:
    return {"known": 1}[key]


@called_by_engine
def marked(key: str) -> int:
    return _lookup(key)


def not_marked(key: str) -> int:
    return _lookup(key)


@called_by_engine
def marked_of_old_signature() -> int:
    return 1


@called_by_engine
def marked_that_mistypes(key: str) -> int:
    return key + 1  # type: ignore[operator]


CALLBACKS = {1: marked, 2: not_marked, 3: marked_of_old_signature, 4: marked_that_mistypes}
