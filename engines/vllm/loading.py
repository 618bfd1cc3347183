"""Loading of any family: vLLM's default loader into vLLM's own model, and what then lies in its MoE layers.

Of names, the parameter that each tensor ends up in, as a load of tensors that are told apart by their values shows it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from moe_conformance.engine import CheckpointName, Target
from moe_conformance.engines import published, servers
from moe_conformance.engines.vllm import models, quantised, runtime
from moe_conformance.errors import CheckpointError, Unsupported

# By what follows the layer's number, the canonical tensors that vLLM's files alone name so.
CANONICAL: Mapping[str, str] = {
    r"(?:\w+\.)?router_weight": "router.proj",
    r"(?:\w+\.)?router\.global_scale": "router.global_scale",
    r"(?:\w+\.)?fc1_latent_proj\.weight": "latent.in",
    r"(?:\w+\.)?fc2_latent_proj\.weight": "latent.out",
}
# The norm of the whole output, of the families that have one.
NORMS: Mapping[str, Mapping[str, str]] = {"axk1": {r"post_mlp_layernorm\.weight": "output.norm"}}
EXPERTS: Mapping[str, str] = {"w13_weight": "w13", "w2_weight": "w2", "w13_bias": "b13", "w2_bias": "b2"}


@torch.no_grad()
def load(folder: Path) -> Mapping[str, Tensor]:
    """The folder's MoE layers by canonical name, after vLLM's default loader loaded it into a model full of NaN.

    Raises CheckpointError where a parameter of them stays unwritten; what vLLM raises passes through.
    """
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    runtime.start()
    record, values = models.as_published(json.loads((folder / "config.json").read_text()))
    with tempfile.TemporaryDirectory() as scratch:
        own = Path(scratch)
        for file in folder.iterdir():
            if file.name != "config.json":
                (own / file.name).symlink_to(file.resolve())
        (own / "config.json").write_text(json.dumps(published.written(record, values)))
        method, tile = _stored(own, values)
        if method:
            _refuse_stored_shared(own)
        # None of its quantised methods takes activations in float32.
        dtype = torch.bfloat16 if method else torch.float32
        with quantised.any_kernel(method):
            built = models.build(own, dtype, runs=False)
        named = dict(_of_layers(built, record.model_type))
        with models.current(built.config, dtype):
            _excuse(built.model, set(dict(built.model.named_parameters())) - named.keys())
            loader = DefaultModelLoader(LoadConfig(load_format="safetensors", use_tqdm_on_load=False))
            loader.load_weights(built.model, built.config.model_config)
    if method:
        return _numbers(built, named, tile)
    parameters = dict(built.model.named_parameters(remove_duplicate=False))
    if left := [name for name in named if servers.unwritten(parameters[name]).any()]:
        raise CheckpointError(f"load: got NaN in {', '.join(left)}, want every parameter written")
    return {key: _canonical(parameters[name], built, name).detach().clone() for name, key in named.items()}


def _stored(folder: Path, values: Mapping[str, Any]) -> tuple[str, tuple[int, int] | None]:
    """The quant_method of a checkpoint, "" for plain weights; and the tile that has a scale, where it says one."""
    said = values.get("quantization_config") or {}
    if not said and (folder / "hf_quant_config.json").exists():
        said = {"quant_method": "modelopt"}
    tile = said.get("weight_block_size")
    return str(said.get("quant_method", "")), (tile[0], tile[1]) if tile else None


def _refuse_stored_shared(folder: Path) -> None:
    """Linear layers are made as floats here (`quantised.any_kernel`), those of shared experts among them."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as held:
            stored = [n for n in held.keys() if ".shared_expert" in n and not n.endswith((".weight", ".bias"))]  # noqa: SIM118
        if stored:
            raise Unsupported(f"load: {stored[0]}: linear layers are made as floats here, and take no stored weights")


