"""Cases of `replicate`: which copies there are, and which rows are real."""

from __future__ import annotations

from typing import Any

from moe_conformance.catalogue.case import Case


def _replicate(name: str, copies: tuple[int, ...], tokens: int, tier: str = "core", **recipe: Any) -> tuple[Case, ...]:
    """For the choice and for the load. padding: rows behind the real ones, whose ids are as legal as any.

    dropped: of 20 ids, so many are -1.
    """
    recipe = {"E": 6, "K": 3, "T": tokens, "padding": 5, "dropped": 0, "copies": copies, **recipe}
    return tuple(
        Case(f"replicate-{what}-{name}", stage="replicate", clause=f"replicate.{what}", recipe=recipe, tier=tier)
        for what in ("choice", "load")
    )


REPLICATE = (
    *_replicate("two-copies", (0, 1, 2, 3, 4, 5, 2, 5), 33, "smoke"),
    *_replicate("one-copy-each", (0, 1, 2, 3, 4, 5), 33),
    *_replicate("moved", (4, 0, 5, 2, 3, 1, 0, 0, 2), 33),
    *_replicate("many-of-last", (5, 5, 0, 1, 5, 2, 5, 3, 5, 4), 130),
    *_replicate("nothing-dropped", (0, 1, 2, 3, 4, 5, 2, 5), 33, padding=0),
    *_replicate("dropped", (0, 1, 2, 3, 4, 5, 2, 5), 33, dropped=6),
    *_replicate("moved-dropped", (4, 0, 5, 2, 3, 1, 0, 0, 2), 130, dropped=6),
    *_replicate("no-tokens", (0, 1, 2, 3, 4, 5, 2, 5), 0),
    *_replicate("one-token", (0, 1, 2, 3, 4, 5, 2, 5), 1),
)

CASES = REPLICATE
