"""What was not judged, and why: not declared by the adapter, refused when called, or absent from the engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from moe_conformance.judging.verdict import Refusal, Result, Verdict

_Kind = Refusal | Verdict
_TITLES: dict[_Kind, str] = {
    Refusal.STAGE: "stages not offered",
    Refusal.FEATURE: "features not offered",
    Refusal.LIMIT: "beyond limits",
    Refusal.CALL: "refused when called",
    Refusal.SEED: "judged with the default seed alone",
    Verdict.ABSENT: "the engine has nothing of the kind",
}


def reasons(results: Iterable[Result]) -> dict[tuple[str, _Kind], Counter[str]]:
    """(engine, kind) -> how many results each reason stands for. A reason is the first line of the message."""
    found: dict[tuple[str, _Kind], Counter[str]] = {}
    for result in results:
        if result.verdict in (Verdict.UNSUPPORTED, Verdict.ABSENT):
            kind = Verdict.ABSENT if result.verdict is Verdict.ABSENT else result.refusal or Refusal.CALL
            key = result.engine, kind
            found.setdefault(key, Counter())[result.message.partition("\n")[0]] += 1
    return found


def listed(results: Iterable[Result], most: int | None = None) -> Iterator[str]:
    """Lines: a head for each engine and kind, and below it the reasons, the most frequent `most` of them."""
    order = list(_TITLES)
    for (engine, kind), counts in sorted(
        reasons(results).items(), key=lambda item: (item[0][0], order.index(item[0][1]))
    ):
        yield f"{engine}, {_TITLES[kind]}: {counts.total()} results"
        shown = counts.most_common(most)
        width = len(str(shown[0][1]))
        yield from (f"  {count:{width}} {reason}" for reason, count in shown)
        if left := len(counts) - len(shown):
            yield f"  and {left} more reasons, {counts.total() - sum(count for _, count in shown)} results"
