"""The transformers families whose classes stand behind the routing and layer stages."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from moe_conformance.errors import Unsupported


@dataclass(frozen=True)
class Family:
    """Names of a family's classes, and of its config keys where they are not the usual ones.

    block: the module that is the whole MoE layer, "" where there is none. projection: the router's [E, H] parameter.
    """

    folder: str
    config: str
    router: str
    experts: str
    block: str = ""
    projection: str = "weight"
    num_experts: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    intermediate: str = "moe_intermediate_size"
    activation: str = "hidden_act"

    def get(self, name: str) -> Any:
        """One of the classes. Raises Unsupported where the installed transformers has none of that name."""
        kind = "configuration" if name == self.config else "modeling"
        try:
            return getattr(import_module(f"transformers.models.{self.folder}.{kind}_{self.folder}"), name)
        except (ImportError, AttributeError) as error:
            raise Unsupported(f"transformers: this version has no {name} in models/{self.folder}") from error

    def has(self, *names: str) -> bool:
        try:
            return all(self.get(name) for name in names)
        except Unsupported:
            return False

    def has_layer(self) -> bool:
        return self.has(self.config, self.router, self.experts, *([self.block] if self.block else []))

    def make_config(self, experts: int, top_k: int, hidden: int, **others: Any) -> Any:
        """A config of these sizes. One head, as some configs want hidden to be a multiple of the heads; one layer, as
        validating their lists of layers takes most of the time."""
        sizes = {self.num_experts: experts, self.top_k: top_k, "hidden_size": hidden}
        single = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
        return self.get(self.config)(**sizes, **single, **others)


# softmax, top-k, no renormalisation, weights in float32; the block adds a shared expert and has a scale.
DEEPSEEK_V2 = Family(
    folder="deepseek_v2",
    config="DeepseekV2Config",
    router="DeepseekV2TopkRouter",
    experts="DeepseekV2Experts",
    block="DeepseekV2Moe",
    num_experts="n_routed_experts",
)

# softmax, top-k, renormalised, weights in float32; the block has neither shared expert nor scale.
MIXTRAL = Family(
    folder="mixtral",
    config="MixtralConfig",
    router="MixtralTopKRouter",
    experts="MixtralExperts",
    block="MixtralSparseMoeBlock",
    num_experts="num_local_experts",
    intermediate="intermediate_size",
)

# Mixtral's routing (and 1e-20 in the denominator) with DeepSeek V2's shared expert and scale.
MISTRAL_LARGE4 = Family(
    folder="mistral_large4",
    config="MistralLarge4TextConfig",
    router="MistralLarge4TextTopkRouter",
    experts="MistralLarge4TextExperts",
    block="MistralLarge4TextMoE",
    num_experts="n_routed_experts",
)

# softmax, top-k, renormalised, per-expert scale; router and experts hang on the decoder layer.
GEMMA4 = Family(
    folder="gemma4",
    config="Gemma4TextConfig",
    router="Gemma4TextRouter",
    experts="Gemma4TextExperts",
    projection="proj.weight",
    top_k="top_k_experts",
    activation="hidden_activation",
)
