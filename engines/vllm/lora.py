"""vLLM's adapters of experts: its LoRA layer around its expert layer, filled by its own packing, run by its kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from torch import Tensor

from moe_conformance.engine import ExpertsInputs, Lora, LoraSpec, called_by_engine
from moe_conformance.engines.vllm import built, device, interpreted
from moe_conformance.engines.vllm.refusing import refusals
from moe_conformance.errors import Unsupported


def adapt(made: built.Built, inputs: ExpertsInputs, lora: Lora) -> None:
    """Put adapters around a layer that has been built. Raises Unsupported in a release without them."""
    with refusals():
        from vllm.config.lora import LoRAConfig, MaxLoRARanks
        from vllm.lora.layers import LoRAMapping
        from vllm.lora.layers.fused_moe import FusedMoEWithLoRA
        from vllm.lora.ops.triton_ops import fused_moe_lora_op
        from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

        if device.is_cpu() and not hasattr(fused_moe_lora_op, "_run_fused_moe_lora_one_shot"):
            # Of releases that shrink and expand in kernels of their own, one answers with garbage when interpreted, and
            # it is not known whether that is the release's doing.
            raise Unsupported("vLLM: adapters that two kernels add are not judged by Triton's interpreter")
        spec, tokens = lora.spec, len(inputs.x)
        ranks = sorted(MaxLoRARanks.__args__)
        rank = next((known for known in ranks if known >= spec.rank), None)
        if rank is None:
            raise Unsupported(f"vLLM: got rank {spec.rank}, want at most {ranks[-1]}")
        config = LoRAConfig(max_lora_rank=rank, max_loras=spec.adapters, max_cpu_loras=spec.adapters)
        config.lora_dtype = inputs.x.dtype
        layer = FusedMoEWithLoRA(made.module)
        layer.create_lora_weights(spec.adapters, config)
        for adapter in range(spec.adapters):
            packed = _packed(inputs, lora, adapter)
            layer.set_lora(adapter, packed.lora_a, packed.lora_b)
        wrapper = PunicaWrapperGPU(max(tokens, 1), max(tokens, 1), inputs.x.device, lora_config=config)
        # By numbers of requests, of which 0 is none.
        numbers = tuple((lora.adapters + 1).tolist())
        mapping = LoRAMapping(numbers, numbers, is_prefill=True)
        wrapper.update_metadata(mapping, [number + 1 for number in range(spec.adapters)], spec.adapters, 1)
        layer.set_mapping(wrapper)


def scaling(spec: LoraSpec) -> float:
    """As PEFTHelper of vLLM computes it from a file's alpha, rank and use_rslora."""
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper(r=spec.rank, lora_alpha=spec.alpha, target_modules=["experts"], use_rslora=spec.rslora)
    found: float = helper.vllm_lora_scaling_factor
    return found


def _packed(inputs: ExpertsInputs, lora: Lora, adapter: int) -> Any:
    from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights

    spec, width, gated = lora.spec, inputs.mlp.width, inputs.mlp.gated
    first = "w13" if gated else "w1"
    tensors = {name.removeprefix("lora."): tensor[adapter] for name, tensor in lora.tensors.items()}

    def weights(name: str, a: Tensor, b: Tensor) -> Any:
        return LoRALayerWeights(name, spec.rank, spec.alpha, a.clone(), b.clone(), scaling(spec))

    found: list[Any] = []
    for expert in range(len(tensors["w2.a"])):
        a, b = tensors[f"{first}.a"][expert], tensors[f"{first}.b"][expert]
        found += [
            weights("w1", a, b[:width]),
            weights("w2", tensors["w2.a"][expert], tensors["w2.b"][expert]),
            weights("w3", a, b[width:]) if gated else None,
        ]
    return PackedLoRALayerWeights.pack_moe(found, "experts", is_non_gated_moe=not gated).optimize()


@contextlib.contextmanager
def aligning() -> Iterator[None]:
    """Inside, our own function is where vLLM calls a compiled operator that a CPU build lacks."""
    from vllm import _custom_ops

    with contextlib.ExitStack() as stack:
        if device.is_cpu():
            stack.enter_context(patch.object(_custom_ops, "moe_lora_align_block_size", align))
        yield


@called_by_engine
def align(
    topk_ids: Tensor,
    token_lora_mapping: Tensor,
    num_experts: int,
    block_size: int,
    max_loras: int,
    max_num_tokens_padded: int,
    max_num_m_blocks: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    adapter_enabled: Tensor,
    lora_ids: Tensor,
    expert_map: Tensor | None = None,
) -> None:
    """What csrc/moe/moe_lora_align_sum_kernels.cu writes: the pairs of each adapter's tokens, aligned by expert."""
    blocks, experts = sorted_token_ids.view(max_loras, -1), experts_ids.view(max_loras, -1)
    for adapter in lora_ids.tolist():
        if adapter < 0 or not int(adapter_enabled[adapter]):
            continue
        theirs = (token_lora_mapping[: len(topk_ids)] == adapter)[:, None]
        ids = topk_ids.masked_fill(~theirs, -1)
        interpreted.align(
            ids, num_experts, block_size, blocks[adapter], experts[adapter], num_tokens_post_pad[adapter], expert_map
        )
