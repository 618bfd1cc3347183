"""Experts that add another update than the token's own adapter has, in one kind of batch alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moe_conformance.engine import ExpertsInputs, Lora
from moe_conformance.engines.mutants.mutant import Faulty, Mutant

UPDATE = "tokens_have_the_update_of_their_own_adapter"
NONE = "a_token_without_adapter_is_as_if_there_were_none"


def with_lora(inputs: ExpertsInputs, change: Callable[[Lora], Lora]) -> ExpertsInputs:
    return inputs if inputs.lora is None else replace(inputs, lora=change(inputs.lora))


def tensors_of(lora: Lora, end: str, change: Callable[[Tensor], Tensor]) -> Lora:
    return replace(lora, tensors={n: change(t.clone()) if n.endswith(end) else t for n, t in lora.tensors.items()})


class AdapterOfTheNeighbour(Faulty):
    """The mapping of tokens to adapters is read one token off, behind a block of 16."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        def shifted(lora: Lora) -> Lora:
            adapters = lora.adapters.clone()
            adapters[16:] = lora.adapters[15:-1]
            return replace(lora, adapters=adapters)

        return super().experts(with_lora(inputs, shifted))


class RootOfTheRankIgnored(Faulty):
    """vllm#55545: alpha / rank also where rslora says alpha / sqrt(rank)."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        return super().experts(with_lora(inputs, lambda lora: replace(lora, spec=replace(lora.spec, rslora=False))))


class NoAdapterIsTheLast(Faulty):
    """sglang#24171: -1 becomes another adapter's index, where some other token has an adapter."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        def last(lora: Lora) -> Lora:
            adapters = lora.adapters
            some = bool((adapters >= 0).any())
            return replace(lora, adapters=adapters.where(adapters >= 0, lora.spec.adapters - 1) if some else adapters)

        return super().experts(with_lora(inputs, last))


class UpHasNoUpdate(Faulty):
    """The second slice of w13 is left out where there are several adapters."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        def cut(b: Tensor) -> Tensor:
            if len(b) > 1:
                b[:, :, inputs.mlp.width :] = 0
            return b

        return super().experts(with_lora(inputs, lambda lora: tensors_of(lora, "w13.b", cut)))


class UpdatesByGlobalId(Faulty):
    """Under an expert map, updates are those of the local expert whose number the global id ends in."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        if inputs.expert_map is None:
            return super().experts(inputs)
        return super().experts(with_lora(inputs, lambda lora: tensors_of(lora, "", lambda tensor: tensor.roll(1, 1))))


class RanksOfPeftMisread(Faulty):
    """unsloth-zoo#1269: B is read with the expert slowest, as A is."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        def misread(b: Tensor) -> Tensor:
            adapters, experts, rows, rank = b.shape
            flat = b.permute(0, 2, 3, 1).reshape(adapters, rows, experts, rank)
            return flat.permute(0, 2, 1, 3).contiguous()

        return super().experts(with_lora(inputs, lambda lora: tensors_of(lora, ".b", misread)))


class FirstAdapterServesAllInHalf(Faulty):
    """In float16 the batch has one adapter, the first token's that has any."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        def first(lora: Lora) -> Lora:
            held = lora.adapters[lora.adapters >= 0]
            if inputs.x.dtype != torch.float16 or not len(held):
                return lora
            return replace(lora, adapters=held[0].where(lora.adapters >= 0, -1))

        return super().experts(with_lora(inputs, first))


class LeftoversWithoutAdapter(Faulty):
    """vllm#42120: a token without an adapter is touched by the buffers of those that others have."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        output = super().experts(inputs)
        if inputs.lora is None or not bool((inputs.lora.adapters >= 0).any()):
            return output
        without = (inputs.lora.adapters < 0)[:, None]
        return torch.where(without, output * (1 + torch.finfo(output.dtype).eps), output)


class NarrowWithoutUpdate(Faulty):
    """unsloth-zoo#779: the layout of the update is guessed from 2F > D, and narrow experts keep the base weights."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        narrow = 2 * inputs.mlp.width <= inputs.x.shape[1]
        return super().experts(replace(inputs, lora=None) if narrow else inputs)


class UngatedWithoutUpdate(Faulty):
    """Automodel#1755: adapters of experts without a gate do nothing."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        return super().experts(inputs if inputs.mlp.gated else replace(inputs, lora=None))


class UpTakesTheUpdateOfGate(Faulty):
    """vllm#42718: at rank 1 the second slice of w13 is read at a wrong offset."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        def twice(b: Tensor) -> Tensor:
            return torch.cat([b[:, :, : inputs.mlp.width]] * 2, 2) if b.shape[-1] == 1 else b

        return super().experts(with_lora(inputs, lambda lora: tensors_of(lora, "w13.b", twice)))


class AdaptersOfTheFirstChunk(Faulty):
    """vllm#19168: the adapters of the first 64 tokens serve every chunk of 64."""

    def experts(self, inputs: ExpertsInputs) -> Tensor:
        def first(lora: Lora) -> Lora:
            return replace(lora, adapters=lora.adapters[torch.arange(len(lora.adapters)) % 64])

        return super().experts(with_lora(inputs, first))


def _mutant(engine: type[Faulty], fault: str, case: str, check: str = UPDATE) -> Mutant:
    return Mutant(engine, "expert-lora", fault, (f"experts-lora-{case}", check))


MUTANTS = (
    _mutant(AdapterOfTheNeighbour, "behind 16 tokens, each has the adapter of the one before", "three"),
    _mutant(RootOfTheRankIgnored, "rslora is scaled by alpha / rank", "rslora"),
    _mutant(NoAdapterIsTheLast, "no adapter is the last adapter", "absent-experts"),
    _mutant(UpHasNoUpdate, "up has no update where there are several adapters", "three"),
    _mutant(UpdatesByGlobalId, "under an expert map, updates are of other experts", "ep-dropped"),
    _mutant(RanksOfPeftMisread, "ranks of B are read in A's order", "one"),
    _mutant(FirstAdapterServesAllInHalf, "in float16 all tokens have one adapter", "fp16"),
    _mutant(NarrowWithoutUpdate, "experts with 2F <= D have no update", "rank-16"),
    _mutant(UngatedWithoutUpdate, "experts without a gate have no update", "not-gated"),
    _mutant(UpTakesTheUpdateOfGate, "at rank 1, up has gate's update", "rank-one"),
    _mutant(AdaptersOfTheFirstChunk, "behind 64 tokens, adapters begin anew", "many"),
    _mutant(LeftoversWithoutAdapter, "a token without an adapter has other last bits", "three", NONE),
)
