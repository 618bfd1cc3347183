"""SGLang's routed-experts capturer: the sizes that it takes from a config, and rows in the layouts of its servers.

Which layout arrives is a server setting, so that a session's capturer is made when the first rows come:
"local" without attention-DP; "concatenated" with it, each rank with all ranks' rows; "sequence_shard" with DeepEP,
whose tokens are scattered over the ranks of attention-TP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.engine import CaptureShape, CaptureSpec, InputError, Rows, called_by_engine
from moe_conformance.engines.sglang import device, models, runtime
from moe_conformance.engines.sglang.refusing import refusals
from moe_conformance.errors import Unsupported

LAYOUTS = frozenset({"local", "concatenated", "sequence_shard", "padding_rows"})
# Rows beyond a batch that its padding to the size of a graph may have.
_PADDING = 128


def recorder() -> Any:
    """The module of RoutedExpertsCapturer. Raises ImportError where SGLang has none."""
    return import_module("sglang.srt.state_capturer.routed_experts")


def capture_shape(config: Any, side: Literal["worker", "reader"]) -> CaptureShape:
    """Sizes of the buffer on the device, or on the host, of a capturer of the config's real ModelConfig."""
    runtime.start()
    _, values = models.as_published(config if isinstance(config, dict) else config.to_dict())
    with models.folder_of(values) as folder:
        found = models.model_config(folder)
    capturer = _capturer(found, 1)
    cache = capturer.device_cache if side == "worker" else capturer.host_cache
    _, layers, top_k = cache.buffer.shape
    return CaptureShape(int(layers), int(top_k), None)


def _capturer(model_config: Any, rows: int) -> Any:
    """A capturer of so many rows, whose memory on the host is not pinned where no GPU is."""
    base = import_module("sglang.srt.state_capturer.base")

    def plain(shape: Any, dtype: torch.dtype, **_: Any) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    schedule = SimpleNamespace(chunked_prefill_size=rows)
    with (
        patch.object(base, "ALLOC_MEMORY_FUNCS", {"cpu": plain} if device.is_cpu() else base.ALLOC_MEMORY_FUNCS),
        patch.object(recorder(), "get_schedule", lambda: schedule),
    ):
        return recorder().RoutedExpertsCapturer(
            model_config, num_tokens=rows, max_running_requests=rows, num_fused_shared_experts=0, device=device.kind()
        )


class Session:
    """A capturer of one worker."""

    def __init__(self, spec: CaptureSpec) -> None:
        runtime.start()
        self.spec = spec
        self._capturer: Any = None
        self._kind = ""
        self._rows = Rows("local", (0,))

    def capture(self, layer_id: int, ids: Tensor, rows: Rows) -> None:
        self._rows = rows
        with self._served(rows), refusals():
            if self._capturer is None:
                text = SimpleNamespace(num_experts_per_tok=self.spec.top_k, num_hidden_layers=self.spec.layers)
                config = SimpleNamespace(hf_text_config=text)
                self._capturer = _capturer(config, self.spec.max_tokens + _PADDING)
            self._capturer.capture(layer_id, ids.int())

    def read(self, num_tokens: int) -> Tensor:
        """[n, L, K]: what the scheduler finds in the host's cache behind a step."""
        if self._capturer is None:
            raise Unsupported("capture_session: SGLang makes its capturer for a layout of rows, and none has come")
        slots = torch.arange(num_tokens, device=device.kind())
        batch = SimpleNamespace(
            out_cache_loc=slots, out_cache_loc_virtual=None, global_num_tokens_cpu=list(self._rows.counts)
        )
        with self._served(self._rows):
            self._capturer.on_forward_end(batch, False, None)
        pool = SimpleNamespace(req_to_token=slots[None])
        found: Tensor = self._capturer.get_topk(0, num_tokens + 1, pool)
        return found

    def close(self) -> None:
        if self._capturer is not None:
            self._capturer.destroy()

    @contextlib.contextmanager
    def _served(self, rows: Rows) -> Iterator[None]:
        """A server with the settings that send rows so, and this rank's place in it."""
        if rows.kind == "sequence_gathered":
            raise Unsupported("SGLang's servers send no rows that are gathered with each slice's padding")
        if rows.kind == "sequence_shard" and rows.valid_rows is not None:
            raise Unsupported(
                "SGLang pads a batch before it scatters its tokens: no rank's slice has padding of its own"
            )
        if self._capturer is not None and rows.kind != self._kind:
            raise Unsupported("capture_session: the layout of rows is a setting of SGLang's server, for all its steps")
        self._kind = rows.kind
        spec, rec = self.spec, recorder()
        attention_dp = spec.dp_size > 1
        values = {
            "tp_size": spec.dp_size * spec.tp_size, "tp_rank": spec.dp_rank * spec.tp_size + spec.tp_rank,
            "attn_tp_size": spec.tp_size, "attn_tp_rank": spec.tp_rank, "attn_dp_size": spec.dp_size,
            "attn_dp_rank": spec.dp_rank, "num_dp_ranks": spec.dp_size, "moe_tp_size": spec.dp_size * spec.tp_size,
            "moe_tp_rank": spec.dp_rank * spec.tp_size + spec.tp_rank, "tp_group": _group(spec.dp_size * spec.tp_size),
            "attn_tp_group": _group(spec.tp_size, rows),
        }  # fmt: skip
        with contextlib.ExitStack() as stack:
            stack.enter_context(runtime.placed(values))
            stack.enter_context(patch.object(rec, "is_dp_attention_enabled", lambda: attention_dp))
            scattered = rows.kind == "sequence_shard" or (attention_dp and rows.kind == "local")
            stack.enter_context(patch.object(rec, "_is_scattered_a2a_backend", lambda: scattered))
            yield


def _group(size: int, rows: Rows | None = None) -> Any:
    """A process group of so many ranks, whose only collective here is the case's own."""

    @called_by_engine
    def all_gather_into_tensor(output: Tensor, given: Tensor) -> None:
        if size == 1:
            output.copy_(given)
            return
        if rows is None or rows.gather is None:
            raise InputError("rows: got no gather, want one; this capturer calls all_gather_into_tensor")
        output.copy_(rows.gather(given))

    return SimpleNamespace(**{**vars(runtime.GROUP), "world_size": size}, all_gather_into_tensor=all_gather_into_tensor)
