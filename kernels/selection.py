"""The largest of a row by 64-bit keys: one order of ties, infinities and NaN in all three modes of Triton.

Comparing values is not portable: max() of a row with NaN differs between modes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sort_keys(x, WIDTH: tl.constexpr):
    """int64 keys [rows, WIDTH] in the order of x: NaN highest, -0 equal to 0, ties to the first column.

    All keys are distinct and above TAKEN.
    """
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    # Below zero, larger bits mean a smaller number.
    bits = tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FC00000)
    return (bits.to(tl.int64) << 32) | (WIDTH - 1 - tl.arange(0, WIDTH)).to(tl.int64)[None, :]


TAKEN = tl.constexpr(-(2**63))


@triton.jit
def place_of(key, WIDTH: tl.constexpr):
    """The column of a key."""
    return WIDTH - 1 - (key & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def value_of(key):
    """Inverse of sort_keys: the float32 value of a key."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def best_groups(
    compared,
    mask,
    group_mask,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP2: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """compared [BLOCK_T, BLOCK_G * BLOCK_S], with group_mask for experts that are in none of the best groups."""
    keys = tl.reshape(sort_keys(compared, BLOCK_G * BLOCK_S), [BLOCK_T, BLOCK_G, BLOCK_S])
    best = tl.max(keys, axis=2)  # [BLOCK_T, BLOCK_G]
    group_score = value_of(best)
    if TOP2:
        group_score += value_of(tl.max(tl.where(keys == best[:, :, None], TAKEN, keys), axis=2))
    group_keys = tl.where(tl.arange(0, BLOCK_G)[None, :] < GROUPS, sort_keys(group_score, BLOCK_G), TAKEN)
    chosen = tl.zeros([BLOCK_T, BLOCK_G], tl.int1)
    for _ in range(TOP_GROUPS):
        taken = group_keys == tl.max(group_keys, axis=1)[:, None]
        chosen = chosen | taken
        group_keys = tl.where(taken, TAKEN, group_keys)
    kept = tl.broadcast_to(chosen[:, :, None], [BLOCK_T, BLOCK_G, BLOCK_S])
    kept = tl.reshape(kept, [BLOCK_T, BLOCK_G * BLOCK_S])
    return tl.where(kept | (mask == 0), compared, group_mask)
