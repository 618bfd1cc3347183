"""vLLM's routed-experts capturer, fed rows in the layouts its forward context speaks of."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.engine import CaptureSpec, Rows, called_by_engine
from moe_conformance.engines.vllm import runtime, sizes
from moe_conformance.errors import InputError, Unsupported


def row_kinds() -> frozenset[str]:
    """The layouts that this release's runner sends to a capturer that it binds.

    A capturer without data-parallel counts is bound only where the experts' kernel exchanges tokens itself, so that it
    gets this rank's rows. One that knows tensor-parallel ranks is bound under sequence parallelism, too: there the
    runner sends a rank's slice where the kernel exchanges tokens, and every rank's slices where it does so itself,
    whether or not the capturer can tell the latter from the former.
    """
    from vllm.forward_context import DPMetadata

    kinds = {"local", "padding_rows", "counted_padding"}
    words = _words_of_capturers()
    if "num_tokens_across_dp_cpu" in words:
        kinds.add("concatenated")
    if "tp_size" in words and hasattr(DPMetadata, "sp_local_sizes"):
        kinds |= {"sequence_shard", "sequence_gathered"}
    return frozenset(kinds)


def _words_of_capturers() -> set[Any]:
    """The names that the code of the capturers uses."""
    words: set[Any] = set()
    for name, cls in vars(sizes.recorder()).items():
        if inspect.isclass(cls) and "Capturer" in name:
            for function in vars(cls).values():
                if inspect.isfunction(function):
                    words |= _words(function.__code__)
    return words


def _words(code: CodeType) -> set[Any]:
    nested = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names) | {word for inner in nested for word in _words(inner)}


@functools.lru_cache(maxsize=16)
def model_config(layers: int, top_k: int, experts: int) -> Any:
    """The real ModelConfig of a model of these sizes whose every layer has experts, under the names most models use."""
    values = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": layers,
        "num_experts": experts, "num_experts_per_tok": top_k, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64,
        "intermediate_size": 64, "moe_intermediate_size": 64, "max_position_embeddings": 256,
    }  # fmt: skip
    with runtime.config_folder(values) as folder:
        return runtime.model_config(folder)


class Session:
    """A capturer of one worker. A step ends when it is read: the model runner clears the buffer before the next."""

    def __init__(self, spec: CaptureSpec) -> None:
        runtime.start()
        self.spec = spec
        self.rec = sizes.recorder()
        config = sizes.vllm_config_of(
            model_config(spec.layers, spec.top_k, spec.experts), spec.dp_rank, spec.dp_size, spec.tp_size
        )
        self._stack = contextlib.ExitStack()
        # As large as the largest batch, with the padding to the size of a graph.
        rows = spec.max_tokens + runtime.MAX_TOKENS
        self._capturer = self._stack.enter_context(sizes.capturer(config, rows, spec.tp_rank))
        self._step_is_over = True

    def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
        if rows.kind.startswith("sequence") and self.spec.dp_size == 1:
            raise Unsupported("vLLM splits rows among tensor-parallel ranks with two data-parallel ranks or more only")
        if rows.valid_rows is not None:
            raise Unsupported("vLLM's ranks count their padding among their tokens: no row lies behind all of them")
        with self._begun_step(), self._forward(rows):
            _captured(lambda given: self._capturer.real.capture(layer_id, given), ids)

    @contextlib.contextmanager
    def _begun_step(self) -> Iterator[None]:
        """Clear the buffer for a new step. A capture that raises takes the clearing back: it was not its doing."""
        clear = getattr(self._capturer.real, "clear_buffer", None)
        if clear is None or not self._step_is_over:
            yield
            return
        before = self._capturer.buffer().clone()
        clear()
        try:
            yield
        except Exception:
            written = self._capturer.buffer() != 0
            self._capturer.buffer().copy_(torch.where(written, self._capturer.buffer(), before))
            raise
        self._step_is_over = False

    @contextlib.contextmanager
    def _forward(self, rows: Rows) -> Iterator[None]:
        """The forward context of a step, as the runner of the experts sets it up around the router."""
        from vllm.forward_context import override_forward_context

        split = rows.kind.startswith("sequence")
        with contextlib.ExitStack() as stack:
            metadata = None
            if self.spec.dp_size > 1:
                metadata = _dp_metadata(rows.counts)
                sizes_of = getattr(metadata, "sp_local_sizes", None)
                if sizes_of is not None:
                    stack.enter_context(sizes_of(self.spec.tp_size if split else 1))
            if hasattr(self.rec, "get_tp_group"):
                stack.enter_context(patch.object(self.rec, "get_tp_group", lambda: _group(rows)))
            stack.enter_context(override_forward_context(context(metadata, rows.counts[self.spec.dp_rank])))
            yield

    def read(self, num_tokens: int) -> Tensor:
        """returns [n, L, K]: what the model runner would hand on."""
        self._step_is_over = True
        real = self._capturer.real
        if hasattr(real, "snapshot_routing_data"):
            return real.snapshot_routing_data(num_tokens)
        if hasattr(real, "attn_gid"):
            slots = torch.zeros((real.attn_gid + 1, num_tokens), dtype=torch.int64)
            return real.get_routed_experts(slots, num_tokens).routing_data
        return self._capturer.buffer()[:num_tokens].clone()

    def close(self) -> None:
        self._stack.close()


def _captured(call: Callable[[Tensor], None], ids: Tensor) -> None:
    """On a GPU, where decoding runs as CUDA graphs, the call is one, recorded with other ids than it replays."""
    if not ids.is_cuda:
        call(ids)
        return
    given = ids.clone().zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(given)
    given.copy_(ids)
    graph.replay()


def context(dp_metadata: Any, num_tokens: int) -> SimpleNamespace:
    """What a capturer reads of a forward context. num_tokens: of this rank, with its padding, before they are split."""
    return SimpleNamespace(dp_metadata=dp_metadata, batch_descriptor=SimpleNamespace(num_tokens=num_tokens))


def _dp_metadata(counts: tuple[int, ...]) -> Any:
    from vllm.forward_context import DPMetadata

    tokens = torch.tensor(counts, dtype=torch.int32, device="cpu")
    offered = {"num_tokens_across_dp_cpu": tokens, "max_tokens_across_dp_cpu": tokens.max()}
    names = {item.name for item in dataclasses.fields(DPMetadata)}
    return DPMetadata(**{name: value for name, value in offered.items() if name in names})


def _group(rows: Rows) -> Any:
    """The tensor-parallel group, whose only collective here is the case's own."""

    @called_by_engine
    def all_gather(slice_of_rows: Tensor, dim: int = 0) -> Tensor:
        if rows.gather is None:
            raise InputError(f"rows of kind {rows.kind!r}: got no gather, want one; this capturer calls all_gather")
        return rows.gather(slice_of_rows)

    return SimpleNamespace(all_gather=all_gather)
