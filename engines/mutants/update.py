"""Blocks that keep something of the weights they had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from moe_conformance.engine import UpdateInputs
from moe_conformance.engines.mutants.mutant import Faulty, Mutant

CURRENT = "a_block_computes_with_what_was_pushed_last"
PARTS = "a_push_changes_what_it_holds_and_nothing_else"
Push = Mapping[str, Tensor]


class _Pushed(Faulty):
    """What becomes of each push on its way."""

    def update(self, inputs: UpdateInputs) -> Sequence[Tensor]:
        pushes = tuple(self.arrived(inputs, number, dict(push)) for number, push in enumerate(inputs.pushes))
        return super().update(replace(inputs, pushes=pushes))

    def arrived(self, inputs: UpdateInputs, number: int, push: dict[str, Tensor]) -> Push:
        return push


def turned(tensor: Tensor) -> Tensor:
    """Gate and up changed places, as a kernel wants them."""
    return tensor.roll(tensor.shape[1] // 2, dims=1)


class SecondPushInKernelLayout(_Pushed):
    """vllm#42821: the first load is laid out for the kernel, a later one lands there as it came."""

    def arrived(self, inputs: UpdateInputs, number: int, push: dict[str, Tensor]) -> Push:
        if number and "experts.w13" in push:
            push["experts.w13"] = turned(push["experts.w13"])
        return push


class LoadersAreGoneForDown(_Pushed):
    """vllm#17915: after the first load the experts' second matrix has no loader, and is passed over."""

    def arrived(self, inputs: UpdateInputs, number: int, push: dict[str, Tensor]) -> Push:
        return {name: tensor for name, tensor in push.items() if name != "experts.w2"}


class RouterOfTheStart(_Pushed):
    """vllm#42250: the routing closure holds the projection that it was built with."""

    def arrived(self, inputs: UpdateInputs, number: int, push: dict[str, Tensor]) -> Push:
        if "experts.w13" not in push:
            return push
        return {name: tensor for name, tensor in push.items() if name != "router.proj"}


class OtherDtypeIsSkipped(_Pushed):
    def arrived(self, inputs: UpdateInputs, number: int, push: dict[str, Tensor]) -> Push:
        held = inputs.block.tensors
        return {name: tensor for name, tensor in push.items() if tensor.dtype == held[name].dtype}


class CopyInFloat32Stays(_Pushed):
    """Where the block is stored in two bytes the router keeps a float32 copy, made once."""

    def arrived(self, inputs: UpdateInputs, number: int, push: dict[str, Tensor]) -> Push:
        if inputs.block.x.element_size() == 4:
            return push
        return {name: tensor for name, tensor in push.items() if name != "router.proj"}


class PartClearsTheRest(_Pushed):
    """A layer that gets a part of its tensors is made anew, and the others of it are empty."""

    def arrived(self, inputs: UpdateInputs, number: int, push: dict[str, Tensor]) -> Push:
        experts = {name for name in inputs.block.tensors if name.startswith("experts.")}
        if not experts & push.keys():
            return push
        return push | {name: inputs.block.tensors[name] * 0 for name in experts - push.keys()}


class LastPieceAlone(_Pushed):
    """Each call of a push begins anew, so that the last one counts."""

    def arrived(self, inputs: UpdateInputs, number: int, push: dict[str, Tensor]) -> Push:
        return dict(list(push.items())[inputs.pieces - 1 :: inputs.pieces])


BOTH = frozenset({"closure-capture", "weight-coverage"})

MUTANTS = tuple(
    Mutant(engine, bug_class, fault, (f"update-qwen3-moe-{case}", check), also=BOTH)
    for engine, bug_class, fault, case, check in (
        (SecondPushInKernelLayout, "closure-capture", "gate and up are swapped", "again-and-again", CURRENT),
        (RouterOfTheStart, "closure-capture", "the router stays with new experts", "once", CURRENT),
        (OtherDtypeIsSkipped, "closure-capture", "a push in another dtype is skipped", "narrow-push", CURRENT),
        (CopyInFloat32Stays, "closure-capture", "a float32 copy of the router stays", "wide-push-bf16", CURRENT),
        (LoadersAreGoneForDown, "weight-coverage", "w2 has no loader any more", "down-alone", PARTS),
        (PartClearsTheRest, "weight-coverage", "experts that a push lacks are empty", "all-then-down", PARTS),
        (LastPieceAlone, "weight-coverage", "of several calls the last counts", "in-three-pieces", PARTS),
    )
)
