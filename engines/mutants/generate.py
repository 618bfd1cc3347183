"""Running engines with one fault: the model's own answers, but for it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from torch import Tensor

from moe_conformance.engine import RECORDS, Generated, GenerateInputs
from moe_conformance.engines.mutants.mutant import Faulty, Mutant
from moe_conformance.protocol.features import words
from moe_conformance.suites.generate.models import PLACE, WholeModel, whole_model
from moe_conformance.suites.generate.served import as_stored

Routed = tuple[Tensor, ...]


@cache
def _every() -> tuple[WholeModel, ...]:
    return tuple(whole_model(Path(file).stem) for file in sorted(PLACE.glob("*.json")))


class Serves(Faulty):
    """Answers as the model does; what is asked for says which it is."""

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        types = {record.model_type for record in RECORDS.values()}
        return {**super().capabilities(), "generate": frozenset(types | words("generate").keys() - {"MODEL_TYPE"})}

    def generate(self, inputs: GenerateInputs) -> Generated:
        model = next(model for model in _every() if tuple(map(tuple, model.prompts)) == inputs.prompts)
        tokens = self.tokens(inputs, tuple(map(tuple, model.tokens)))
        return Generated(tokens, self.routed(as_stored(model)) if inputs.routed else None)

    def tokens(self, inputs: GenerateInputs, tokens: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tokens

    def routed(self, routed: Routed) -> Routed:
        return routed


class RoutesOfTheTokenBefore(Serves):
    def routed(self, routed: Routed) -> Routed:
        return tuple(rows.roll(1, 0) for rows in routed)


class RoutesOfAnotherRequest(Serves):
    def routed(self, routed: Routed) -> Routed:
        first, second, *others = routed
        rows = second.clone()
        rows[33:] = first[33 : len(rows)]
        return first, rows, *others


class RouteOfTheLastToken(Serves):
    def routed(self, routed: Routed) -> Routed:
        return tuple(rows[[*range(len(rows)), -1]] for rows in routed)


class RoutesInBytes(Serves):
    def routed(self, routed: Routed) -> Routed:
        return tuple(rows % 256 for rows in routed)


class ServesThePrefixsOwner(Serves):
    """The cache of a prefix is taken for that of the whole request."""

    def tokens(self, inputs: GenerateInputs, tokens: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return (tokens[0], tokens[0], *tokens[2:])


class LosesAChunk(Serves):
    """A prompt that is split is answered as if its last part were missing."""

    def tokens(self, inputs: GenerateInputs, tokens: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(row[1:] + row[:1] for row in tokens) if inputs.step_tokens else tokens


_TOKENS, _ROUTED = "every_request_gets_its_models_tokens", "every_token_comes_with_its_own_experts"
MUTANTS = (
    Mutant(
        RoutesOfTheTokenBefore,
        "capture-replay",
        "returns the experts of the token before",
        ("generate-qwen3-moe-routed", _ROUTED),
    ),
    Mutant(
        RoutesOfAnotherRequest,
        "capture-replay",
        "returns another request's experts behind a common prefix",
        ("generate-qwen3-moe-routed", _ROUTED),
    ),
    Mutant(
        RouteOfTheLastToken,
        "capture-replay",
        "returns a row for the last token, which nothing was computed for",
        ("generate-qwen3-moe-routed", _ROUTED),
    ),
    Mutant(
        RoutesInBytes,
        "capture-replay",
        "returns 8 bits of an id",
        ("generate-qwen3-moe-e300-routed", _ROUTED),
    ),
    Mutant(
        ServesThePrefixsOwner,
        "determinism-state",
        "answers two requests with a common prefix alike",
        ("generate-qwen3-moe", _TOKENS),
    ),
    Mutant(
        LosesAChunk,
        "determinism-state",
        "loses a part of a prompt that is split",
        ("generate-qwen3-moe-chunked", _TOKENS),
    ),
)
