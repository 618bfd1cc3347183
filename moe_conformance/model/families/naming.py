"""How checkpoints name the tensors of an MoE layer and lay them out, as records say it.

Names are relative to a decoder layer; {e} stands for the number of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

# How the part of a canonical tensor is laid out in the file; arrange.py says what each means.
Op = Literal["transposed", "interleaved", "stacked", "row", "padded", "apart", "apart_columns", "apart_interleaved"]

# Which numbers an expert's tensors have.
Numbered = Literal["routed", "second", "identity"]


@dataclass(frozen=True)
class Piece:
    """One tensor of a checkpoint layer.

    pattern: its name. target: the canonical tensor it is part of; "vision." before it where a layer has a second set
    of experts. half: the gate rows (0) or the up rows (1) of the target; None for all. ops: from that part to what is
    stored, in order. experts: which numbers {e} takes: the routed experts' own; "second", those that follow E others;
    "identity", those behind the routed ones, which compute nothing and are not read. row: which row of the stored
    tensor it is, of `rows`.
    """

    pattern: str
    target: str
    half: int | None = None
    ops: tuple[Op, ...] = ()
    experts: Numbered = "routed"
    row: int = 0
    rows: int = 1

    def __post_init__(self) -> None:
        strangers = [op for op in self.ops if op not in get_args(Op)]
        if strangers or self.experts not in get_args(Numbered):
            got = strangers[0] if strangers else self.experts
            raise ValueError(
                f"{self.pattern}: got {got!r}, want ops of {', '.join(get_args(Op))}, and experts of "
                f"{', '.join(get_args(Numbered))}"
            )


Pieces = tuple[Piece, ...]


@dataclass(frozen=True)
class Stack:
    """A stack of layers: its path in the file, the infix between a layer's number and the names, the canonical prefix.

    width: config key of its experts' width, where it is not that of the described layers.
    """

    path: str = "layers"
    inner: str = ""
    canonical: str = "layers"
    width: str = ""


@dataclass(frozen=True)
class Names:
    """written: as `save_pretrained` writes them. read: spellings that are read as well, the modules' own included.
    published: patterns of `written` -> how those who published the family spell that tensor.
    prefix: before the path of the stack. identity_written: identity experts have tensors nevertheless.
    second_width: config key of a list whose entry 1 is the width of a second set of experts. once_transposed: packed
    experts are transposed in checkpoints that transformers 4 wrote. prefixes: by model type of a wrapper, what stands
    before the stack there. alone_as_modules: the text model by itself writes its modules' own names.
    """

    written: Pieces
    read: Pieces = ()
    prefix: str = "model."
    stacks: tuple[Stack, ...] = (Stack(),)
    identity_written: bool = False
    second_width: str = ""
    once_transposed: bool = False
    prefixes: Mapping[str, str] = field(default_factory=dict)
    alone_as_modules: bool = False
    published: Mapping[str, str] = field(default_factory=dict)

    @property
    def pieces(self) -> Pieces:
        return tuple(dict.fromkeys(self.written + self.read))


def one(pattern: str, target: str, *ops: Op) -> Pieces:
    return (Piece(pattern, target, ops=ops),)


def mlp(block: str, target: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Pieces:
    """Gate, up and down projection of one MLP, or with {e} in `block` of each expert."""
    return (
        Piece(f"{block}.{gate}.weight", f"{target}.w13", half=0),
        Piece(f"{block}.{up}.weight", f"{target}.w13", half=1),
        Piece(f"{block}.{down}.weight", f"{target}.w2"),
    )


def each(block: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Pieces:
    return mlp(f"{block}.{{e}}", "experts", gate, up, down)


def packed(block: str, *ops: Op, first: str = "gate_up_proj", second: str = "down_proj") -> Pieces:
    return (Piece(f"{block}.{first}", "experts.w13", ops=ops), Piece(f"{block}.{second}", "experts.w2", ops=ops))


def not_gated(block: str, target: str, up: str = "up_proj", down: str = "down_proj", bias: bool = False) -> Pieces:
    found = one(f"{block}.{up}.weight", f"{target}.w1") + one(f"{block}.{down}.weight", f"{target}.w2")
    if bias:
        found += one(f"{block}.{up}.bias", f"{target}.b1") + one(f"{block}.{down}.bias", f"{target}.b2")
    return found


def shared(block: str) -> Pieces:
    return mlp(block, "shared")


W1_W3_W2 = ("w1", "w3", "w2")
EACH, PACKED = each("mlp.experts"), packed("mlp.experts")
ROUTER = one("mlp.gate.weight", "router.proj")
BIAS = one("mlp.gate.e_score_correction_bias", "router.selection_bias")
SHARED_EXPERTS = shared("mlp.shared_experts")
SHARED_GATED = shared("mlp.shared_expert") + one("mlp.shared_expert_gate.weight", "shared.gate")

BLOCK_SPARSE = each("block_sparse_moe.experts", *W1_W3_W2) + one("block_sparse_moe.gate.weight", "router.proj")
GRANITE_MLP = one("shared_mlp.input_linear.weight", "shared.w13") + one("shared_mlp.output_linear.weight", "shared.w2")
GRANITE_MODULES = packed("block_sparse_moe.experts") + one("block_sparse_moe.router.weight", "router.proj")
GRANITE = Names(
    packed("block_sparse_moe", first="input_linear.weight", second="output_linear.weight")
    + one("block_sparse_moe.router.layer.weight", "router.proj")
    + GRANITE_MLP,
    GRANITE_MODULES,
)
GEMMA = Names(
    packed("experts")
    + one("router.proj.weight", "router.proj")
    + one("router.scale", "router.scale")
    + one("router.per_expert_scale", "router.per_expert_scale")
    + mlp("mlp", "dense")
    + one("pre_feedforward_layernorm.weight", "dense.norm")
    + one("post_feedforward_layernorm_1.weight", "dense.sum_norm")
    + one("pre_feedforward_layernorm_2.weight", "experts.norm")
    + one("post_feedforward_layernorm_2.weight", "experts.sum_norm"),
    # One tensor an expert (quantised checkpoints), and the block's former and converters' names for it.
    each("experts")
    + each("moe.experts")
    + packed("moe")
    + packed("moe.experts")
    + one("moe.per_expert_scale", "router.per_expert_scale"),
)


def gpt_oss(*ops: Op) -> Names:
    """gpt-oss keeps gate and up rows interleaved and everything transposed; ops: those of the gate and up rows."""
    return Names(
        one("mlp.experts.gate_up_proj", "experts.w13", *ops, "transposed")
        + one("mlp.experts.gate_up_proj_bias", "experts.b13", *ops)
        + one("mlp.experts.down_proj", "experts.w2", "transposed")
        + one("mlp.experts.down_proj_bias", "experts.b2")
        + one("mlp.router.weight", "router.proj")
        + one("mlp.router.bias", "router.bias"),
    )


def second(pieces: Pieces) -> Pieces:
    """The same experts' tensors for a second set of experts, numbered on from the first."""
    return tuple(replace(piece, target=f"vision.{piece.target}", experts="second") for piece in pieces)


def of_vision(pieces: Pieces) -> Pieces:
    return tuple(
        replace(piece, pattern=piece.pattern.replace("text_moe", "vision_moe"), target=f"vision.{piece.target}")
        for piece in pieces
    )
