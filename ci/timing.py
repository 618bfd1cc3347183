"""Median time of each kernel and of plain torch on this GPU: `python ci/timing.py OUT_FOLDER`.

"graph" is replayed from a CUDA graph, as engines run; "eager" includes the launch from Python. The floor is the bytes
that must move, over the bandwidth that a large copy on this GPU reaches.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.testing import do_bench, do_bench_cudagraph

from moe_conformance.inputs import integers, normal
from moe_conformance.kernels.capture import capture
from moe_conformance.kernels.padding import pad, unpad
from moe_conformance.kernels.routing import gemma4

TOKENS = (1, 64, 4096)
# Gemma 4 26B-A4B routes and captures; Nemotron-3-Nano is padded (2688 to 2816).
EXPERTS, TOP_K, LAYERS, HIDDEN, PADDED = 128, 8, 30, 2688, 2816

Work = tuple[str, Callable[[], object], Callable[[], object], int]


def works(tokens: int) -> list[Work]:
    """Name, kernel, plain torch, bytes that must move."""
    logits = normal((tokens, EXPERTS), "logits").bfloat16().cuda()
    scale = (normal((EXPERTS,), "scale") + 1.5).bfloat16().cuda()
    x = normal((tokens, HIDDEN), "x").bfloat16().cuda()
    wide = pad(x, PADDED)
    ids = integers((tokens, TOP_K), "ids", EXPERTS).int().cuda()
    buffer = torch.zeros(tokens, LAYERS, TOP_K, dtype=torch.uint8, device="cuda")
    rejected = torch.zeros(LAYERS, dtype=torch.int32, device="cuda")

    def torch_route() -> torch.Tensor:
        weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(TOP_K)
        return weights / weights.sum(-1, keepdim=True) * scale[chosen]

    pairs = tokens * TOP_K
    return [
        ("route", lambda: gemma4(logits, TOP_K, scale), torch_route, 2 * logits.numel() + 8 * pairs + 2 * EXPERTS),
        ("pad", lambda: pad(x, PADDED), lambda: torch.nn.functional.pad(x, (0, PADDED - HIDDEN)),
         2 * (x.numel() + wide.numel())),
        ("unpad", lambda: unpad(wide, HIDDEN), lambda: wide[:, :HIDDEN].contiguous(), 4 * x.numel()),
        # torch's copy checks no id.
        ("capture", lambda: capture(ids, 0, tokens, buffer, 3, EXPERTS, rejected), lambda: buffer[:, 3].copy_(ids),
         5 * pairs),
    ]  # fmt: skip


def cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main(out: Path) -> None:
    big = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    bandwidth = 2 * big.numel() / (do_bench(lambda: big.clone(), return_mode="median") * 1e-3)
    rows = []
    for tokens in TOKENS:
        for name, kernel, plain, moved in works(tokens):
            row = {"kernel": name, "tokens": tokens, "floor_us": moved / bandwidth * 1e6}
            for who, call in (("kernel", kernel), ("torch", plain)):
                with torch.cuda.stream(torch.cuda.Stream()):
                    row[f"{who}_graph_us"] = do_bench_cudagraph(call, return_mode="median") * 1e3
                row[f"{who}_eager_us"] = do_bench(call, return_mode="median") * 1e3
            rows.append(row)
    device = torch.cuda.get_device_name()
    facts = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "copy_bytes_per_s": bandwidth}
    out.mkdir(parents=True, exist_ok=True)
    (out / "timing.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    columns = list(rows[0])
    lines = [
        f"{device}, torch {torch.__version__}, triton {triton.__version__}, copy {bandwidth / 1e12:.2f} TB/s; medians.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *(
            "| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()) + " |"
            for row in rows
        ),
    ]
    (out / "timing.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
