"""Layer cases: shared x latent x padded, at tiny distinct dims, dims that coincide, and dims of real models."""

from __future__ import annotations

from itertools import product
from typing import Any

from moe_conformance.catalogue.case import Case
from moe_conformance.model.specs import LatentSpec, LayerSpec, LogitsSpec, MLPSpec, SharedSpec
from moe_conformance.suites.experts.stored import FORMS
from moe_conformance.suites.route.methods import method

# T tokens, E experts, K of them, H hidden, D latent, F expert and Fs shared intermediate; Dp, Hp, Fp padded widths.
TINY = {"T": 7, "E": 5, "K": 3, "H": 20, "D": 12, "F": 10, "Fs": 14, "Hp": 24, "Dp": 16, "Fp": 16}
# 2F < H and 2F < D, as in Qwen3 (2 x 768 < 2048), Gemma 4 (2 x 704 < 2816) and DeepSeek-V3 (2 x 2048 < 7168): an
# orientation guessed from the larger dim shows here.
NARROW = {**TINY, "F": 5, "Fs": 6, "Fp": 8}
# As torch's product of bfloat16 on a CPU with AMX takes them (findings/torch_amx_rows.py).
WHOLE_TILES = {**NARROW, "H": 64, "D": 64, "F": 32, "Fs": 32}
# Widths that need no padding: nothing is to be cut, and [:-0] is empty.
ALIGNED = {**TINY, "Hp": 20, "Dp": 12, "Fp": 10}
# More tokens than a chunk or a tile has, and not a multiple of one; K far from E and from the small K above.
MANY = {**TINY, "T": 131, "E": 11, "K": 8}
# More experts than 512.
BEYOND_512 = {**NARROW, "E": 896, "K": 16}
# Nemotron-3-Nano as TRT-LLM's NVFP4 experts see it: 2688 and 1856 go to multiples of 256 (vllm#40794).
NANO = {"T": 2, "E": 2, "K": 1, "H": 2688, "D": 1024, "F": 1856, "Fs": 3712, "Hp": 2816, "Dp": 1280, "Fp": 2048}
# gpt-oss: 2880 goes to 3072, and the layer has neither a shared expert nor a latent projection (vllm#40865).
GPT_OSS = {"T": 2, "E": 2, "K": 1, "H": 2880, "D": 0, "F": 2880, "Fs": 0, "Hp": 3072, "Dp": 0, "Fp": 3072}

BOTH = ("padded_hidden", "padded_intermediate")
# Rows of the table of a router that chooses by token id.
VOCABULARY = 48


def _case(name: str, dims: dict[str, int], parts: tuple[str, ...], tier: str = "core", **changes: Any) -> Case:
    """routing: by name as in suites/route/methods.py. experts: fields of MLPSpec; shared: of its MLPSpec or its
    SharedSpec; latent: of LatentSpec. scale: of the routed sum. arguments: how x, logits and tensors are given. quant:
    by name, how the experts are stored."""
    has, latent = set(parts), "latent" in parts
    changes = {
        "routing": "renorm",
        "experts": {},
        "shared": {},
        "latent": {},
        "scale": 2.5,
        "dtype": "float32",
        "tokens": dims["T"],
        "clause": "layer.cut-before-add" if has & set(BOTH) else "layer.sum",
        "arguments": {},
        "padding": 0,
        "quant": None,
        **changes,
    }
    if changes["quant"]:
        changes["quant"] = FORMS[changes["quant"]]
    routing = method(changes["routing"], dims["K"])
    spec = LayerSpec(
        hidden_size=dims["H"],
        num_experts=dims["E"],
        logits=LogitsSpec(),
        routing=routing,
        experts=MLPSpec(dims["F"], **changes["experts"]),
        shared=_shared(dims["Fs"], **changes["shared"]) if "shared" in has else None,
        latent=LatentSpec(dims["D"], **changes["latent"]) if latent else None,
        output_scale=changes["scale"],
        vocab_size=VOCABULARY if routing.selector == "table" else 0,
    )
    return Case(
        "-".join(["layer", name, *(part.replace("_", "-") for part in parts or ("plain",))]),
        stage="layer",
        clause=changes["clause"],
        recipe={
            "spec": spec,
            "tokens": changes["tokens"],
            "dtype": changes["dtype"],
            "padded_hidden": dims["Dp" if latent else "Hp"] if "padded_hidden" in has else None,
            "padded_intermediate": dims["Fp"] if "padded_intermediate" in has else None,
            **{name: changes[name] for name in ("arguments", "padding", "quant") if changes[name]},
        },
        tier=tier,
    )


