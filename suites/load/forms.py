"""Which quantised forms checkpoints are published in, whose config says so how, and how a few families name experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EXPERTS, HIDDEN, WIDTH = 4, 64, 32
_SIZES = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """config: what its config.json has. block: before the names in a layer. router: shapes; canonical: their places.

    packed: gate and up of all experts, and down. split: of one expert, gate, up
    and down. interleaved, transposed: how the packed ones lie. underscored: what belongs to a packed tensor follows its
    name behind an underscore. biases: shapes and canonical names. dense: so many layers have no experts. shared: before
    the names of the shared expert. draft: whether a layer for multi-token prediction follows the model's own.
    """

    config: Mapping[str, Any]
    block: str
    router: Mapping[str, tuple[int, ...]]
    canonical: Mapping[str, str]
    split: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    packed: tuple[str, str] = ("", "")
    interleaved: bool = False
    transposed: bool = False
    underscored: bool = False
    biases: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    dense: int = 0
    shared: str = ""
    draft: bool = False

    def spelled(self, name: str, end: str) -> str:
        return f"{name}{'_' if self.underscored else '.'}{end}" if end else name


FAMILIES: Mapping[str, Family] = {
    "qwen3_moe": Family(
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "moe_intermediate_size": WIDTH,
            "intermediate_size": 96,
            "num_experts": EXPERTS,
            "num_hidden_layers": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        "mlp.",
        {"gate.weight": (EXPERTS, HIDDEN)},
        {"gate.weight": "router.proj"},
    ),
    # Packed by those who publish it, split by quantisers.
    "granitemoe": Family(
        {
            "architectures": ["GraniteMoeForCausalLM"],
            "intermediate_size": WIDTH,
            "num_local_experts": EXPERTS,
            "num_hidden_layers": 1,
        },
        "block_sparse_moe.",
        {"router.layer.weight": (EXPERTS, HIDDEN)},
        {"router.layer.weight": "router.proj"},
        packed=("input_linear", "output_linear"),
    ),
    # A dense layer first, a shared expert beside the routed ones, and a draft layer behind: all stored alike.
    "deepseek_v3": Family(
        {
            "architectures": ["DeepseekV3ForCausalLM"],
            "intermediate_size": 96,
            "moe_intermediate_size": WIDTH,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "num_hidden_layers": 2,
            "num_nextn_predict_layers": 1,
            "norm_topk_prob": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "routed_scaling_factor": 2.5,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
        },
        "mlp.",
        {"gate.weight": (EXPERTS, HIDDEN), "gate.e_score_correction_bias": (EXPERTS,)},
        {"gate.weight": "router.proj", "gate.e_score_correction_bias": "router.selection_bias"},
        dense=1,
        shared="shared_experts.",
        draft=True,
    ),
    "llama4_text": Family(
        {
            "architectures": ["Llama4ForCausalLM"],
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size": WIDTH,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 1,
            "num_hidden_layers": 1,
        },
        "feed_forward.",
        {"router.weight": (EXPERTS, HIDDEN)},
        {"router.weight": "router.proj"},
        packed=("experts.gate_up_proj", "experts.down_proj"),
        transposed=True,
        underscored=True,
        shared="shared_expert.",
    ),
    "gpt_oss": Family(
        {
            "architectures": ["GptOssForCausalLM"],
            "intermediate_size": WIDTH,
            "num_local_experts": EXPERTS,
            "num_hidden_layers": 1,
        },
        "mlp.",
        {"router.weight": (EXPERTS, HIDDEN), "router.bias": (EXPERTS,)},
        {"router.weight": "router.proj", "router.bias": "router.bias"},
        packed=("experts.gate_up_proj", "experts.down_proj"),
        interleaved=True,
        underscored=True,
        biases={
            "experts.gate_up_proj_bias": ((EXPERTS, 2 * WIDTH), "b13"),
            "experts.down_proj_bias": ((EXPERTS, HIDDEN), "b2"),
        },
    ),
}


def _compressed(kind: str, bits: int, number: str, strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": number, "strategy": strategy, "symmetric": True, **more}
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}}


def _torchao(kind: str) -> dict[str, Any]:
    config = {"_data": {"fqn_to_config": {r"re:.*experts.*": {"_data": {}, "_type": kind}}}, "_type": "FqnToConfig"}
    return {"quant_method": "torchao", "quant_type": {"default": config}}


def _quark(dtype: str, scheme: str, **more: Any) -> dict[str, Any]:
    weight = {"dtype": dtype, "qscheme": scheme, "symmetric": True, "is_dynamic": False, **more}
    activations = {"dtype": dtype, "qscheme": scheme, "symmetric": True, "is_dynamic": True, **more}
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": weight, "input_tensors": activations, "bias": None, "output_tensors": None},
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": [],
        "export": {"kv_cache_group": [], "pack_method": "order", "weight_format": "real_quantized"},
    }


_TILES = {"quant_method": "fp8", "weight_block_size": [16, 16]}
_GROUPS = {"group_size": 8}
_OLD = {"bits": 4, "group_size": 8}
_AUTO_ROUND = {"quant_method": "auto-round", **_OLD, "data_type": "int"}
# Form -> format of the codes as engines declare it, and quantization_config.
FORMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "fp8-block": ("fp8_e4m3", {**_TILES, "activation_scheme": "dynamic"}),
    "fp8-block-e8m0": ("fp8_e4m3", {**_TILES, "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}),
    "fp8-channel": ("fp8_e4m3", _compressed("float-quantized", 8, "float", "channel")),
    "fp8-tensor": ("fp8_e4m3", {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "fp8-number": ("fp8_e4m3", _compressed("float-quantized", 8, "float", "tensor")),
    "fp8-rows": ("fp8_e4m3", _quark("fp8_e4m3", "per_channel", ch_axis=0)),
    "fp8-fbgemm": ("fp8_e4m3", {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "fp8-group": ("fp8_e4m3", _compressed("float-quantized", 8, "float", "group", **_GROUPS)),
    "fp8-tensor-halves": ("fp8_e4m3", _compressed("float-quantized", 8, "float", "tensor")),
    "fp8-block-halves": ("fp8_e4m3", {**_TILES, "activation_scheme": "dynamic"}),
    "mxfp8": ("fp8_e4m3", _compressed("mxfp8-quantized", 8, "float", "group", group_size=32)),
    "int8-channel": ("int8", _compressed("int-quantized", 8, "int", "channel")),
    "int4-packed": ("int4", _compressed("pack-quantized", 4, "int", "group", **_GROUPS)),
    "int4-packed-zero": ("int4", _compressed("pack-quantized", 4, "int", "group", **_GROUPS, symmetric=False)),
    "int3-packed-zero": ("int4", _compressed("pack-quantized", 3, "int", "group", **_GROUPS, symmetric=False)),
    "int4-packed-tensor": ("int4", _compressed("pack-quantized", 4, "int", "tensor")),
    "int4-packed-no-order": ("int4", _compressed("pack-quantized", 4, "int", "group", **_GROUPS, actorder="weight")),
    "int4-packed-row": ("int4", _compressed("pack-quantized", 4, "int", "channel")),
    "int4-packed-order": ("int4", _compressed("pack-quantized", 4, "int", "group", **_GROUPS, actorder="group")),
    "int8-packed-zero": ("int8", _compressed("pack-quantized", 8, "int", "group", **_GROUPS, symmetric=False)),
    "int8-packed": ("int8", _compressed("pack-quantized", 8, "int", "group", **_GROUPS)),
    "gptq": ("int4", {"quant_method": "gptq", **_OLD, "desc_act": True, "sym": False, "checkpoint_format": "gptq"}),
    "gptq-v2": (
        "int4",
        {"quant_method": "gptq", **_OLD, "desc_act": True, "sym": False, "checkpoint_format": "gptq_v2"},
    ),
    "gptq-in-order": ("int4", {"quant_method": "gptq", **_OLD, "desc_act": False, "sym": False}),
    "gptq-row": ("int4", {"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": False, "sym": False}),
    "gptq-int8": ("int8", {"quant_method": "gptq", "bits": 8, "group_size": 8, "desc_act": False, "sym": False}),
    "awq": ("int4", {"quant_method": "awq", **_OLD, "version": "gemm", "zero_point": True}),
    "awq-channel": (
        "int4",
        {"quant_method": "awq", "bits": 4, "group_size": -1, "version": "gemm", "zero_point": True},
    ),
    "auto-round": ("int4", _AUTO_ROUND),
    "auto-round-gptqmodel": ("int4", {**_AUTO_ROUND, "packing_format": "auto_round:gptqmodel"}),
    "auto-round-awq": ("int4", {**_AUTO_ROUND, "packing_format": "auto_round:auto_awq"}),
    "torchao-int8": ("int8", _torchao("Int8WeightOnlyConfig")),
    "torchao-fp8": ("fp8_e4m3", _torchao("Float8WeightOnlyConfig")),
    "mxfp4": ("mxfp4", _compressed("mxfp4-pack-quantized", 4, "float", "group", group_size=32)),
    "mxfp4-blocks": ("mxfp4", {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}),
    "nvfp4": ("nvfp4", _compressed("nvfp4-pack-quantized", 4, "float", "tensor_group", group_size=16)),
    "nvfp4-modelopt": ("nvfp4", {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "bnb-nf4": ("nf4", {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "bnb-nf4-plain": ("nf4", {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "bnb-int8": ("int8", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}
# Forms of packed experts alone, each of one family's.
PACKED_ALONE = ("mxfp4-blocks", "fp8-fbgemm", "fp8-tensor-halves", "fp8-block-halves")
# Of these a QuantSpec says nothing: columns in an order of their own, three bits, scales of columns of experts that lie
# transposed, and blocks that know no rows.
NUMBERS_ALONE = frozenset(
    ("gptq", "gptq-v2", "int4-packed-order", "int3-packed-zero", "fp8-fbgemm", "bnb-nf4", "bnb-nf4-plain")
)


def config_of(
    family: str, form: str, left: tuple[str, ...], width: int = WIDTH
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """config.json, and hf_quant_config.json where ModelOpt wrote one. left: modules that were left as they were."""
    said = dict(FORMS[form][1])
    own = {key: width if value == WIDTH else value for key, value in FAMILIES[family].config.items()}
    config = {**_SIZES, "model_type": family, **own, "dtype": "bfloat16"}
    modelopt = None
    if said["quant_method"] == "modelopt":
        algorithm = said["quant_algo"]
        modelopt = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm, "exclude_modules": []}}
    if left and said["quant_method"] != "compressed-tensors":
        said["modules_to_not_convert"] = [name.strip(".") for name in left]
    elif left:
        said["ignore"] = [f"re:.*{name.strip('.').replace('.', r'[.]')}.*" for name in left]
    if form == "fp8-tensor":  # as ModelOpt wrote at first: config.json says nothing
        return config, modelopt
    return {**config, "quantization_config": said}, modelopt
