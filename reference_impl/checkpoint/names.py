"""What each model family's checkpoints call the tensors of an MoE layer, and how they lay them out.

Source: the weight conversions, modeling files and real `save_pretrained` folders of transformers 5.23. Names are those
within a decoder layer; {e} stands for the number of an expert. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from moe_conformance.errors import ConfigError
from moe_conformance.model.families.families import NESTED, NESTED_LAST, PARENTS
from moe_conformance.model.families.scope import Scope, levels, model_type_of, plain
from moe_conformance.quote import plainly

# How the part of a canonical tensor is laid out in the file; arrange.py says what each means.
Op = Literal["transposed", "interleaved", "stacked", "row", "padded", "apart", "apart_columns", "apart_interleaved"]


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
    experts: Literal["routed", "second", "identity"] = "routed"
    row: int = 0
    rows: int = 1


Pieces = tuple[Piece, ...]


@dataclass(frozen=True)
class Stack:
    """A stack of layers: its path in the file, what stands between a layer's number and the names, canonical prefix.

    width: config key of its experts' width, where it is not that of the described layers.
    """

    path: str = "layers"
    inner: str = ""
    canonical: str = "layers"
    width: str = ""


@dataclass(frozen=True)
class Names:
    """written: as `save_pretrained` writes them. read: spellings that are read as well, the modules' own included.
    prefix: before the path of the stack. unread: config key of how many identity experts have tensors all the same.
    second_width: config key of a list whose entry 1 is the width of a second set of experts. once_transposed: packed
    experts lie transposed where transformers 4 wrote them.
    """

    written: Pieces
    read: Pieces = ()
    prefix: str = "model."
    stacks: tuple[Stack, ...] = (Stack(),)
    unread: str = ""
    second_width: str = ""
    once_transposed: bool = False

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


MIXTRAL_MLP = ("w1", "w3", "w2")
EACH, PACKED = each("mlp.experts"), packed("mlp.experts")
ROUTER = one("mlp.gate.weight", "router.proj")
BIAS = one("mlp.gate.e_score_correction_bias", "router.selection_bias")
SHARED = shared("mlp.shared_experts")
SHARED_GATED = shared("mlp.shared_expert") + one("mlp.shared_expert_gate.weight", "shared.gate")

PLAIN = Names(EACH + ROUTER, PACKED)
QWEN_SHARED = Names(EACH + ROUTER + SHARED_GATED, PACKED)
DEEPSEEK = Names(EACH + ROUTER + BIAS + SHARED, PACKED)
NO_BIAS = Names(EACH + ROUTER + SHARED, PACKED)
NO_SHARED = Names(EACH + ROUTER + BIAS, PACKED)
MIXTRAL = Names(
    each("block_sparse_moe.experts", *MIXTRAL_MLP) + one("block_sparse_moe.gate.weight", "router.proj"),
    PACKED + ROUTER,
)
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


ERNIE_VL_MODULES = (
    packed("mlp.text_moe.experts")
    + one("mlp.text_moe.gate.weight", "router.proj")
    + one("mlp.text_moe.gate.moe_statics.e_score_correction_bias", "router.selection_bias", "row")
)
NLLB = tuple(
    Piece(f"ffn.experts.expert_{{e}}.{name}", f"experts.{target}")
    for name, target in (("fc1.weight", "w1"), ("fc1.bias", "b1"), ("fc2.weight", "w2"), ("fc2.bias", "b2"))
)
ZAYA_ROUTER = {
    "balancing_biases": "router.selection_bias",
    "down_proj.weight": "router.down.weight",
    "down_proj.bias": "router.down.bias",
    "router_states_scale": "router.state_scale",
    "router_mlp.norm.weight": "router.norm",
    "router_mlp.fc1.weight": "router.fc1.weight",
    "router_mlp.fc1.bias": "router.fc1.bias",
    "router_mlp.fc2.weight": "router.fc2.weight",
    "router_mlp.fc2.bias": "router.fc2.bias",
    "router_mlp.out_proj.weight": "router.proj",
}
INKLING = (
    one("mlp.experts.w13_weight", "experts.w13", "interleaved")
    + one("mlp.experts.w2_weight", "experts.w2")
    + ROUTER
    + one("mlp.gate.bias", "router.selection_bias")
)
INKLING_SHARED = (
    Piece("mlp.shared_experts.gate_proj", "shared.w13", half=0, ops=("apart",)),
    Piece("mlp.shared_experts.up_proj", "shared.w13", half=1, ops=("apart",)),
    Piece("mlp.shared_experts.down_proj", "shared.w2", ops=("apart_columns",)),
)
GLOBAL_SCALE = one("mlp.gate.global_scale", "router.global_scale")
LATENT_NEMOTRON = (
    one("mixer.fc1_latent_proj.weight", "latent.in")
    + one("mixer.fc2_latent_proj.weight", "latent.out")
    + one("mixer.fc1_latent_proj.bias", "latent.in_bias")
    + one("mixer.fc2_latent_proj.bias", "latent.out_bias")
)
KIMI = "block_sparse_moe"

FAMILIES: dict[str, Names] = {
    "afmoe": Names(
        EACH + one("mlp.router.gate.weight", "router.proj") + one("mlp.expert_bias", "router.selection_bias") + SHARED,
        PACKED,
    ),
    "aria_text": Names(
        packed("mlp.experts", "transposed", first="fc1.weight", second="fc2.weight")
        + one("mlp.router.weight", "router.proj")
        + SHARED,
        packed("mlp.experts", "transposed"),
    ),
    "axk1": Names(
        DEEPSEEK.written + one("post_mlp_layernorm.weight", "output.norm"),
        PACKED + one("mlp.post_mlp_layernorm.weight", "output.norm"),
    ),
    "axk2": DEEPSEEK,
    "bailing_hybrid": Names(EACH + ROUTER + one("mlp.gate.expert_bias", BIAS[0].target) + SHARED, PACKED + BIAS),
    "beam": NO_SHARED,
    "cohere2_moe": NO_BIAS,
    "dbrx": Names(
        (
            Piece("ffn.experts.mlp.w1", "experts.w13", half=0, ops=("stacked",)),
            Piece("ffn.experts.mlp.v1", "experts.w13", half=1, ops=("stacked",)),
            Piece("ffn.experts.mlp.w2", "experts.w2", ops=("transposed", "stacked")),
            Piece("ffn.router.layer.weight", "router.proj"),
        ),
        prefix="transformer.",
        stacks=(Stack("blocks"),),
    ),
    "deepseek_ocr2_text": NO_BIAS,
    "deepseek_v2": NO_BIAS,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v32": DEEPSEEK,
    "deepseek_v4": Names(
        each("ffn.experts", *MIXTRAL_MLP)
        + one("ffn.gate.weight", "router.proj")
        + one("ffn.gate.bias", "router.selection_bias")
        + one("ffn.gate.tid2eid", "router.table")
        + mlp("ffn.shared_experts", "shared", *MIXTRAL_MLP),
        DEEPSEEK.pieces + one("mlp.gate.tid2eid", "router.table"),
    ),
    "diffusion_gemma_text": GEMMA,
    "doge": Names(
        one("mlp.router_gate.weight", "router.proj")
        + one("mlp.down_embed.weight", "experts.w1", "stacked")
        + one("mlp.up_embed.weight", "experts.w2", "transposed", "stacked")
        + mlp("mlp", "dense"),
    ),
    "dots1": DEEPSEEK,
    "dots3_note_text": DEEPSEEK,
    "dots3_note_vision_encoder": Names(
        each("mlp.experts", "fc1", "fc3", "fc2")
        + one("mlp.gate_weight", "router.proj")
        + one("mlp.router_bias", "router.selection_bias"),
        PACKED + ROUTER + one("mlp.e_score_correction_bias", "router.selection_bias"),
        prefix="",
        stacks=(Stack("blocks"),),
    ),
    "ernie4_5_moe": Names(
        EACH + ROUTER + one("mlp.moe_statics.e_score_correction_bias", "router.selection_bias", "row") + SHARED,
        PACKED + one("mlp.gate.moe_statics.e_score_correction_bias", "router.selection_bias", "row"),
    ),
    "ernie4_5_vl_moe_text": Names(
        EACH
        + second(EACH)
        + one("mlp.gate.weight", "router.proj", "transposed")
        + one("mlp.gate.weight_1", "vision.router.proj", "transposed")
        + tuple(
            Piece("mlp.moe_statics.e_score_correction_bias", target, ops=("row",), row=row, rows=2)
            for row, target in enumerate(("router.selection_bias", "vision.router.selection_bias"))
        )
        + SHARED,
        ERNIE_VL_MODULES + of_vision(ERNIE_VL_MODULES),
        second_width="moe_intermediate_size",
    ),
    "exaone_moe": Names(
        EACH + ROUTER + one("mlp.e_score_correction_bias", "router.selection_bias") + SHARED, PACKED + BIAS
    ),
    "flex_olmo": PLAIN,
    "flint": Names(EACH + ROUTER + shared("mlp.shared_expert"), PACKED),
    "gemma4_text": GEMMA,
    "glm4_moe": DEEPSEEK,
    "glm4_moe_lite": DEEPSEEK,
    "glm4v_moe_text": DEEPSEEK,
    "glm5_next_text": DEEPSEEK,
    "glm_moe_dsa": DEEPSEEK,
    "gpt_oss": gpt_oss("interleaved"),
    "granitemoe": GRANITE,
    "granitemoe_swa": Names(GRANITE_MODULES + GRANITE_MLP),
    "granitemoehybrid": GRANITE,
    "granitemoeshared": GRANITE,
    "hunyuan_v1_moe": Names(EACH + one("mlp.gate.wg.weight", "router.proj") + shared("mlp.shared_mlp"), PACKED),
    "hy_v3": Names(
        EACH
        + one("mlp.router.gate.weight", "router.proj")
        + one("mlp.expert_bias", "router.selection_bias")
        + shared("mlp.shared_mlp"),
        PACKED + ROUTER + one("mlp.e_score_correction_bias", "router.selection_bias") + SHARED,
    ),
    "hy_v4": Names(PACKED + ROUTER + BIAS + mlp("mlp.shared_experts", "shared", gate="linear_gate"), SHARED),
    "inkling2_text": Names(INKLING, PACKED + BIAS),
    "inkling_text": Names(
        INKLING
        + GLOBAL_SCALE
        + one("mlp.shared_experts.shared_w13_weight", "shared.w13", "apart_interleaved")
        + one("mlp.shared_experts.shared_w2_weight", "shared.w2", "apart_columns"),
        PACKED + BIAS + INKLING_SHARED,
    ),
    "jamba": Names(
        each("feed_forward.experts") + one("feed_forward.router.weight", "router.proj"), packed("feed_forward.experts")
    ),
    "jetmoe": Names(
        packed("mlp", first="input_linear.weight", second="output_linear.weight")
        + one("mlp.router.layer.weight", "router.proj")
        + one("mlp.bias", "output.bias"),
    ),
    "kimi_linear": Names(
        each("block_sparse_moe.experts", *MIXTRAL_MLP)
        + one("block_sparse_moe.gate.weight", "router.proj")
        + one("block_sparse_moe.gate.e_score_correction_bias", "router.selection_bias")
        + shared("block_sparse_moe.shared_experts"),
        PACKED + ROUTER + BIAS + SHARED,
    ),
    "kolibri1": Names(EACH + ROUTER + one("moe.router.expert_bias", "router.selection_bias") + SHARED, PACKED + BIAS),
    "laguna": Names(
        EACH
        + ROUTER
        + one("mlp.experts.e_score_correction_bias", "router.selection_bias")
        + shared("mlp.shared_expert"),
        PACKED + BIAS + SHARED,
    ),
    "lfm2_moe": Names(
        each("feed_forward.experts", *MIXTRAL_MLP)
        + one("feed_forward.gate.weight", "router.proj")
        + one("feed_forward.expert_bias", "router.selection_bias"),
        packed("feed_forward.experts"),
    ),
    "llama4_text": Names(
        packed("feed_forward.experts", "transposed")
        + one("feed_forward.router.weight", "router.proj")
        + shared("feed_forward.shared_expert"),
    ),
    # transformers writes gate and up rows for the identity experts too, which nothing reads.
    "longcat_flash": Names(
        EACH
        + tuple(replace(piece, experts="identity") for piece in EACH[:2])
        + one("mlp.router.classifier.weight", "router.proj")
        + one("mlp.router.e_score_correction_bias", "router.selection_bias"),
        (replace(PACKED[0], ops=("padded",)), PACKED[1]),
        unread="zero_expert_num",
    ),
    "mellum": PLAIN,
    "mimo_v2_flash": NO_SHARED,
    "minimax": MIXTRAL,
    "minimax_m2": Names(
        MIXTRAL.written + one("block_sparse_moe.e_score_correction_bias", "router.selection_bias"),
        MIXTRAL.read + one("mlp.e_score_correction_bias", "router.selection_bias"),
    ),
    "minimax_m3_vl_text": Names(
        MIXTRAL.written
        + one("block_sparse_moe.e_score_correction_bias", "router.selection_bias")
        + shared("block_sparse_moe.shared_experts"),
        PACKED
        + ROUTER
        + BIAS
        + one("mlp.shared_experts.gate_up_proj.weight", "shared.w13")
        + one("mlp.shared_experts.down_proj.weight", "shared.w2"),
    ),
    "mistral4": Names(PACKED + ROUTER + SHARED),
    "mistral_large4_text": Names(
        each("experts", *MIXTRAL_MLP)
        + one("gate.weight", "router.proj")
        + mlp("shared_experts", "shared", *MIXTRAL_MLP),
        PACKED + ROUTER + SHARED + shared("shared_experts"),
    ),
    "mixtral": MIXTRAL,
    "muse_spark_text": Names(
        PACKED
        + ROUTER
        + BIAS
        + one("mlp.pre_expert_proj.weight", "latent.in")
        + one("mlp.pre_expert_norm.weight", "latent.norm")
        + one("mlp.post_expert_proj.weight", "latent.out")
        + one("mlp.experts.post_expert_norm.weight", "experts.output_norm"),
    ),
    "nemotron_h": Names(
        not_gated("mixer.experts.{e}", "experts")
        + one("mixer.gate.weight", "router.proj")
        + one("mixer.gate.e_score_correction_bias", "router.selection_bias")
        + not_gated("mixer.shared_experts", "shared", bias=True)
        + LATENT_NEMOTRON,
        one("mixer.experts.up_proj", "experts.w1") + one("mixer.experts.down_proj", "experts.w2"),
        prefix="backbone.",
    ),
    "nllb-moe": Names(
        NLLB + one("ffn.router.classifier.weight", "router.proj") + one("ffn.router.classifier.bias", "router.bias"),
        stacks=(Stack("decoder.layers"), Stack("encoder.layers", canonical="encoder.layers", width="encoder_ffn_dim")),
    ),
    "olmoe": PLAIN,
    "openai_privacy_filter": gpt_oss(),
    "phimoe": Names(MIXTRAL.written, PACKED + one("mlp.router.weight", "router.proj")),
    "qwen2_moe": QWEN_SHARED,
    "qwen3_5_moe_text": QWEN_SHARED,
    "qwen3_moe": PLAIN,
    "qwen3_next": QWEN_SHARED,
    "qwen3_omni_moe_talker_text": Names(PACKED + ROUTER + SHARED_GATED, EACH),
    "qwen3_omni_moe_text": PLAIN,
    "qwen3_vl_moe_text": Names(PACKED + ROUTER, once_transposed=True),
    "qwen4_exp_text": QWEN_SHARED,
    "solar_open": DEEPSEEK,
    "step3p5": Names(
        (
            Piece("moe.gate_proj.weight", "experts.w13", half=0),
            Piece("moe.up_proj.weight", "experts.w13", half=1),
            Piece("moe.down_proj.weight", "experts.w2"),
            Piece("moe.gate.weight", "router.proj"),
            Piece("moe.router_bias", "router.selection_bias"),
            *shared("share_expert"),
        ),
        PACKED + ROUTER + BIAS + SHARED,
    ),
    "switch_transformers": Names(
        not_gated("mlp.experts.expert_{e}", "experts", "wi", "wo")
        + one("mlp.router.classifier.weight", "router.proj")
        + one("mlp.router.classifier.bias", "router.bias"),
        prefix="",
        stacks=(
            Stack("decoder.block", "layer.2."),
            Stack("encoder.block", "layer.1.", canonical="encoder.layers"),
        ),
    ),
    "unlimited_ocr_text": NO_BIAS,
    "zaya": Names(PACKED + tuple(Piece(f"mlp.gate.{name}", target) for name, target in ZAYA_ROUTER.items())),
}

# What stands before the stack where the config's own model type is not the family's.
PREFIXES = {
    "aria": "language_model.model.",
    "diffusion_gemma": "model.decoder.",
    "gemma4": "model.language_model.",
    "glm4v_moe": "model.language_model.",
    "glm5_next": "model.language_model.",
    "inkling2": "model.llm.",
    "inkling2_text": "model.llm.",
    "inkling_mm_model": "model.llm.",
    "llama4": "language_model.model.",
    "minimax_m3_vl": "language_model.model.",
    "mistral_large4": "",
    "muse_spark": "model.language_model.",
    "qwen3_5_moe": "model.language_model.",
    "qwen3_omni_moe": "thinker.model.",
    "qwen3_vl_moe": "model.language_model.",
    "qwen4_exp": "model.language_model.",
}
# Text models that write their modules' own names, other than within their multimodal model.
AS_MODULES = ("inkling_text", "minimax_m3_vl_text")
# Every prefix that is read; whatever stands under another is no part of the language model.
READ_PREFIXES = (
    "",
    "model.",
    "model.llm.",
    "model.language_model.",
    "language_model.",
    "language_model.model.",
    "backbone.",
    "transformer.",
    "model.decoder.",
    "thinker.model.",
)


def family_of(config: Mapping[str, Any]) -> tuple[str, Scope]:
    """The key in FAMILIES for a config.json, and the level of it that describes the experts."""
    root = model_type_of(plain(config))
    for path, level in [*levels(config, NESTED), *levels(config, NESTED_LAST)]:
        own = model_type_of(level) or root
        for name in (own, f"{own}_text", PARENTS.get(own, "")):
            if name in FAMILIES:
                return name, Scope(level, path, root or own)
    raise ConfigError(
        f"model_type: got {plainly(root) or 'none'}, whose checkpoint names are not known, "
        f"want one of {', '.join(FAMILIES)}"
    )


def names_of(config: Mapping[str, Any]) -> Names:
    """How a model of this config.json writes its tensors."""
    model_type = model_type_of(plain(config))
    found = FAMILIES[family_of(config)[0]]
    if model_type in AS_MODULES:
        renamed = {piece.target for piece in found.read}
        kept = tuple(piece for piece in found.written if piece.target not in renamed)
        found = replace(found, written=found.read + kept, read=found.written)
    return replace(found, prefix=PREFIXES.get(model_type, found.prefix))
