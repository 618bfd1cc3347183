"""Engines that misbehave, for the harness's own tests. One stage each: what matters is how, not where."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from typing import Any

from moe_conformance.engine import BlockInputs, BlockOutput, EngineInfo, LayerInputs
from moe_conformance.engines.reference import Reference

PROBE_WIDTH = 32  # the probe's layer; the fakes behave there, so that they are judged


class _Fake:
    info = EngineInfo("fake", "1", "cpu")

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        return {"layer": frozenset({"softmax_topk_renorm", "scale", "shared", "latent", "padded_hidden"})}


class AlwaysWrong(_Fake):
    name = "always-wrong"

    def layer(self, inputs: LayerInputs) -> Any:
        return inputs.x + 1


class Crashes(_Fake):
    name = "crashes"

    def layer(self, inputs: LayerInputs) -> Any:
        if inputs.latent_in is not None:
            print("about to read address 1")
            ctypes.string_at(1)
        return inputs.x


class Hangs(_Fake):
    name = "hangs"

    def layer(self, inputs: LayerInputs) -> Any:
        if inputs.latent_in is not None:
            time.sleep(1000)
        return inputs.x


class ClaimsTooMuch(_Fake):
    """Declares a stage that it does not have."""

    name = "claims-too-much"

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        return {**super().capabilities(), "capture_session": frozenset({"local"})}

    def layer(self, inputs: LayerInputs) -> Any:
        return inputs.x


class ClaimsTooLittle(_Fake):
    """Answers in a stage that it does not declare."""

    name = "claims-too-little"

    def layer(self, inputs: LayerInputs) -> Any:
        return inputs.x

    def route(self, inputs: Any) -> Any:
        return inputs.logits.topk(inputs.top_k)[::-1]


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
        print('{"verdict": "pass", "message": "", "facts": null}', flush=True)
        return inputs.x + 1


class NoStages(_Fake):
    name = "no-stages"

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        return {}


class WritesIntoWeights(Reference):
    """Right in its answer; what it spoils lies in a mapping of its inputs."""

    name = "writes-into-weights"

    def block(self, inputs: BlockInputs) -> BlockOutput:
        output = super().block(inputs)
        inputs.tensors["experts.w2"].zero_()
        return output
