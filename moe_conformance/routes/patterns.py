"""What wrong rows are instead: rows of another place, ids of another layer, ids under other numbers, or a constant.

Each pattern says of every row which experts it would have then. It holds where the wrong rows, or the wrong layers,
share more experts with those than the middle between all and chance. The pattern that explains most is named first;
what it leaves is looked at once more. A pattern is named only on evidence: what it explains must be less probable by
chance than one in a million, for all the places that were tried.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Bits of evidence above what the choice among candidates gives away: one false name in a million.
EVIDENCE = 20
# Rows that are looked for among all others; entries of the table of all pairs.
SAMPLE, PAIRS = 512, 2 * 10**7
# Places that one row is looked for at: of tokens that are all alike there are as many as rows.
PLACES = 64


@dataclass(frozen=True)
class Table:
    """All rows of a record beside all answers of the router. M rows, N tokens, L layers with experts, k experts.

    ids: [M, L, k], as recorded; own: [N, L, k]. request, position: [M], of which token a row is. starts: of each
    request's tokens in `own`. wrong: [M, L] bool. experts: E of each layer; top_k likewise. ranks: of each request.
    whole: [M, C, k], all columns of the record, where the column of layer i is columns[i]. layers: their numbers in
    the model. last: [M] bool, the last row of each request that is recorded to its end.
    """

    ids: Tensor
    own: Tensor
    request: Tensor
    position: Tensor
    starts: Tensor
    wrong: Tensor
    experts: Sequence[int]
    top_k: int
    ranks: Sequence[int | None]
    whole: Tensor
    columns: Sequence[int]
    layers: Sequence[int]
    last: Tensor

    @property
    def here(self) -> Tensor:
        """[M], where in `own` the token of each row is."""
        return self.starts[self.request] + self.position

    @property
    def middle(self) -> float:
        """Between all experts in common and as many as by chance."""
        return (1 + self.top_k / min(self.experts)) / 2

    @property
    def bits(self) -> float:
        """How surprising it is that one cell has the experts that it is expected to have."""
        return self.top_k * math.log2(max(min(self.experts) / self.top_k, 2))


@dataclass(frozen=True)
class Pattern:
    """kind: a word for machines. got, do: in words. cells: [M, L] bool, the wrong ones that it explains. tried: how
    many such patterns were looked at. is_certain: it needs no evidence, for no router gives such an answer. also: cells
    that follow from the pattern, and are no evidence of it."""

    kind: str
    got: str
    do: str
    cells: Tensor
    tried: float = 1
    is_certain: bool = False
    also: Tensor | None = None


def shared(own: Tensor, ids: Tensor) -> Tensor:
    """[...], the part of own experts [..., k] that the record [..., k] has, too."""
    real = own >= 0
    hits = (own[..., :, None] == ids[..., None, :]).any(-1) & real
    return hits.double().sum(-1) / real.double().sum(-1).clamp(min=1)


def patterns(table: Table) -> Iterator[Pattern]:
    """Those that explain the wrong cells, the one that explains most first."""
    left = table.wrong.clone()
    while left.any():
        found = [pattern for finder in FINDERS for pattern in finder(table, left)]
        found = [pattern for pattern in found if _has_evidence(pattern, table)]
        if not found:
            return
        first = max(found, key=lambda pattern: int(pattern.cells.sum()))  # of equals the first
        if first.also is not None:
            first = replace(first, cells=first.cells | first.also & left)
        yield first
        left &= ~first.cells


def _has_evidence(pattern: Pattern, table: Table) -> bool:
    cells = int(pattern.cells.sum())
    return cells > 0 and (pattern.is_certain or cells * table.bits >= math.log2(max(pattern.tried, 1)) + EVIDENCE)


def _by_rows(table: Table, left: Tensor, source: Tensor) -> Tensor:
    """[M, L] bool, the cells of rows whose wrong cells are those of the token `source` [M]; -1: of none."""
    fits = shared(table.own[source.clamp(min=0)], table.ids)
    count = left.double().sum(1)
    likeness = (fits * left).sum(1) / count.clamp(min=1)
    return left & ((likeness >= table.middle) & (source >= 0) & (count > 0))[:, None]


def _end_row(table: Table, left: Tensor) -> Iterator[Pattern]:
    """The last row alone is wrong, in each request where any is."""
    rows = left.any(1)
    wholly = left.double().mean(1) >= 0.5
    if not rows.any() or (rows & ~table.last).any() or not wholly[rows].all():
        return
    count = int(rows.sum())
    yield Pattern(
        "end-row",
        f"the last row of {_many(count, 'request')} is not of its token",
        "return seq_len - 1 rows: the last token was sampled and never run through the model",
        left,
        is_certain=True,
    )


def _padded(table: Table, left: Tensor) -> Iterator[Pattern]:
    """Rows that are filled, all slots alike; or one row that was written again and again."""
    rows = left.any(1)
    flat = table.ids.flatten(1)
    alike = (flat == flat[:, :1]).all(1)
    for value in flat[rows & alike, 0].unique().tolist():
        filled = rows & alike & (flat[:, 0] == value)
        yield Pattern(
            "padded",
            f"{_many(int(filled.sum()), 'row')} filled with {value}",
            "drop the rows of padding, or write the rows of these tokens; 0 is a legal expert, so that a fill of 0 is "
            "taken for a choice",
            left & filled[:, None],
            tried=table.experts[0],
            is_certain=table.top_k > 1 or not 0 <= value < min(table.experts),
        )
    if rows.sum() > 2:
        common, counts = flat[rows].unique(dim=0, return_counts=True)
        most = int(counts.argmax())
        again = rows & (flat == common[most]).all(1) & ~alike
        if counts[most] > 2 and len(table.own[table.here[again]].unique(dim=0)) > 1:
            yield Pattern(
                "padded",
                f"{_many(int(again.sum()), 'row')} alike, experts {common[most][: table.top_k].tolist()} in layer "
                f"{table.layers[0]}",
                "write a row for each token; dummy or padded tokens were recorded in their places",
                left & again[:, None],
                tried=len(flat),
            )


def _moved(table: Table, left: Tensor) -> Iterator[Pattern]:
    """Rows of another token: shifted, reversed, or another request's."""
    rows = left.any(1).nonzero().flatten()
    sample = rows[:: max(1, math.ceil(len(rows) / min(SAMPLE, max(1, PAIRS // len(table.own)))))]
    shifts: Counter[int] = Counter()
    turns: dict[int, Counter[int]] = {}
    others: dict[int, Counter[tuple[int, int]]] = {}
    for row, sources in zip(sample.tolist(), _sources(table, sample), strict=True):
        request, position = int(table.request[row]), int(table.position[row])
        for source in sources:
            other = int((table.starts <= source).sum()) - 1
            place = source - int(table.starts[other])
            if other == request:
                shifts[place - position] += 1
                turns.setdefault(request, Counter())[place + position] += 1
            else:
                others.setdefault(request, Counter())[other, place - position] += 1
    yield from _shifted(table, left, shifts)
    yield from _reversed(table, left, turns)
    yield from _anothers(table, left, others)


def _sources(table: Table, rows: Tensor) -> list[list[int]]:
    """Of each of these rows the tokens whose experts it shares most, at least as many as the middle."""
    likeness = torch.zeros(len(rows), len(table.own))
    for layer, experts in enumerate(table.experts):
        likeness += _marked(table.ids[rows, layer], experts) @ _marked(table.own[:, layer], experts).T
    likeness /= (table.own[:1] >= 0).sum()
    likeness[torch.arange(len(rows)), table.here[rows]] = 0
    best = likeness.amax(1, keepdim=True)
    found = (likeness >= best - 1e-4) & (best >= table.middle)
    return [row.nonzero().flatten()[:PLACES].tolist() for row in found]


def _marked(ids: Tensor, experts: int) -> Tensor:
    """[R, E], 1 at the experts of a row."""
    inside = ids.where((ids >= 0) & (ids < experts), experts)
    return torch.zeros(len(ids), experts + 1).scatter_(1, inside, 1.0)[:, :-1]


def _places(table: Table, request: Tensor, position: Tensor) -> Tensor:
    """Where in `own` these positions of these requests are; -1 outside."""
    ends = torch.cat([table.starts[1:], torch.tensor([len(table.own)])])
    at = table.starts[request] + position
    return at.where((position >= 0) & (at < ends[request]), -1)


def _shifted(table: Table, left: Tensor, votes: Counter[int]) -> Iterator[Pattern]:
    for shift, _ in votes.most_common(3):
        source = _places(table, table.request, table.position + shift)
        cells = _by_rows(table, left, source)
        if not cells.any():
            continue
        # Rows that a shift takes from outside the request hold anything; they are fewer than those that it explains.
        moved = torch.zeros(len(table.starts)).index_add(0, table.request, cells.any(1).float())
        beyond = left & ((source < 0) & (moved[table.request] >= abs(shift)))[:, None]
        way = "later" if shift > 0 else "earlier"
        by = f"{abs(shift)} position{'s' * (abs(shift) > 1)} {way}"
        yield Pattern(
            "shifted",
            f"{_many(int(cells.any(1).sum()), 'row')} of {_requests(table, cells)} with the experts of {by}",
            "record each step's rows at its own positions: count cached and chunked tokens, and the sampled one once",
            cells,
            tried=2 * len(table.own),
            also=beyond,
        )


def _reversed(table: Table, left: Tensor, votes: dict[int, Counter[int]]) -> Iterator[Pattern]:
    total = torch.full((len(table.starts),), -1)
    for request, counts in votes.items():
        total[request] = counts.most_common(1)[0][0]
    source = _places(table, table.request, total[table.request] - table.position)
    source = source.where(total[table.request] >= 0, -1)
    cells = _by_rows(table, left, source)
    # A row is its own mirror image; of two rows that change places nobody can say more.
    if cells.any(1).sum() > 2:
        yield Pattern(
            "reversed",
            f"{_many(int(cells.any(1).sum()), 'row')} of {_requests(table, cells)} in reversed order",
            "join the blocks of a prefix in the order of its tokens",
            cells,
            tried=2 * len(table.own),
        )


_OTHERS = {
    "another-rank": (
        "of a request that another rank served",
        "take each rank's rows from its own place in the gathered buffer",
    ),
    "stale": (
        "of an earlier request",
        "clear the rows of a slot, or write all of them, when it is given to the next request",
    ),
    "another-request": (
        "of a later request",
        "cut the rows of a batch where its requests end, in the order in which they were run",
    ),
}


def _anothers(table: Table, left: Tensor, votes: dict[int, Counter[tuple[int, int]]]) -> Iterator[Pattern]:
    kinds: dict[str, Tensor] = {}
    whose: dict[str, str] = {}
    for request, counts in votes.items():
        for (other, shift), _ in counts.most_common(3):
            there = torch.full_like(table.request, other)
            source = _places(table, there, table.position + shift).where(table.request == request, -1)
            cells = _by_rows(table, left, source)
            apart = None not in (table.ranks[request], table.ranks[other]) and (
                table.ranks[request] != table.ranks[other]
            )
            kind = "another-rank" if apart else "stale" if other < request else "another-request"
            if cells.any():
                kinds[kind] = kinds.get(kind, torch.zeros_like(left)) | cells
                whose.setdefault(kind, f", as request {request} of request {other}")
    for kind, cells in kinds.items():
        words, do = _OTHERS[kind]
        got = f"{_many(int(cells.any(1).sum()), 'row')} of {_requests(table, cells)} with the experts {words}"
        yield Pattern(kind, got + whose[kind], do, cells, tried=2 * len(table.own))


def _bad_layers(table: Table, left: Tensor) -> list[int]:
    return [layer for layer, share in enumerate(left.double().mean(0).tolist()) if share >= 0.5]


def _layers(table: Table, left: Tensor) -> Iterator[Pattern]:
    """Layers that hold another one's experts; or columns that are counted by another rule."""
    yield from _dense_counted(table, left)
    own, found = table.own[table.here], {}
    for layer in _bad_layers(table, left):
        rows = left[:, layer].nonzero().flatten()
        rows = rows[:: max(1, len(rows) // SAMPLE)]
        likeness = shared(own[rows], table.ids[rows, layer][:, None]).mean(0)
        likeness[layer] = 0
        if likeness.max() >= table.middle:
            found[layer] = int(likeness.argmax())
    if not found:
        return
    cells = torch.zeros_like(left)
    for layer in found:
        cells[:, layer] = left[:, layer]
    names = [f"layer {table.layers[layer]} of layer {table.layers[other]}" for layer, other in found.items()]
    if len(found) > 1 and len(set(found.values())) == 1:
        names = [f"{len(found)} layers of layer {table.layers[next(iter(found.values()))]}"]
    yield Pattern(
        "another-layer",
        f"the experts of another layer: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}",
        "let each layer write under its own number: bind it when the router is made, not when it is called",
        cells,
        tried=len(table.layers) ** 2,
    )


def _dense_counted(table: Table, left: Tensor) -> Iterator[Pattern]:
    """Columns by number among the MoE layers where all layers have one; or by layer where the MoE layers alone do."""
    width, count, own = table.whole.shape[1], len(table.layers), table.own[table.here]
    if list(table.columns) == list(table.layers):
        held = {column: column for column in range(min(count, width))}
        words = "the MoE layers alone are counted, from column 0, in a record that has a column for every layer"
    else:
        held = {column: table.layers.index(column) for column in range(width) if column in table.layers}
        words = "dense layers are counted, in a record that has a column for each MoE layer alone"
    # Where a layer stands in its own column under both rules nothing is wrong.
    held = {column: number for column, number in held.items() if column != table.columns[number]}
    if not held or not left.any():
        return
    rows = left.any(1).nonzero().flatten()
    rows = rows[:: max(1, len(rows) // SAMPLE)]
    likeness = [shared(own[rows, number], table.whole[rows, column]).mean() for column, number in held.items()]
    if min(likeness) >= table.middle:
        yield Pattern(
            "dense-counted",
            words,
            "count as the reader does: num_hidden_layers columns, those of dense layers unused",
            left,
            tried=2,
        )


def _renamed(table: Table, left: Tensor) -> Iterator[Pattern]:
    """Ids of a rank's own experts, or physical ids, in place of the model's."""
    own, layers = table.own[table.here], _bad_layers(table, left)
    if not layers:
        return
    experts = min(table.experts)
    for size in [n for n in range(1, experts) if experts % n == 0 and n > 1]:
        fits = [shared(own[:, layer] % size, table.ids[:, layer]) for layer in layers]
        within = [layer for layer, fit in zip(layers, fits, strict=True) if fit[left[:, layer]].mean() >= table.middle]
        if within and all(int(table.ids[:, layer].max()) < size for layer in within):
            yield Pattern(
                "local-ids",
                f"ids within a rank of {size} experts, in {_many(len(within), 'layer')}",
                f"add {size} for each rank before it: ids of the model are global",
                _cells_of(left, within),
                tried=experts,
            )
    mapped, example = [], ""
    for layer in layers:
        words = _map(own[:, layer], table.ids[:, layer], table.experts[layer], table)
        if words:
            mapped.append(layer)
            example = example or words
    if mapped:
        yield Pattern(
            "physical",
            f"ids under other numbers, the same for all rows, in {_many(len(mapped), 'layer')}, as {example}",
            "translate physical ids to logical ones, by the placement of that step, before they are recorded",
            _cells_of(left, mapped),
            tried=2.0 ** min(1000, experts * math.log2(experts)),
        )


def _map(own: Tensor, ids: Tensor, experts: int, table: Table) -> str:
    """Which id stands for which, learnt on every other row and tried on the rest; "" where none does."""
    kinds = int(ids.max()) + 1
    if int(ids.min()) < 0 or kinds > 4 * experts:
        return ""
    learn, tried = slice(0, None, 2), slice(1, None, 2)
    together = _marked(ids[learn], kinds).T @ _marked(own[learn], experts)  # [physical, logical]
    logical = together.argmax(1).where(together.amax(1) > 0, -1)
    if bool((logical[ids[tried]] < 0).double().mean() > 0.5) or not len(ids[tried]):
        return ""
    if shared(own[tried], logical[ids[tried]]).mean() < table.middle:
        return ""
    first = [
        f"{physical} for {meant}" for physical, meant in enumerate(logical.tolist()) if meant >= 0 and physical != meant
    ]
    copies = kinds > experts or len(set(logical[logical >= 0].tolist())) < int((logical >= 0).sum())
    return ", ".join(first[:4]) + (", ..." if len(first) > 4 else "") + (", with replicas" if copies else "")


def _cells_of(left: Tensor, layers: Sequence[int]) -> Tensor:
    cells = torch.zeros_like(left)
    cells[:, layers] = left[:, layers]
    return cells


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _requests(table: Table, cells: Tensor) -> str:
    return _many(len(table.request[cells.any(1)].unique()), "request")


FINDERS: tuple[Callable[[Table, Tensor], Iterator[Pattern]], ...] = (_end_row, _padded, _layers, _moved, _renamed)
