"""SGLang in this process: server arguments, one rank, and groups of one. Nothing here asks for a version number."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance.engine import called_by_engine
from moe_conformance.engines.sglang import device, stand_ins
from moe_conformance.errors import Unavailable, Unsupported

# Ranks and groups that a model asks for; a release that lacks one is not told of it.
RANKS = (
    "attn_cp_rank", "attn_dp_rank", "attn_tp_rank", "moe_dp_rank", "moe_ep_rank", "moe_tp_rank", "pp_rank", "tp_rank",
)  # fmt: skip
GROUPS = (
    "attn_cp_group", "attn_tp_group", "moe_dp_group", "moe_ep_group", "moe_tp_group", "pp_group",
    "shared_experts_tp_group", "tp_group", "world_group",
)  # fmt: skip


def release() -> str:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@called_by_engine
def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


# Stands for every process group: collectives of one rank give back what they are given.
GROUP = SimpleNamespace(
    world_size=1, rank_in_group=0, rank=0, local_rank=0, ranks=[0], first_rank=0, last_rank=0, is_first_rank=True,
    is_last_rank=True, use_symmetric_memory=False, pynccl_comm=None,
    device_group=SimpleNamespace(rank=lambda: 0, size=lambda: 1), cpu_group=None,
    all_reduce=_same, all_gather=_same, reduce_scatter=_same, broadcast=_same,
)  # fmt: skip
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")


@functools.cache
def start() -> None:
    """Publish server arguments and the place of one rank, once a process, before anything else imports sglang.

    Raises Unavailable where a package is absent that it imports, and in a release that keeps these otherwise.
    """
    stand_ins.install()
    try:
        from sglang.srt.runtime_context import get_context

        torch.set_grad_enabled(False)
        get_context().override_server_args(device=device.kind()).install()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sglang"):
            raise Unavailable(
                f"sglang {release()} keeps its state otherwise than this adapter knows: {error}"
            ) from error
        raise Unavailable(f"sglang imports {error.name}, which is absent: pip install {error.name}") from error
    except Unsupported as error:  # a release that calls what has a stand-in, as soon as it is imported
        raise Unavailable(f"sglang {release()}: {error}") from error
    _held().__enter__()


@functools.cache
def _held() -> contextlib.AbstractContextManager[None]:
    """The place of one rank, which lasts as long as the process: nothing leaves it, and the cache keeps it."""
    return placed({name: 0 for name in RANKS} | {name: GROUP for name in GROUPS})


@contextlib.contextmanager
def placed(values: Mapping[str, Any]) -> Iterator[None]:
    """Inside, this process has these ranks, sizes and groups; what a release does not know is not told."""
    from sglang.srt import runtime_context

    of_today = getattr(runtime_context, "_parallel_fields", None)
    known = of_today() if of_today else runtime_context._PARALLEL_FIELDS
    with contextlib.ExitStack() as stack:
        told = {name: value for name, value in values.items() if name in known}
        stack.enter_context(runtime_context.get_parallel().override(**told))
        if of_today is None:  # to 0.5.20 some of it is read where the groups are made
            for module, attribute, value in _where_made(values):
                stack.enter_context(patch.object(module, attribute, value))
        yield


def _where_made(values: Mapping[str, Any]) -> Iterator[tuple[Any, str, Any]]:
    """The variables of these groups, and of the place in attention-DP: _TP for tp_group, _ATTN_DP_RANK."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers import dp_attention

    for name, value in values.items():
        module = parallel_state if name.endswith("_group") else dp_attention
        attribute = f"_{name.removesuffix('_group').upper()}"
        if hasattr(module, attribute):
            yield module, attribute, value


@contextlib.contextmanager
def building(dtype: torch.dtype) -> Iterator[None]:
    """Inside, SGLang's modules are made in this dtype, on the device that it computes on."""
    start()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device.kind()):
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def as_rank(ep: tuple[int, int] = (0, 1), tp: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """Inside, this process is that rank of so many among which experts, or the width of each, are divided.

    Ranks of experts are outermost, as in SGLang's own groups.
    """
    start()
    (ep_rank, ep_size), (tp_rank, tp_size) = ep, tp
    rank, size = ep_rank * tp_size + tp_rank, ep_size * tp_size
    whole = SimpleNamespace(**{**vars(GROUP), "world_size": size, "rank_in_group": rank})
    values = {
        "tp_size": size, "tp_rank": rank, "moe_ep_rank": ep_rank, "moe_ep_size": ep_size, "moe_tp_rank": tp_rank,
        "moe_tp_size": tp_size, "attn_tp_size": size, "attn_tp_rank": rank, "ep_size": ep_size, "tp_group": whole,
        "attn_tp_group": whole, "moe_ep_group": SimpleNamespace(**{**vars(GROUP), "world_size": ep_size}),
        "moe_tp_group": SimpleNamespace(**{**vars(GROUP), "world_size": tp_size}),
    }  # fmt: skip
    with placed(values):
        yield
