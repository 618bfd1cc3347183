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
        each = range(inputs.answers_each)
        tokens = self.tokens(inputs, tuple(tuple(row) for row in model.tokens for _ in each))
        routed = self.routed(tuple(rows for rows in as_stored(model) for _ in each), inputs)
        return Generated(tokens, routed if inputs.routed else None)

    def tokens(self, inputs: GenerateInputs, tokens: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tokens

    def routed(self, routed: Routed, inputs: GenerateInputs) -> Routed:
        return routed


class RoutesOfTheTokenBefore(Serves):
    def routed(self, routed: Routed, inputs: GenerateInputs) -> Routed:
        return tuple(rows.roll(1, 0) for rows in routed)


class RoutesOfAnotherRequest(Serves):
    def routed(self, routed: Routed, inputs: GenerateInputs) -> Routed:
        first, second, *others = routed
        rows = second.clone()
        rows[33:] = first[33 : len(rows)]
        return first, rows, *others


class RouteOfTheLastToken(Serves):
    def routed(self, routed: Routed, inputs: GenerateInputs) -> Routed:
        return tuple(rows[[*range(len(rows)), -1]] for rows in routed)


class RoutesInBytes(Serves):
    def routed(self, routed: Routed, inputs: GenerateInputs) -> Routed:
        return tuple(rows % 256 for rows in routed)


class ServesThePrefixsOwner(Serves):
    """The cache of a prefix is taken for that of the whole request."""

    def tokens(self, inputs: GenerateInputs, tokens: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return (tokens[0], tokens[0], *tokens[2:])


class LosesAChunk(Serves):
    """A prompt that is split is answered as if its last part were missing."""

    def tokens(self, inputs: GenerateInputs, tokens: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(row[1:] + row[:1] for row in tokens) if inputs.step_tokens else tokens


class DrawsTheSecond(Serves):
    """The second answer of a request is drawn, though one candidate is left."""

    def tokens(self, inputs: GenerateInputs, tokens: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(row[1:] + row[:1] if number % inputs.answers_each else row for number, row in enumerate(tokens))


class LosesWhatWasInterrupted(Serves):
    """A request that is interrupted goes on without what it had."""

    def tokens(self, inputs: GenerateInputs, tokens: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return (*tokens[:-1], tokens[-1][:4] + tokens[-1][:4]) if inputs.cache_tokens else tokens


class RoutesOfAnInterruptedRequest(Serves):
    """Of a request that is interrupted, rows from before are kept under the places that it has afterwards."""

    def routed(self, routed: Routed, inputs: GenerateInputs) -> Routed:
        return (*routed[:-1], routed[-1].roll(3, 0)) if inputs.cache_tokens else routed


class TakesTheWithdrawnsPlace(Serves):
    """The requests behind one that is withdrawn move up, and so do their experts."""

    def tokens(self, inputs: GenerateInputs, tokens: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return (tokens[0], tokens[2], tokens[3], tokens[1]) if inputs.withdrawn else tokens


class RanksAddTwice(Serves):
    """What every rank has is added once a rank."""

    def tokens(self, inputs: GenerateInputs, tokens: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(row[::-1] for row in tokens) if inputs.ranks > 1 else tokens


class ShiftsNarrowRoutes(Serves):
    """In bfloat16 each row is the one before."""

    def routed(self, routed: Routed, inputs: GenerateInputs) -> Routed:
        return tuple(rows.roll(1, 0) for rows in routed) if inputs.dtype == "bfloat16" else routed


_PLACES = "rows_stand_in_their_places_in_a_narrow_dtype"
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
    Mutant(
        DrawsTheSecond,
        "determinism-state",
        "draws the second answer of a request",
        ("generate-qwen3-moe-twice", _TOKENS),
    ),
    Mutant(
        LosesWhatWasInterrupted,
        "determinism-state",
        "answers anew what was interrupted half-way",
        ("generate-qwen3-moe-alike-preempted", _TOKENS),
    ),
    Mutant(
        RoutesOfAnInterruptedRequest,
        "capture-replay",
        "shifts the experts of a request that was interrupted",
        ("generate-qwen3-moe-alike-preempted-routed", _ROUTED),
    ),
    Mutant(
        TakesTheWithdrawnsPlace,
        "determinism-state",
        "moves requests up behind one that is withdrawn",
        ("generate-qwen3-moe-withdrawn", _TOKENS),
    ),
    Mutant(
        RanksAddTwice,
        "determinism-state",
        "computes otherwise with two ranks",
        ("generate-qwen3-moe-two-ranks", _TOKENS),
    ),
    Mutant(
        ShiftsNarrowRoutes,
        "capture-replay",
        "returns the experts of the token before in bfloat16",
        ("generate-qwen3-moe-bf16-places", _PLACES),
    ),
)