def _shared(width: int, count: int = 1, combine: Any = "sum", **fields: Any) -> SharedSpec:
    own = {name: fields.pop(name) for name in ("gate", "weighted") if name in fields}
    return SharedSpec(MLPSpec(width, **fields), count, combine=combine, **own)


def _subsets(*names: str) -> list[tuple[str, ...]]:
    return [
        tuple(n for n, on in zip(names, chosen, strict=True) if on) for chosen in product((0, 1), repeat=len(names))
    ]


EIGHT = _subsets("shared", "latent", "padded_hidden")
PADDED = [parts for parts in EIGHT if "padded_hidden" in parts]

_SWIGLU_OAI = {"clamp": "before", "limit": 0.75, "alpha": 1.75, "up_offset": 1.0, "bias": True}
_RELU2 = {"activation": "relu2", "gated": False}

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _sizes(row: str) -> Case:
    """A row is: T, E, K, H, F, tile, dtype, the shared expert's width. Tile: what the kernel's widths are multiples of,
    0 for a kernel of any widths."""
    *sizes, dtype, shared = row.split()
    T, E, K, H, F, tile = map(int, sizes)
    parts = (("shared",) if int(shared) else ()) + (BOTH if tile else ())
    wide = {"Hp": -(-H // tile) * tile, "Fp": -(-F // tile) * tile} if tile else {}
    dims = {"T": T, "E": E, "K": K, "H": H, "F": F, "Fs": int(shared), **wide}
    name = f"sizes-t{T}-e{E}-k{K}-h{H}-f{F}-tile{tile}-{dtype}"
    return _case(name, dims, parts, scale=1.0, dtype=_DTYPES[dtype])


# Each two values of any two columns meet in a row, but for a K beyond E: kernels branch by two sizes at once.
SIZE_CASES = tuple(
    _sizes(row)
    for row in (
        " 1   5  2 20 36  8 fp32  0",
        " 1  24  8 72 32 64 bf16  0",
        " 1  24 10 20 36  0 bf16 14",
        " 1 256  1 64 36 64 fp32  0",
        " 1 256  8 72  7  8 fp16 14",
        " 9   5  1 72 32  0 fp32  0",
        " 9   5  2 64  7 64 bf16 14",
        " 9  24  1 20  7  0 fp16 14",
        " 9  24  8 20 36  8 fp32  0",
        " 9 256 10 20  7 64 bf16  0",
        " 9 256 10 64 36 64 fp16  0",
        "70   5  2 20 32 64 fp16  0",
        "70  24  2 64  7  8 fp32 14",
        "70  24  8 64  7  0 fp32  0",
        "70  24 10 72 32  8 fp32 14",
        "70 256  1 64 32  8 bf16 14",
        "70 256  2 72 36  0 fp32 14",
    )
)

_VALUES = (
    *SIZE_CASES,
    *(_case("tiny", TINY, parts, "smoke" if "padded_hidden" in parts else "core") for parts in EIGHT),
    *(_case("tiny-scale1", TINY, parts, scale=1.0) for parts in EIGHT),
    # Without a scale, for an engine that has none would not be judged here otherwise.
    *(_case("narrow", NARROW, parts, scale=1.0) for parts in EIGHT),
    *(_case("narrow-both", NARROW, (*parts, "padded_intermediate"), scale=1.0) for parts in PADDED),
    *(_case("aligned", ALIGNED, (*parts, "padded_intermediate")) for parts in PADDED),
    *(_case("zero-tokens", TINY, parts, tokens=0) for parts in PADDED),
    *(_case("one-token", TINY, parts, tokens=1) for parts in PADDED),
    *(_case("both", TINY, (*parts, "padded_intermediate")) for parts in PADDED),
    _case("intermediate", TINY, ("shared", "padded_intermediate")),
    _case("gemma4", TINY, ("shared", "padded_hidden"), routing="gemma4", experts={"activation": "gelu_tanh"}),
    _case("gemma4", TINY, (), routing="gemma4", experts={"activation": "gelu_tanh"}, scale=1.0),
    # Which kernel runs, and what it is told of padding, follows from the activation.
    _case("gelu-tanh", TINY, BOTH, experts={"activation": "gelu_tanh"}, scale=1.0),
    _case("gelu-bias", TINY, BOTH, experts={"activation": "gelu", "bias": True}, scale=1.0),
    _case("no-renorm", TINY, ("shared", "padded_hidden"), routing="plain"),
    _case("tiny-bf16", TINY, (), dtype="bfloat16"),
    _case("tiny-bf16", TINY, ("shared", "latent", "padded_hidden"), dtype="bfloat16"),
    # In float16 an engine may return the layer over its scale where there is a shared expert, lest it overflow, and
    # have the decoder layer carry on (vLLM's MoE runner with DeepSeek-V2): not judged.
    _case("tiny-fp16", TINY, ("shared",), dtype="float16", scale=1.0),
    _case("tiny-fp16", TINY, ("latent", "padded_hidden"), dtype="float16"),
    _case("many-tokens", MANY, ("shared", "latent", "padded_hidden")),
    _case("beyond-512", BEYOND_512, (), scale=1.0),
    # Layers of models whose routing or experts are not those above, padded and not.
    *(
        _case(name, dims, parts, routing=routing, experts=experts, shared=experts if name == "relu2" else {}, scale=1.0)
        for name, dims, routing, experts, padded in (
            ("deepseek-v3", {**NARROW, "E": 32, "K": 4}, "deepseek-v3", {}, ("shared", *BOTH)),
            ("deepseek-v2", {**NARROW, "E": 32, "K": 4}, "deepseek-v2", {}, ("shared", *BOTH)),
            ("swiglu-oai", {**NARROW, "K": 4}, "chosen", _SWIGLU_OAI, BOTH),
            ("relu2", {**NARROW, "E": 32, "K": 6}, "deepseek-v3", _RELU2, ("shared", "latent", *BOTH)),
            ("llama4", {**TINY, "K": 1}, "llama4", {"weight_on": "input"}, ("shared", *BOTH)),
        )
        for parts in (tuple(part for part in padded if part not in BOTH), padded)
    ),
    # Parts of models that others have not: a gate on the shared expert (Qwen2-MoE), an average (Cohere2-MoE), norms and
    # biases in and behind the latent width (MuseSpark, Nemotron-H), a clamp of the routed experts alone (DeepSeek-V4).
    *(
        _case(name, dims, parts, **changes)
        for dims, tokens in ((TINY, ""), ({**NARROW, "T": 1}, "-one-token"))
        for name, parts, changes in (
            (f"shared-gate{tokens}", ("shared", "padded_hidden"), {"shared": {"gate": True}}),
            (f"shared-gate{tokens}", ("shared",), {"shared": {"gate": True}}),
            (f"shared-average{tokens}", ("shared",), {"shared": {"combine": "average", "count": 2}}),
            (f"routed-clamp{tokens}", ("shared", *BOTH), {"experts": {"clamp": "before", "limit": 0.75}}),
            (f"latent-norm{tokens}", ("latent", *BOTH), {"latent": {"norm_eps": 0.0625}}),
            (f"latent-bias{tokens}", ("latent", "shared"), {"latent": {"bias": True}}),
            (f"experts-norm{tokens}", ("padded_hidden",), {"experts": {"output_norm": 0.0625}}),
        )
    ),
    # Inkling's router weighs the shared experts, too, with its scale.
    _case(
        "inkling",
        {**TINY, "E": 8},
        ("shared", *BOTH),
        routing="inkling",
        shared={"count": 2, "weighted": True, "weight_on": "w2_input"},
        scale=1.0,
    ),
    # DeepSeek-V4: ids by token id, which every part of a batch that is cut takes along.
    _case("by-token-id", {**NARROW, "E": 32, "K": 4}, ("shared",), routing="deepseek-v4-hash", scale=1.0),
    _case("by-token-id-one-token", {**NARROW, "T": 1, "E": 32, "K": 4}, (), routing="deepseek-v4-hash", scale=1.0),
    _case("nemotron-3-nano", NANO, ("shared", *BOTH), "full"),  # seconds
    _case("nemotron-3-nano-bf16", NANO, ("shared", *BOTH), "full", dtype="bfloat16"),
    _case("nemotron-3-nano-scale1", NANO, ("shared", "padded_hidden"), "full", scale=1.0),
    _case("nemotron-latent", NANO, ("shared", "latent", "padded_hidden"), "full"),
    _case("gpt-oss", GPT_OSS, BOTH, scale=1.0),
)

# What is wrong without padding, too, is told apart from what padding does.
CUT_CASES = tuple(case for case in _VALUES if case.clause == "layer.cut-before-add")
SUM_CASES = tuple(case for case in _VALUES if case.clause == "layer.sum")

# Around stored experts: DeepSeek-V3's router with a limit of the routed experts alone, Nemotron-H's layer at the widths
# of a kernel, and two whose only weight or whose scale is of the layer.
_STORED = {"T": 7, "E": 32, "K": 4, "H": 40, "D": 24, "F": 24, "Fs": 14, "Hp": 48, "Dp": 32, "Fp": 32}
STORED_CASES = (
    *(
        _case(f"stored-{form}-{name}", dims, parts, quant=form, clause="layer.stored-experts", **changes)
        for form in ("fp8-block", "int4-group", "mxfp4", "nvfp4")
        for name, dims, parts, changes in (
            (
                "deepseek-v3",
                _STORED,
                ("shared",),
                {"routing": "deepseek-v3", "experts": {"clamp": "before", "limit": 0.75}, "scale": 1.0},
            ),
            ("deepseek-v2", _STORED, ("shared",), {"routing": "deepseek-v2", "scale": 1.0}),
            ("relu2", _STORED, ("shared", "latent", *BOTH), {"experts": _RELU2, "shared": _RELU2}),
            ("by-token-id", _STORED, (), {"routing": "deepseek-v4-hash", "scale": 1.0}),
        )
    ),
    # gpt-oss: biases, too.
    _case(
        "stored-mxfp4-swiglu-oai",
        _STORED,
        (),
        quant="mxfp4",
        routing="chosen",
        experts=_SWIGLU_OAI,
        scale=1.0,
        clause="layer.stored-experts",
    ),
)

TRACE_CASES = tuple(
    Case(
        case.id.replace("layer-", "trace-", 1),
        stage="layer",
        clause="layer.traceable",
        recipe=case.recipe,
    )
    for case in _VALUES
    if case.id.startswith(("layer-tiny-scale1", "layer-both"))
)

# x, logits and tensors in three layouts at a time; engines that pad x copy it, and those that do not read it as it is.
ARGUMENT_CASES = tuple(
    _case(
        f"arguments-{name}",
        {**NARROW, "T": tokens},
        parts,
        scale=1.0,
        dtype=dtype,
        clause="inputs.strides",
        arguments=dict(zip(("x", "logits", "tensors"), layouts, strict=True)),
        shared={"gate": True} if name == "shared-gate" else {},
    )
    for name, tokens, dtype, parts, layouts in (
        # What reads x beside the experts reads the same strides.
        ("shared-gate", 7, "float32", ("shared",), ("columns", "sliced", "transposed")),
        ("columns", 7, "float32", (), ("columns", "transposed", "sliced")),
        ("transposed", 7, "float32", ("shared",), ("transposed", "sliced", "columns")),
        ("sliced-bf16", 7, "bfloat16", ("padded_hidden",), ("sliced", "columns", "transposed")),
        ("expanded", 7, "float32", ("shared", "latent"), ("expanded", "offset", "contiguous")),
        ("offset-one-token", 1, "float32", (), ("offset", "expanded", "transposed")),
        ("sliced-one-token-bf16", 1, "bfloat16", ("shared",), ("sliced", "sliced", "contiguous")),
    )
)

ORIENTED_CASES = tuple(
    _case(f"oriented-{name}", {**TINY, **dims}, parts, scale=1.0, dtype=dtype, clause="matrices.orientation")
    for name, dims, parts, dtype in (
        ("2f-is-h", {"H": 16, "F": 8}, (), "float32"),
        ("f-is-h", {"H": 16, "F": 16}, (), "bfloat16"),
        ("2f-below-h", {"H": 24, "F": 5}, (), "bfloat16"),
        ("e-is-h", {"E": 16, "H": 16, "F": 6}, (), "float32"),
        ("d-is-h", {"H": 16, "D": 16, "F": 10}, ("latent",), "float32"),
        ("2fs-is-h", {"H": 16, "F": 10, "Fs": 8}, ("shared",), "float32"),
        ("fs-is-h", {"H": 16, "F": 10, "Fs": 16}, ("shared",), "float32"),
        ("all-are-one", {"T": 16, "E": 16, "H": 16, "D": 16, "F": 16, "Fs": 16}, ("shared", "latent"), "float32"),
    )
)

CHUNK_CASES = (
    *(
        _case(
            f"{tokens}-tokens", {**NARROW, "T": tokens}, parts, tier, scale=1.0, dtype=dtype, clause="batches.any-size"
        )
        for tokens, parts, dtype, tier in (
            (65, ("shared",), "float32", "core"),
            (129, (), "float32", "core"),
            (130, ("padded_hidden",), "bfloat16", "core"),
            (257, (), "bfloat16", "core"),
            (1025, ("shared",), "float32", "full"),
        )
    ),
    # Each part takes its own token ids along.
    _case(
        "130-tokens-by-id",
        {**NARROW, "T": 130, "E": 32, "K": 4},
        (),
        routing="deepseek-v4-hash",
        scale=1.0,
        clause="batches.any-size",
    ),
)

PADDING_CASES = tuple(
    _case("padding", {**dims, "T": tokens}, parts, scale=1.0, dtype=dtype, clause="rows.padding", padding=padding)
    for dims, tokens, padding, parts, dtype in (
        (NARROW, 32, 21, (), "float32"),
        (WHOLE_TILES, 8, 7, ("shared",), "bfloat16"),
        (TINY, 32, 13, ("shared", "latent", "padded_hidden"), "float32"),
        (TINY, 16, 3, BOTH, "float32"),
    )
)

_KINDS = ((), ("shared",), ("shared", "latent", "padded_hidden"))
UNCHANGED_CASES = tuple(
    _case(f"unchanged{suffix}", TINY, parts, scale=1.0, dtype=dtype, clause="calls.inputs-unchanged")
    for suffix, dtype, several in (("", "float32", _KINDS), ("-bf16", "bfloat16", _KINDS[:2]))
    for parts in several
)
OWN_MEMORY_CASES = tuple(_case("own-memory", TINY, parts, scale=1.0, clause="outputs.own-memory") for parts in _KINDS)
FAKE_CASES = tuple(
    _case(
        f"fake-{short}",
        TINY,
        parts,
        "full" if short == "fp32" else "core",
        scale=1.0,
        dtype=long,
        clause="layer.fake-dtypes",
    )
    for short, long in (("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16"))
    for parts in (*_KINDS, BOTH)
)
FAR_CASES = (
    _case(
        "far-x", {**TINY, "T": 3}, (), scale=1.0, dtype="bfloat16", clause="inputs.beyond-int32", arguments={"x": "far"}
    ),
    _case("far-logits", {**TINY, "T": 3}, (), scale=1.0, clause="inputs.beyond-int32", arguments={"logits": "far"}),
)

WRITTEN_CASES = tuple(
    _case(
        f"written{suffix}", {**NARROW, "T": tokens}, parts, scale=1.0, dtype=dtype, clause="outputs.written", tier=tier
    )
    for suffix, tokens, dtype, parts, tier in (
        ("-one-token", 1, "float32", (), "smoke"),
        ("-one-token-bf16", 1, "bfloat16", ("shared", "latent"), "core"),
        ("-bf16", 17, "bfloat16", ("latent", *BOTH), "core"),
        ("-no-tokens", 0, "float32", ("shared",), "core"),
        ("-no-tokens-bf16", 0, "bfloat16", (), "core"),
    )
)

# Another layer of the same shape, then a batch of another size, between two calls.
STATE_CASES = (
    *(
        _case("after-others", dims, parts, tier, scale=scale, dtype=dtype, clause="calls.same-result")
        for dims, parts, scale, dtype, tier in (
            (TINY, (), 1.0, "float32", "core"),
            (NARROW, ("shared",), 1.0, "float32", "core"),
            (TINY, ("shared", "latent", "padded_hidden"), 2.5, "float32", "full"),
            (NARROW, BOTH, 1.0, "bfloat16", "full"),
        )
    ),
    *(
        _case("again", TINY, parts, "full" if parts else "core", scale=scale, clause="calls.same-bits")
        for parts, scale in (((), 1.0), (("shared", "latent"), 1.0), (("shared", *BOTH), 2.5))
    ),
)

INVARIANT_CASES = tuple(
    _case("rows-alone", {**NARROW, "T": 18}, parts, scale=1.0, dtype=dtype, clause="rows.batch-invariant")
    for parts, dtype in (((), "float32"), (("shared",), "bfloat16"), (("padded_hidden",), "float32"))
)

CASES = (
    *CUT_CASES,
    *SUM_CASES,
    *STORED_CASES,
    *TRACE_CASES,
    *ARGUMENT_CASES,
    *ORIENTED_CASES,
    *CHUNK_CASES,
    *PADDING_CASES,
    *UNCHANGED_CASES,
    *OWN_MEMORY_CASES,
    *FAKE_CASES,
    *FAR_CASES,
    *WRITTEN_CASES,
    *STATE_CASES,
    *INVARIANT_CASES,
)