def _numbers(built: models.Built, named: Mapping[str, str], tile: tuple[int, int] | None) -> Mapping[str, Tensor]:
    """As `load` gives them, of a model whose experts lie as codes and scales, and perhaps wider than they are."""
    parameters = dict(built.model.named_parameters(remove_duplicate=False))
    found = {}
    for name, key in named.items():
        end = key.rpartition(".experts.")[2]
        if end not in ("w1", "w13", "w2"):
            rows = quantised.rows_of(_experts_of(built, name)) if end in ("b13", "b2") else {}
            found[key] = _canonical(parameters[name][:, : rows[end]] if rows else parameters[name], built, name).clone()
    for layer in built.moe_layers():
        inner = f"{layer.path}.{layer.inner}.routed_experts"
        for matrix, numbers in quantised.matrices(layer.experts, tile).items():
            found[f"layers.{layer.number}.experts.{matrix}"] = _canonical(numbers, built, f"{inner}.{matrix}_weight")
    if left := [key for key, value in found.items() if value.isnan().any()]:
        raise CheckpointError(f"load: got NaN in {', '.join(left)}, want every parameter written")
    return found


def _excuse(model: nn.Module, names: set[str]) -> None:
    """A folder may have MoE layers alone: for vLLM's own check of what was loaded, the other parameters were."""
    real: Any = model.load_weights

    def load_weights(weights: Any, **kwargs: Any) -> Any:
        loaded = real(weights, **kwargs)
        return None if loaded is None else set(loaded) | names

    model.load_weights = load_weights  # type: ignore[assignment]


def _of_layers(built: models.Built, model_type: str) -> Iterator[tuple[str, str]]:
    table = {**CANONICAL, **NORMS.get(model_type, {})}
    return servers.of_layers(built.model, built.moe_layers(), table, EXPERTS, _is_gated)


def _is_gated(experts: Any) -> bool:
    config = getattr(experts, "moe_config", None)
    return bool(getattr(config, "is_act_and_mul", True))


def _experts_of(built: models.Built, name: str) -> Any:
    """The expert layer that a parameter is of."""
    return next(la.experts for la in built.moe_layers() if name.startswith(f"{la.path}.{la.inner}."))


def _canonical(parameter: Tensor, built: models.Built, name: str) -> Tensor:
    """Gate above up: of the parameters, only those of gpt-oss's activation have their rows in turns."""
    end = name.rpartition(".")[2]
    if end in ("w13_weight", "w13_bias"):
        activation = getattr(_experts_of(built, name), "activation", None)
        if getattr(activation, "value", activation) == "swigluoai":
            return torch.cat((parameter[:, 0::2], parameter[:, 1::2]), dim=1)
    return parameter


@torch.no_grad()
def remap(config: Any, names: Sequence[CheckpointName]) -> Mapping[str, tuple[str | Target, ...]]:
    """The parameter that vLLM's loader writes each tensor to, and which expert and part of it.

    Every tensor has a value of its own throughout; where it lies afterwards is its target.
    """
    runtime.start()
    record, values = models.as_published(config)
    with models.folder_of(record, values) as folder:
        built = models.build(folder, torch.float32, runs=False)
    tensors = servers.told_apart(names)
    with models.current(built.config, torch.float32):
        built.model.load_weights(iter(tensors.items()))
    held = servers.held(built.model)
    found: dict[str, tuple[str | Target, ...]] = {}
    for value, entry in enumerate(names, 1):
        found[entry.name] = tuple(held.get(value) or _alone(built, entry))
    return found


def _alone(built: models.Built, entry: CheckpointName) -> list[str | Target]:
    """The targets of a tensor whose values are changed on the way (SarvamMLA takes the mean off a bias)."""
    servers.clear(built.model)
    tensor = torch.arange(1.0, 1.0 + torch.Size(entry.shape).numel()).reshape(entry.shape)
    with models.current(built.config, torch.float32):
        built.model.load_weights(iter([(entry.name, tensor)]))
    written = {name: ~servers.unwritten(parameter) for name, parameter in built.model.named_parameters()}
    found = [servers.place(name, mask) for name, mask in written.items() if mask.any()]
    if not found:
        raise CheckpointError(f"{entry.name}: got no parameter that it was loaded into, want one")
    return found
