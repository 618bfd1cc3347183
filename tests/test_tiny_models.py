"""Whole tiny models of every family: what their MoE blocks get and give in a forward, against the reference.

The reference has the folder that the model was loaded from, config.json and its own `load`, and the block's input.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.24", reason="the families here are those of transformers 5.24")
import tiny_models

from moe_conformance.engine import BlockInputs, Routing
from moe_conformance.engines.transformers.block_routing import Tap
from moe_conformance.judging import inputs
from moe_conformance.model.families.tiny import HIDDEN
from moe_conformance.reference_impl.block import block as reference
from moe_conformance.reference_impl.checkpoint.loading import load

# On a push the family suite holds the same blocks against the oracle, and the checkpoints' tests the same loads.
pytestmark = pytest.mark.nightly

BATCH, LENGTH = 2, 5
# Float32 on both sides, in another order of summation: sums of 32 and 20 products, and of at most 12 experts.
RELATIVE = 1e-5
# dots3_note's vision encoder takes patches, no tokens; its block is in the family suite.
NO_TOKENS = ("dots3_note_vision_encoder",)
FAMILIES = [family for family in tiny_models.FAMILIES if family not in NO_TOKENS]
# Families whose modules compute something else than their model says, in this release.
WRONG = {"nllb-moe": "transformers 5.24 takes a mask for a list of ids: see findings/transformers_nllb_moe_experts.py"}

# How often each layer runs in one forward, where that is not once: three layers, the middle one looped.
PASSES = {"inkling2_loop_text": [1, 3, 1]}


class Watch:
    """Takes one block's input, what else it is given, its output and its routing out of the model's forward."""

    def __init__(self, model: Any, block: tiny_models.Block) -> None:
        self.tap = Tap(block.module, None)
        self.given: dict[str, Any] = {}
        self.x: Tensor | None = None
        self.passes = 0
        self.output: Tensor | None = None
        layer = block.layer
        if block.module is layer:  # gemma4: from the residual before the first norm to what the last norm gets
            self._before(layer.pre_feedforward_layernorm, "x")
            self._before(layer.post_feedforward_layernorm, "output")
            return
        root = model.get_submodule(block.path.rpartition(".")[0]) if block.path.endswith("text_moe") else block.module
        self._before(root, "x")
        self._after(root)
        if hasattr(layer, "shared_mlp"):  # the granites: beside the block, and added to it
            self._after(layer.shared_mlp)

    def _before(self, module: Any, name: str) -> None:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            self.given = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
            setattr(self, name, next(iter(self.given.values())).clone())
            if name == "x":  # a layer that runs again begins anew: its last pass is judged
                self.passes, self.output = self.passes + 1, None

        module.register_forward_pre_hook(hook, with_kwargs=True)

    def _after(self, module: Any) -> None:
        def hook(_: Any, __: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            self.output = output.clone() if self.output is None else self.output + output.view_as(self.output)

        module.register_forward_hook(hook)


def forward(model: Any, token_ids: Tensor) -> None:
    takes = inspect.signature(model.forward).parameters
    if "trailing_text_hidden" in takes:  # qwen3_omni's talker: the thinker's hidden states come instead of tokens
        with torch.no_grad():
            model(inputs_embeds=inputs.normal((BATCH, LENGTH, HIDDEN), "embeds"), use_cache=False)
        return
    if type(model).__name__ == "Llama4ForConditionalGeneration":  # see findings/transformers_llama4_forward.py
        model = model.language_model
    extra = {"decoder_input_ids": token_ids.flip(1)} if "decoder_input_ids" in takes else {}
    with torch.no_grad():
        model(input_ids=token_ids, use_cache=False, **extra)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=pytest.mark.xfail(reason=WRONG[f], strict=True)) if f in WRONG else f for f in FAMILIES],
)
def test_the_reference_computes_what_the_blocks_of_a_real_model_do(family: str) -> None:
    token_ids = inputs.integers((BATCH, LENGTH), "tokens", high=64, low=3)
    with tempfile.TemporaryDirectory() as name:
        built = tiny_models.build(family)
        built.save_pretrained(name)
        model = type(built).from_pretrained(name).eval()
        tensors, config = load(Path(name)), json.loads((Path(name) / "config.json").read_text())
    watched = {b: Watch(model, b) for b in tiny_models.blocks(model) if b.prefix.startswith("layers.")}
    watched = {b: w for b, w in watched.items() if not b.prefix.endswith("vision.")}
    assert len(watched) >= 2
    for watch in watched.values():
        watch.tap.__enter__()
    forward(model, token_ids)
    assert [watch.passes for watch in watched.values()] == PASSES.get(family, [1] * len(watched))
    for block, watch in watched.items():
        assert watch.x is not None and watch.output is not None
        state = watch.given.get("prev_router_hidden_states")
        own = {n.removeprefix(block.prefix): t for n, t in tensors.items() if n.startswith(block.prefix)}
        own = {n: t for n, t in own.items() if not n.startswith("vision.")}
        got = reference(
            BlockInputs(
                config,
                int(block.prefix.split(".")[1]),
                own,
                watch.x.view(BATCH, LENGTH, -1),
                token_ids if "router.table" in own else None,
                None if state is None else state.view(BATCH, LENGTH, -1),
            )
        )
        if watch.tap.seen is not None:
            assert_same_routing(got.routing, watch.tap.seen)
        want = watch.output.flatten(0, -2)
        assert (got.output - want).abs().max() <= RELATIVE * want.abs().max()


def assert_same_routing(got: Routing | None, want: Routing) -> None:
    """The same experts in any order within a row, with the same weights."""
    assert got is not None
    ids, order = got.ids.sort(dim=-1)
    want_ids, want_order = want.ids.flatten(0, -2).sort(dim=-1)
    assert torch.equal(ids, want_ids)
    weights = got.weights.gather(-1, order)
    assert (weights - want.weights.flatten(0, -2).gather(-1, want_order)).abs().max() <= RELATIVE * weights.abs().max()
