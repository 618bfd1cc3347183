"""Rows of a bfloat16 product in torch on a CPU with AMX, without our suite: seen in torch 2.13.0 on a Xeon.

Where the inner width is no multiple of 32, a row of NaN makes others NaN: a row is read on into the next one, and what
is beyond its end is multiplied by zeros. Widths of 200, 500 and 1000 show it; float32 and float16 do not.
"""

import torch

for dtype in (torch.bfloat16, torch.float16, torch.float32):
    leaking = []
    for width in (7, 20, 32, 64, 96, 99, 200, 256, 500, 1000, 1024):
        x, weight = torch.ones(33, width, dtype=dtype), torch.ones(14, width, dtype=dtype)
        x[1:] = float("nan")
        if torch.nn.functional.linear(x, weight)[0].isnan().any():
            leaking.append(width)
    print(dtype, "the first row is NaN by the others at inner widths", leaking, "| want none")
