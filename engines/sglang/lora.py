"""SGLang's adapters of experts: its LoRA layer around its expert layer, filled as its memory pool fills it.

Pairs are aligned by the function of its own that is Python, which other accelerators run; the deltas are added by its
Triton kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.engine import ExpertsInputs, Lora, LoraSpec
from moe_conformance.engines.sglang import built, device
from moe_conformance.engines.sglang.refusing import refusals
from moe_conformance.errors import Unsupported

_RUNNERS = "sglang.srt.lora.lora_moe_runners"
_KERNEL = "sglang.kernels.ops.lora.moe.fused_moe_lora_kernel"


def adapt(made: built.Built, inputs: ExpertsInputs, lora: Lora) -> None:
    """Put adapters around a layer that has been built. Raises Unsupported in a release without them."""
    if made.kernel != "triton":
        raise Unsupported(f"SGLang's {built.NAMES[made.kernel]} takes no adapters")
    try:
        from sglang.srt.lora.layers import FusedMoEWithLoRA
    except ImportError as error:
        raise Unsupported(f"SGLang: this release has no adapters of experts: {error}") from error
    with refusals(), made.inside():
        wrapped = FusedMoEWithLoRA(made.module, _Batch(lora))
        wrapped.set_lora_info(*_weights(inputs, lora))
        wrapped.num_experts = made.module.num_experts
        made.module = wrapped


def scaling(spec: LoraSpec) -> float:
    """As its adapter computes it from a file's adapter_config.json."""
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig

    said = {"peft_type": "LORA", "target_modules": ["experts"], "r": spec.rank, "lora_alpha": spec.alpha}
    config = LoRAConfig(config_dict=said | {"use_rslora": spec.rslora})
    adapter = LoRAAdapter("adapter", config, SimpleNamespace(num_hidden_layers=0), None, None)
    return float(adapter.scaling)


class _Batch:
    """What the layer asks of a server's backend: which adapter each token has. The first one is none."""

    name = "triton"
    is_moe_lora = False
    prefill_moe_cg_buffers = moe_cg_buffers = prefill_cuda_graph_batch_info = None

    def __init__(self, lora: Lora) -> None:
        chosen = (lora.adapters + 1).int()
        ranks = torch.full((lora.spec.adapters + 1,), lora.spec.rank, dtype=torch.int32)
        ranks[0] = 0
        used = torch.zeros_like(ranks)
        used[chosen.unique().long()] = 1
        used[0] = 0
        moe = SimpleNamespace(
            seg_indptr=torch.arange(len(chosen) + 1, dtype=torch.int32),
            req_to_lora=chosen,
            adapter_enabled=used,
            token_lora_mapping=chosen.where(chosen > 0, -1),
        )
        self.info = SimpleNamespace(lora_ranks=ranks, moe_lora_info=moe, has_active_lora=bool(used.any()))

    def get_batch_info(self, layout: Any) -> Any:
        return self.info


def _weights(inputs: ExpertsInputs, lora: Lora) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[adapters + 1, E, ..]: gate's and up's A above each other, B with the scale in it, nothing for no adapter."""
    first, scale = "w13" if inputs.mlp.gated else "w1", scaling(lora.spec)
    a, b, down_a, down_b = (lora.tensors[f"lora.{name}"] for name in (f"{first}.a", f"{first}.b", "w2.a", "w2.b"))
    if inputs.mlp.gated:
        a = torch.cat([a, a], dim=2)
    found = (a, b * scale, down_a, down_b * scale)
    return tuple(torch.cat([torch.zeros_like(part[:1]), part]).contiguous() for part in found)  # type: ignore[return-value]


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Inside, pairs are aligned without the kernel that is compiled for a GPU as it is called, and deltas are added by
    the function of torch and Triton that is registered as an operator for CUDA alone.
    """
    if not device.is_cpu():
        yield
        return
    kernel = import_module(_KERNEL)
    with (
        patch.object(import_module(_RUNNERS), "_is_xpu", True),
        patch.object(kernel, "fused_moe_lora", kernel._fused_moe_lora),
    ):
        yield
