"""Small whole models: config, names and shapes of tensors, requests, and what the model itself answers.

Each is a file in golden/whole-models, made by tools/whole_models.py: an uncached forward of transformers' own class, at
values where no two tokens and no two experts are nearly tied, so that every correct engine answers the same in float32.
Values of tensors are not kept: they follow from the names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moe_conformance.judging.draws import default_seed_only
from moe_conformance.judging.goldens import FOLDER
from moe_conformance.judging.inputs import normal

PLACE = FOLDER / "whole-models"


@dataclass(frozen=True)
class WholeModel:
    """tensors: shape by name, as on the hub; with a star in a name, the first size is of so many tensors. routed: of
    each request [P + G - 1, MoE layers, K], ids ascending."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, list[int]]
    moe_layers: list[int]
    prompts: list[list[int]]
    tokens: list[list[int]]
    routed: list[list[list[list[int]]]]

    @property
    def new_tokens(self) -> int:
        return len(self.tokens[0])

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def experts(self) -> int:
        """Routed ones of a layer, under the name that the family's config has."""
        return next(int(self.config[key]) for key in ("num_experts", "num_local_experts") if key in self.config)

    def shapes(self) -> Iterator[tuple[str, list[int]]]:
        for name, shape in self.tensors.items():
            if "*" not in name:
                yield name, shape
            else:
                yield from ((name.replace("*", str(number)), shape[1:]) for number in range(shape[0]))

    def write(self, folder: Path) -> None:
        """As published: config.json and one safetensors file, float32."""
        from safetensors.torch import save_file

        (folder / "config.json").write_text(json.dumps(self.config))
        values = {name: value(self.name, name, shape) for name, shape in self.shapes()}
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def whole_model(name: str) -> WholeModel:
    """Raises Unjudged where the run has another seed than the one that its values are of."""
    default_seed_only("what whole models answer is known")
    return _whole_model(name)


@cache
def _whole_model(name: str) -> WholeModel:
    return WholeModel(name, **json.loads((PLACE / f"{name}.json").read_text(encoding="utf-8")))


def value(model: str, name: str, shape: list[int]) -> Any:
    """A tensor's values: matrices that keep the size of what they are given, norms about 1, biases about 0."""
    values = normal(tuple(shape), f"{model} {name}")
    if len(shape) >= 2:
        return values if "embed" in name else values * (1.5 / math.sqrt(shape[-1]))
    return 1 + 0.1 * values if "norm" in name else 0.1 * values
