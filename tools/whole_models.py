"""Makes golden/whole-models: `python tools/whole_models.py [NAME...]`, with the transformers of ci/constraints.txt.

The answers are those of the model's own class without a cache, one forward per token, in float64. Requests are drawn
until float32, and weights that are off by a ten thousandth, give the same answers: then no correct engine answers
differently.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moe_conformance.engine import RECORDS, integers, normal
from moe_conformance.engines.transformers.block_routing import Tap
from moe_conformance.engines.transformers.loading import blocks
from moe_conformance.model.families.configs import TO_COMPUTE, Size, filled
from moe_conformance.suites.generate.models import PLACE, WholeModel

VOCABULARY, NEW_TOKENS, OFF = 96, 8, 1e-4
# Sizes that engines' kernels take: heads of 32, widths of multiples of 32.
SIZES = {
    **TO_COMPUTE,
    Size.LAYERS: 3,
    Size.HIDDEN: 64,
    Size.HEADS: 2,
    Size.EXPERTS: 8,
    Size.TOP_K: 2,
    Size.WIDTH: 32,
    Size.DENSE: 96,
    Size.SHARED: 64,
    Size.TYPES: ["dense", "sparse", "sparse"],
    Size.ATTENTION: ["full_attention"] * 3,
}
COMMON = {"vocab_size": VOCABULARY, "head_dim": 32, "max_position_embeddings": 128, "tie_word_embeddings": False}
# name -> model type and what its config has otherwise. With 300 experts an id does not fit a byte.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "qwen2-moe": ("qwen2_moe", {"decoder_sparse_step": 1, "mlp_only_layers": [0]}),
    "qwen3-moe": ("qwen3_moe", {"decoder_sparse_step": 1, "mlp_only_layers": [0], "norm_topk_prob": True}),
    "qwen3-moe-e300": ("qwen3_moe", {"decoder_sparse_step": 1, "mlp_only_layers": [1], "num_experts": 300}),
    "gemma4": ("gemma4_text", {"hidden_size_per_layer_input": 0, "global_head_dim": 32}),
    "granitemoe": ("granitemoe", {}),
    "qwen3-moe-alike": ("qwen3_moe", {"decoder_sparse_step": 1, "mlp_only_layers": [0], "norm_topk_prob": True}),
    "olmoe": ("olmoe", {"eos_token_id": None, "pad_token_id": None}),
}


def main(names: list[str]) -> None:
    PLACE.mkdir(exist_ok=True)
    for name in names or MODELS:
        (PLACE / f"{name}.json").write_text(json.dumps(made(name), separators=(",", ":"), sort_keys=True) + "\n")
        print(name)


def made(name: str) -> dict[str, Any]:
    model_type, own = MODELS[name]
    record = RECORDS[model_type]
    keys = filled({"model_type": model_type, **record.beside, **record.config}, SIZES) | COMMON | own
    config = AutoConfig.for_model(**keys)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for part in (model.config, model.generation_config):
        part.eos_token_id = None
    tensors, published = _published(model)
    found = {"config": published, "tensors": tensors}
    with tempfile.TemporaryDirectory() as folder:
        WholeModel(name, published, tensors, [], [], [], []).write(Path(folder))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
        return found | _answers(name, model.eval())


def _published(model: Any) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Shapes by name, and the config, as save_pretrained writes them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        config = json.loads((Path(folder) / "config.json").read_text())
    config.pop("transformers_version", None)
    return _folded(shapes), config


def _folded(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Tensors of single experts become one name, with a star in place of the expert's number."""
    found: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        starred = re.sub(r"(?<=experts\.)\d+(?=\.)", "*", name)
        if starred == name:
            found[name] = shape
        else:
            found[starred] = [found.get(starred, [0])[0] + 1, *shape]
    return found


def _answers(name: str, model: Any) -> dict[str, Any]:
    layers = [int(block.prefix.split(".")[1]) for block in blocks(model)]
    for attempt in range(200):
        prompts = _prompts(f"{name} {attempt}", name.endswith("-alike"))
        want = [_answer(model, prompt) for prompt in prompts]
        varied = all(len(set(tokens)) > NEW_TOKENS // 2 for tokens, _ in want)
        if varied and all(others == want for others in _otherwise(model, prompts)):
            tokens, routed = [tokens for tokens, _ in want], [routed for _, routed in want]
            return {"moe_layers": layers, "prompts": prompts, "tokens": tokens, "routed": routed}
    raise SystemExit(f"{name}: no requests found whose answers do not hang on roundings; draw more, or other values")


def _prompts(seed: str, alike: bool) -> list[list[int]]:
    """One of 40 tokens, one with its first 33 and others behind, one of a single token, one of 9; or four of 30."""
    if alike:
        return integers((4, 30), seed, VOCABULARY).tolist()
    first, second, third, fourth = (
        integers((length,), f"{seed} {length}", VOCABULARY).tolist() for length in (40, 6, 1, 9)
    )
    return [first, first[:33] + second, third, fourth]


def _answer(model: Any, prompt: list[int]) -> tuple[list[int], list[list[list[int]]]]:
    """The new tokens, and the experts of each position: [P + G - 1, MoE layers, K], ascending."""
    ids = list(prompt)
    with torch.no_grad(), ExitStack() as stack:
        taps = [stack.enter_context(Tap(block.moe, None)) for block in blocks(model)]
        for _ in range(NEW_TOKENS):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
        seen: list[Tensor] = [tap.seen.ids.sort().values for tap in taps if tap.seen is not None]
    return ids[len(prompt) :], torch.stack(seen, dim=1).tolist()


def _otherwise(model: Any, prompts: list[list[int]]) -> Iterator[Any]:
    """The answers in float32, and of weights that are a little off."""
    yield [_answer(copy.deepcopy(model).float(), prompt) for prompt in prompts]
    for number in range(3):
        other = copy.deepcopy(model)
        for name, tensor in other.state_dict().items():
            if tensor.is_floating_point():
                tensor.mul_(1 + OFF * normal(tuple(tensor.shape), f"off {number} {name}").to(tensor.dtype))
        yield [_answer(other, prompt) for prompt in prompts]


if __name__ == "__main__":
    main(sys.argv[1:])
