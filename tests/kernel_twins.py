"""Kernels against the reference functions they are twins of: `python kernel_twins.py cpu` or `cuda`.

A program and not a test module, so that one process can interpret (TRITON_INTERPRET=1) and another compile. Prints a
JSON object: the name of each check, and what it raised or null. `--without CHECK ...` leaves checks out.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from moe_conformance import compare
from moe_conformance.errors import InputError
from moe_conformance.inputs import bits, distinct_logits, integers, normal, poison_
from moe_conformance.kernels import capture as capture_kernels
from moe_conformance.kernels import padding, routing
from moe_conformance.kernels.capture import capture
from moe_conformance.reference_impl import capture as reference_capture
from moe_conformance.reference_impl import padding as reference_padding
from moe_conformance.reference_impl import routing as reference_routing
from moe_conformance.tolerance import relative, softmax_weights

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# T, E, K: sizes around the tiles of both modes, the largest of each, and one of everything.
SHAPES = ((1, 1, 1), (3, 7, 5), (5, 8, 8), (63, 60, 4), (65, 128, 8), (2, 257, 9), (9, 512, 22), (3, 1024, 32))
NAN, INF = float("nan"), float("inf")


def same_routing(what: str, logits: Tensor, top_k: int, renormalize: bool, scale: Tensor | None = None) -> None:
    """The kernel's ids are the reference's, and its weights within the bound of both."""
    if scale is None:
        got = routing.softmax_topk(logits, top_k, renormalize)
        want = reference_routing.softmax_topk(logits.cpu().double(), top_k, renormalize)
    else:
        got = routing.gemma4(logits, top_k, scale)
        want = reference_routing.gemma4(logits.cpu().double(), top_k, scale.cpu())
    compare.equal(f"{what}: ids", got.ids, want.ids)
    bound = relative(want.weights, softmax_weights(logits.cpu(), top_k), torch.float32, "routing")
    compare.close(f"{what}: weights", got.weights, want.weights, bound)


def routing_is_the_reference_at_any_shape(device: str) -> None:
    for tokens, experts, top_k in SHAPES:
        for dtype in DTYPES:
            if experts > 256 and dtype == torch.bfloat16:
                continue  # so many values without a tie do not fit
            what = f"{tokens}x{experts} {dtype}"
            logits = distinct_logits(tokens, experts, what, dtype).to(device)
            scale = (normal((experts,), what) + 1.5).to(device, dtype)
            same_routing(what, logits, top_k, renormalize=bool(tokens % 2))
            same_routing(f"gemma4 {what}", logits, top_k, True, scale)


def routing_reads_strided_logits_and_nothing_beside_them(device: str) -> None:
    for dtype in DTYPES:
        room = poison_(torch.empty(2 * 37, 3 * 60 + 5, dtype=dtype))
        logits = room[1::2, 2:182:3]
        logits.copy_(distinct_logits(37, 60, "strided", dtype))
        scales = poison_(torch.empty(120, dtype=dtype))
        scales[::2] = normal((60,), "strided") + 1.5
        same_routing(f"every third column, {dtype}", room.to(device)[1::2, 2:182:3], 4, True, scales.to(device)[::2])
        same_routing(f"transposed, {dtype}", logits.T.contiguous().to(device).T, 4, False)


def routing_breaks_ties_to_the_lowest_id(device: str) -> None:
    for dtype in DTYPES:
        tied = integers((33, 60), "tied", 3, -1).to(dtype) * -1.0  # 0 comes as -0.0 too
        same_routing(f"tied {dtype}", tied.to(device), 9, True)
        same_routing(f"equal {dtype}", torch.full((3, 7), -2.5, dtype=dtype, device=device), 5, True)


def routing_of_no_numbers_is_unique_and_leaves_other_rows_alone(device: str) -> None:
    logits = distinct_logits(8, 60, "no numbers")
    logits[7, 3] = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32)  # a NaN with its sign set
    logits[0], logits[1, 59], logits[2], logits[3, 5], logits[4, 1:], logits[5, ::2] = NAN, NAN, -INF, INF, -INF, NAN
    for top_k in (1, 4, 32):
        for dtype in DTYPES:
            rows = logits.to(dtype)
            got = routing.softmax_topk(rows.to(device), top_k, True)
            want = reference_routing.softmax_topk(rows, top_k, True)
            compare.equal("ids", got.ids, want.ids)
            compare.equal("which weights are NaN", got.weights.isnan().int(), want.weights.isnan().int())
            same_routing("the row of numbers", rows[6:7].to(device), top_k, True)


def routing_of_no_tokens_is_empty(device: str) -> None:
    got = routing.softmax_topk(torch.empty(0, 60, device=device), 4, True)
    compare.same("shapes", (list(got.ids.shape), list(got.weights.shape)), ([0, 4], [0, 4]))


def routing_refuses_what_it_cannot_do(device: str) -> None:
    def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    for what, call, words in (
        ("K > E", lambda: routing.softmax_topk(logits(2, 7), 8, True), ("8", "7")),
        ("K = 0", lambda: routing.softmax_topk(logits(2, 7), 0, True), ("0",)),
        ("K > 32", lambda: routing.softmax_topk(logits(2, 60), 33, True), ("33", "32")),
        ("E > 1024", lambda: routing.softmax_topk(logits(2, 1025), 4, True), ("1025", "1024")),
        ("three dims", lambda: routing.softmax_topk(logits(2, 3, 7), 4, True), ("[2, 3, 7]",)),
        ("integers", lambda: routing.softmax_topk(logits(2, 7, dtype=torch.int32), 4, True), ("int32",)),
        ("short scale", lambda: routing.gemma4(logits(2, 7), 4, logits(6)), ("[6]", "[7]")),
        ("scale of two dims", lambda: routing.gemma4(logits(2, 7), 4, logits(1, 7)), ("[1, 7]",)),
    ):
        compare.same(f"{what}: error", type(compare.refused(what, call, words)), InputError)


def resized_rows_keep_their_bits(device: str) -> None:
    dtypes = (torch.float64, *DTYPES, torch.float8_e4m3fn, torch.int64, torch.int32, torch.uint8, torch.bool)
    for dtype in dtypes:
        x = normal((3, 5, 21), f"resize {dtype}", std=4.0).to(dtype).to(device)
        if dtype in DTYPES:
            x[0, 0, :3] = torch.tensor([NAN, -INF, -0.0])
        for name, view in (
            ("contiguous", x), ("rows", x[:, ::2]), ("columns", x[..., 1::3]), ("transposed", x.transpose(0, 2)),
        ):  # fmt: skip
            columns = view.shape[-1]
            padded = padding.pad(view, columns + 11, 3.0)
            filled = torch.full((*view.shape[:-1], 11), 3.0).to(dtype)
            compare.same(f"{name} {dtype}", padded.dtype, dtype)
            compare.equal(f"pad {name} {dtype}", _bits(padded[..., :columns]), _bits(view))
            compare.equal(f"fill {name} {dtype}", _bits(padded[..., columns:]), _bits(filled))
            compare.equal(f"unpad {name} {dtype}", _bits(padding.unpad(view, columns - 2)), _bits(view[..., :-2]))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8).cpu()


def resizing_is_the_reference_at_any_width(device: str) -> None:
    for rows, columns, width in ((1, 1, 2), (7, 20, 24), (5, 2688, 2816), (4, 1023, 1025), (3, 0, 5), (0, 4, 8)):
        x = normal((rows, columns), f"width {columns}").to(device)
        for fill in (0.0, -1.5, INF, NAN):
            compare.equal(f"pad to {width}", padding.pad(x, width, fill), reference_padding.pad(x, width, fill))
        wide = poison_(torch.empty(rows, width, device=device))
        wide[:, :columns] = x
        compare.equal(f"unpad to {columns}", padding.unpad(wide, columns), x)
    compare.refused("pad", lambda: padding.pad(torch.zeros(2, 9, device=device), 8), ("9", "8"))
    compare.refused("unpad", lambda: padding.unpad(torch.zeros(2, 8, device=device), 9), ("8", "9"))


def capture_is_the_reference(device: str) -> None:
    for ids_dtype in (torch.int32, torch.int64):
        for dtype in (torch.int32, torch.int16, torch.uint8):
            for rows, start, count in ((9, 0, 9), (9, 2, 5), (5, 5, 0), (700, 3, 640)):
                ids = integers((2 * rows, 3), "ids", 256).to(ids_dtype)
                ids[: 2 * start] = torch.iinfo(ids_dtype).min  # another rank's rows are never looked at
                ids[2 * (start + count) :] = 256
                _same_capture(ids[::2], start, count, dtype, 256, device)


def capture_by_several_programs_is_the_reference(device: str) -> None:
    """The check and the copy in two launches, as for more ids than one program holds."""
    with patch.object(capture_kernels, "capture_blocks", lambda *_: {"BLOCK_R": 4, "BLOCK_K": 4}):
        _same_capture(integers((37, 3), "ids", 60), 1, 35, torch.uint8, 60, device)
        refused_ids_change_nothing(device)


def _same_capture(
    ids: Tensor, start: int, count: int, dtype: torch.dtype, experts: int, device: str, rejected: int = 0
) -> None:
    """Every element of buffer and flags as the reference leaves them, what must not be written included."""
    outcomes = []
    for call, place in ((capture, device), (reference_capture.capture, "cpu")):
        buffer = (bits((count + 2, 5, 3), "buffer") % 100).to(dtype).to(place)
        flags = torch.tensor([0, 0, 0, rejected, 0], dtype=torch.int32, device=place)
        call(ids.to(place), start, count, buffer, 3, experts, flags)
        outcomes.append((buffer, flags))
    compare.equal("buffer", outcomes[0][0], outcomes[1][0])
    compare.equal("rejected", outcomes[0][1], outcomes[1][1])


def refused_ids_change_nothing(device: str) -> None:
    for bad in (-1, 60, 2**31 - 1, 2**32 + 5, -(2**63)):
        ids = integers((11, 3), "ids", 60)
        ids[7, 2] = bad
        _same_capture(ids, 1, 9, torch.int16, 60, device)
        _same_capture(ids, 1, 5, torch.int16, 60, device)  # the bad id is another rank's
    _same_capture(integers((11, 3), "ids", 60), 1, 9, torch.int16, 60, device, rejected=4)


def capture_refuses_what_it_cannot_do(device: str) -> None:
    ids = torch.zeros(4, 3, dtype=torch.int64, device=device)
    buffer, flags = torch.zeros(4, 2, 3, dtype=torch.uint8, device=device), torch.zeros(2, dtype=torch.int32)
    flags = flags.to(device)
    for what, arguments, words in (
        ("layer", (ids, 0, 4, buffer, 2, 60, flags), ("layer_id", "2")),
        ("negative layer", (ids, 0, 4, buffer, -1, 60, flags), ("layer_id", "-1")),
        ("rows", (ids, 1, 4, buffer, 0, 60, flags), ("1 to 5", "4 rows")),
        ("negative rows", (ids, -1, 4, buffer, 0, 60, flags), ("-1",)),
        ("K", (ids[:, :2], 0, 4, buffer, 0, 60, flags), ("2",)),
        ("float ids", (ids.float(), 0, 4, buffer, 0, 60, flags), ("float32",)),
        ("narrow buffer", (ids, 0, 4, buffer, 0, 257, flags), ("uint8", "256")),
    ):
        compare.same(what, type(compare.refused(what, lambda a=arguments: capture(*a), words)), InputError)


def offsets_do_not_wrap_at_32_bits(device: str) -> None:
    """Rows 2^30 elements apart, so that the third begins beyond 2^31; memory in between is never touched."""
    far = 2**30 + 1
    logits = torch.empty(2 * far + 7, dtype=torch.float16, device=device).as_strided((3, 7), (far, 1))
    logits.copy_(distinct_logits(3, 7, "far", torch.float16))
    same_routing("far logits", logits, 5, True)
    across = logits.T
    across.copy_(distinct_logits(7, 3, "far", torch.float16))
    same_routing("far experts", across, 2, True)
    x = torch.empty(2 * far + 20, dtype=torch.int8, device=device).as_strided((3, 20), (far, 1))
    x.copy_(integers((3, 20), "far", 100))
    compare.equal("far rows", padding.pad(x, 24), reference_padding.pad(x.cpu(), 24))
    compare.equal("far columns", padding.unpad(x.T, 2), x.T[:, :2])
    x[:, :6] = 77
    buffer = x.as_strided((3, 2, 3), (far, 3, 1))
    capture(
        integers((3, 3), "ids", 60).to(device), 0, 3, buffer, 1, 60, torch.zeros(2, dtype=torch.int32, device=device)
    )
    compare.equal("far tokens", buffer[:, 1], integers((3, 3), "ids", 60))
    compare.equal("their other layer", buffer[:, 0], torch.full((3, 3), 77))


def operators_trace_with_true_shapes(device: str) -> None:
    """torch's own check of a custom operator: schema, fake tensors, mutations declared, aot_autograd."""
    logits, scale = distinct_logits(5, 7, "trace").to(device), normal((7,), "trace").to(device)
    ids = integers((5, 3), "ids", 7).to(device)
    buffer, flags = torch.zeros(5, 2, 3, dtype=torch.int32, device=device), torch.zeros(2, dtype=torch.int32)
    for operator, arguments in (
        (routing._route, (logits, 3, True, scale)),
        (routing._route, (logits, 3, False, None)),
        (padding._pad, (logits, 9, 0.0)),
        (padding._unpad, (logits, 4)),
        (capture_kernels._capture, (ids, 1, 3, buffer, 1, 7, flags.to(device))),
    ):
        torch.library.opcheck(operator, arguments, raise_exception=True)


CHECKS: tuple[Callable[[str], None], ...] = (
    routing_is_the_reference_at_any_shape,
    routing_reads_strided_logits_and_nothing_beside_them,
    routing_breaks_ties_to_the_lowest_id,
    routing_of_no_numbers_is_unique_and_leaves_other_rows_alone,
    routing_of_no_tokens_is_empty,
    routing_refuses_what_it_cannot_do,
    resized_rows_keep_their_bits,
    resizing_is_the_reference_at_any_width,
    capture_is_the_reference,
    capture_by_several_programs_is_the_reference,
    refused_ids_change_nothing,
    capture_refuses_what_it_cannot_do,
    offsets_do_not_wrap_at_32_bits,
    operators_trace_with_true_shapes,
)


def main(device: str, *without: str) -> None:
    outcome: dict[str, str | None] = {}
    for check in (check for check in CHECKS if check.__name__ not in without):
        try:
            check(device)
            outcome[check.__name__] = None
        except Exception:
            outcome[check.__name__] = traceback.format_exc()
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(*(argument for argument in sys.argv[1:] if argument != "--without"))
