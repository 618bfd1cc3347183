"""What no kernel can beat: the bytes that must move and the products that must be made, over what the device reaches.

Letters: T tokens, K experts a token, R = T K pairs, E experts, `hit` of them with a pair, H hidden, F expert width.
Each tensor counts once, as if caches were perfect; what only one kernel hands to the next counts too, for they are
separate launches.
"""

from __future__ import annotations

from dataclasses import dataclass

from model_shapes import Model

# Bytes of an activation (bfloat16), of an id, and of a weight of routing.
S, ID, FLOAT = 2, 4, 4


@dataclass(frozen=True)
class Rates:
    """Measured on the device: bytes a second, read and written, of a large copy; FLOP a second of a bf16 product."""

    bandwidth: float
    matmul: float


@dataclass(frozen=True)
class Work:
    moved: float
    flops: float = 0.0

    def microseconds(self, rates: Rates) -> float:
        return 1e6 * max(self.moved / rates.bandwidth, self.flops / rates.matmul)


def works(kernel: str, model: Model, tokens: int, hit: float, block: int) -> list[Work]:
    """One entry a launch that must be; their times add up. hit: experts with a pair. block: of align."""
    top_k, experts, hidden, width = model.top_k, model.experts, model.hidden, model.width
    pairs, size, columns = tokens * top_k, model.weight_size, model.columns
    match kernel:
        case "route":  # float32 logits in, ids and weights out, one float32 an expert (bias or scale)
            return [Work(4 * tokens * experts + (ID + FLOAT) * pairs + 4 * experts)]
        case "align":  # ids in; slots out, half a block of each expert padding, and an expert for each block
            return [Work(ID * pairs + ID * (pairs + hit * (block - 1) / 2) * (1 + 1 / block))]
        case "gate_up":  # weights of the experts hit, x, and what enters w2
            moved = hit * model.halves * width * hidden * size + tokens * hidden * S + pairs * width * S
            return [Work(moved, 2 * pairs * hidden * model.halves * width)]
        case "down":  # weights of the experts hit, what enters them, and each pair's output
            moved = hit * width * columns * size + pairs * width * S + pairs * columns * S
            return [Work(moved, 2 * pairs * width * columns)]
        case "combine":  # each pair's output and weight in, a token's sum out
            return [Work(pairs * hidden * S + FLOAT * pairs + tokens * hidden * S, 2 * pairs * hidden)]
        case "capture":  # ids in, a byte or two of each out
            return [Work(pairs * (ID + (1 if experts <= 256 else 2)))]
        case "pad" | "unpad":  # each token at both widths; unpad never reads the padding
            return [Work((hidden + (columns if kernel == "pad" else hidden)) * tokens * S)]
        case "experts":  # align is left out: it is no part of what must be done
            return [work for part in ("gate_up", "down", "combine") for work in works(part, model, tokens, hit, block)]
        case "logits":  # x and the router's weights in, a logit for each expert out
            return [Work((tokens * hidden + experts * hidden + tokens * experts) * S, 2 * tokens * hidden * experts)]
        case _:  # layer
            return [work for part in ("logits", "route", "experts") for work in works(part, model, tokens, hit, block)]
