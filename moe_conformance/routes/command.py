"""`moe-conformance routes`: from a model's folder and a record to a judgement of the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_conformance.checkpoints.findings import Findings
from moe_conformance.checkpoints.folder import CONFIG, read_folder
from moe_conformance.errors import ConfigError, Unsupported
from moe_conformance.model.description import MoESpec
from moe_conformance.model.families.describe import describe
from moe_conformance.oracle.precision import unit_roundoff
from moe_conformance.quote import few, quoted
from moe_conformance.routes.layerwise import Model
from moe_conformance.routes.patterns import Pattern, Table, patterns, shared
from moe_conformance.routes.record import RecordError, Request, read_record
from moe_conformance.routes.report import CARRIED, CODES, EQUAL, WITHIN, WRONG, Judgement, Layer
from moe_conformance.routes.rows import Margins, margins

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Tokens that pass the layers together: of 8,192 wide in float64, 4 GiB of hidden states. Each further group reads the
# weights once more.
TOGETHER = 65_536
REQUESTS_TOGETHER = 512  # each has a thread


def judged(path: Path, record: Path, tokens: Path | None = None, dtype: str | None = None) -> Judgement:
    """Raises CheckpointError, ConfigError, RecordError and Unsupported where there is nothing to judge."""
    folder = read_folder(path, Findings())
    spec = _spec(folder.config)
    requests = read_record(record, tokens)
    columns = _columns(record, requests, spec)
    served = DTYPES[dtype or _dtype(folder.config)]
    _in_vocabulary(record, requests, folder.config)
    narrow, wider = (Model(path, folder.config, folder.tensors, served, wide) for wide in (False, True))
    own: list[list[Tensor]] = [[] for _ in requests]  # of each request, of each MoE layer
    status: list[list[Tensor]] = [[] for _ in requests]
    expected: dict[int, Tensor] = {}
    for group in _groups(requests):
        texts = [requests[number].tokens.tolist() for number in group]
        every = torch.tensor([token for text in texts for token in text])
        for index, pair in enumerate(zip(narrow.run(texts), wider.run(texts), strict=True)):
            found = margins(spec.layers[index], *pair, served, every)
            start = 0
            for number, text in zip(group, texts, strict=True):
                request = requests[number]
                rows = start + torch.from_numpy(request.positions)
                ids = torch.from_numpy(request.ids[:, columns[index]])
                own[number].append(pair[1].ids[start : start + len(text)])
                status[number].append(_status(ids, own[number][-1][request.positions], rows, found))
                flips = expected.setdefault(index, torch.zeros(2, dtype=torch.float64))
                flips += torch.stack([found.flips[rows].sum(), (found.flips * (1 - found.flips))[rows].sum()])
                start += len(text)
    return _judgement(path, record, requests, spec, columns, served, own, status, expected)


def _spec(config: Mapping[str, Any]) -> MoESpec:
    spec = describe(config)
    if not spec.layers:
        raise ConfigError(f"{CONFIG}: routes need to know what each router computes; {spec.undetermined}")
    if spec.layer_runs:
        raise Unsupported(f"{CONFIG}: some layers run more than once a token; routes of such models are not judged")
    if any(layer.logits.takes_state or layer.routing.capacity for layer in spec.layers):
        raise Unsupported(f"{CONFIG}: its router's answer depends on more than its own row; such are not judged")
    return spec


def _columns(record: Path, requests: Sequence[Request], spec: MoESpec) -> list[int]:
    """Where a record has each MoE layer. Raises RecordError for another shape than the model's."""
    count, top_k = len(spec.moe_layers), spec.max_top_k
    shapes = {request.ids.shape[1:] for request in requests}
    if len(shapes) > 1 or (shape := next(iter(shapes)))[1] != top_k or shape[0] not in (spec.num_layers, count):
        got = ", ".join(str([*shape]) for shape in sorted(shapes)[:4])
        either = "" if count == spec.num_layers else f" or [{count}, {top_k}], of the layers with experts"
        raise RecordError(
            f"{record}: got [layers, k] {got}, want [{spec.num_layers}, {top_k}]{either}; take the record of this model"
        )
    return list(range(count)) if shape[0] == count else list(spec.moe_layers)


def _dtype(config: Mapping[str, Any]) -> str:
    """Of the weights, by the config."""
    for level in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(level, Mapping) and level.get(key) in DTYPES:
                return str(level[key])
    raise ConfigError(f"{CONFIG}: dtype: got {quoted(config.get('dtype'))}, want {few(sorted(DTYPES))}; say --dtype")


def _in_vocabulary(record: Path, requests: Sequence[Request], config: Mapping[str, Any]) -> None:
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)
    for request in requests:
        least, most = int(request.tokens.min()), int(request.tokens.max())
        if least < 0 or (isinstance(size, int) and most >= size):
            raise RecordError(
                f"{record}: request {request.name}: got token id {least if least < 0 else most}, want 0 to "
                f"{quoted(size)} exclusive; take the record of this model"
            )


def _groups(requests: Sequence[Request]) -> Iterator[list[int]]:
    group: list[int] = []
    tokens = 0
    for number, request in enumerate(requests):
        if group and (tokens + len(request.tokens) > TOGETHER or len(group) == REQUESTS_TOGETHER):
            yield group
            group, tokens = [], 0
        group.append(number)
        tokens += len(request.tokens)
    yield group


def _status(ids: Tensor, own: Tensor, rows: Tensor, found: Margins) -> Tensor:
    """EQUAL, WITHIN or WRONG of each row [R]; ids [R, k], own [R, K], where K may be less than k."""
    top_k, experts = own.shape[1], _experts(found)
    beyond = (ids[:, top_k:] >= 0).any(1) if ids.shape[1] > top_k else torch.zeros(len(ids), dtype=torch.bool)
    chosen = ids[:, :top_k].sort(1).values
    equal = (chosen == own.sort(1).values).all(1)
    legal = (chosen[:, 0] >= 0) & (chosen[:, -1] < experts) & (chosen.diff(dim=1) > 0).all(1) & ~beyond
    status = torch.full((len(ids),), WRONG, dtype=torch.int8)
    asked = legal & ~equal
    status[asked] = torch.where(found.accepts(chosen[asked], rows[asked]), WITHIN, WRONG).to(torch.int8)
    status[equal & ~beyond] = EQUAL
    return status


def _experts(found: Margins) -> int:
    return found.spec.num_experts + found.spec.routing.identity_experts


def _judgement(
    path: Path,
    record: Path,
    requests: Sequence[Request],
    spec: MoESpec,
    columns: Sequence[int],
    dtype: torch.dtype,
    own: Sequence[Sequence[Tensor]],
    status: Sequence[Sequence[Tensor]],
    expected: Mapping[int, Tensor],
) -> Judgement:
    """Name patterns, and judge what they leave."""
    cells = [_carried(torch.stack(list(parts), dim=1)) for parts in status]
    table = _table(requests, spec, columns, own, torch.cat(cells))
    narrow = unit_roundoff(dtype) > unit_roundoff(torch.float32)
    likeness = shared(table.own[table.here], table.ids)
    if narrow:  # single cells are counted; wrong are rows and layers that have little of their own
        rows, layers = likeness.mean(1) < table.middle, table.wrong.double().mean(0) >= 0.5
        table.wrong.logical_and_(rows[:, None] | layers[None])
    findings = Findings()
    _lengths(record, requests, findings)
    left = table.wrong.clone()
    for pattern in patterns(table):
        _add(findings, record, requests, table, pattern)
        left &= ~pattern.cells
    if left.any():
        words = "the experts of no token, layer or numbering of this record" if narrow else "that no pattern explains"
        unlike = Pattern(
            "unlike",
            f"{int(left.any(1).sum()):,} rows {words}",
            "look for rows that were never written, of requests that are not in the record, or of other weights",
            left,
        )
        _add(findings, record, requests, table, unlike)
    every, explained = torch.cat(cells), table.wrong
    layers_found = [
        Layer(
            layer,
            **{name: int((every[:, index] == code).sum()) for code, name in enumerate(CODES)},
            expected=float(expected[index][0]),
        )
        for index, layer in enumerate(spec.moe_layers)
    ]
    sums = torch.stack(list(expected.values())).sum(0)
    differ = int(((every != EQUAL) & ~explained).sum())
    if narrow and differ > (most := float(sums[0] + 5 * sums[1].sqrt())):
        findings.add(
            "more-differ",
            record.name,
            got=f"{differ:,} of {every.numel():,} choices of experts that are others than the model's in float32",
            want=f"at most {most:,.0f}, as the margins of its routers and the roundings of {_word(dtype)} let expect",
            do="see that the engine serves these weights in this precision: a quantised cache or kernel differs more",
            level="note",
        )
    return Judgement(
        str(path),
        str(record),
        f"{spec.num_layers} layers, {len(spec.moe_layers)} with {spec.max_experts} experts",
        _word(dtype),
        len(requests),
        tuple(layers_found),
        tuple(
            (request.name, tuple("".join(map(str, row)) for row in part.tolist()))
            for request, part in zip(requests, cells, strict=True)
        ),
        float(sums[0]),
        findings.all(),
    )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _carried(status: Tensor) -> Tensor:
    """Behind a layer where a row had other experts within rounding, it has other hidden states by right."""
    wrong, within = status == WRONG, status == WITHIN
    before = (within.cumsum(1) > 0) & ~(wrong & (within.cumsum(1) == 0)).any(1, keepdim=True)
    return torch.where(wrong & before, CARRIED, status).to(torch.int8)


def _table(
    requests: Sequence[Request], spec: MoESpec, columns: Sequence[int], own: Sequence[Sequence[Tensor]], cells: Tensor
) -> Table:
    lengths = torch.tensor([len(request.tokens) for request in requests])
    rows = torch.tensor([len(request.ids) for request in requests])
    whole = torch.from_numpy(np.concatenate([request.ids for request in requests]))
    last = torch.cat([torch.arange(len(r.ids)) == len(r.ids) - 1 for r in requests])
    ended = torch.tensor([int(r.positions[-1]) >= len(r.tokens) - 2 and len(r.ids) > 1 for r in requests])
    request = torch.arange(len(requests)).repeat_interleave(rows)
    wide = spec.max_top_k

    def stacked(parts: Sequence[Tensor]) -> Tensor:
        padded = [torch.nn.functional.pad(part, (0, wide - part.shape[1]), value=-1) for part in parts]
        return torch.stack(padded, dim=1)

    sizes = spec.num_experts
    return Table(
        ids=whole[:, list(columns)],
        own=torch.cat([stacked(parts) for parts in own]),
        request=request,
        position=torch.from_numpy(np.concatenate([r.positions for r in requests])),
        starts=lengths.cumsum(0) - lengths,
        wrong=cells == WRONG,
        experts=[sizes] * len(columns) if isinstance(sizes, int) else list(sizes),
        top_k=wide,
        ranks=[r.rank for r in requests],
        whole=whole,
        columns=columns,
        layers=spec.moe_layers,
        last=last & ended[request],
    )


def _lengths(record: Path, requests: Sequence[Request], findings: Findings) -> None:
    """A row is due for each token but the last, which was sampled and never run; one for it, too, may be right."""
    for request in requests:
        rows, tokens = len(request.ids), len(request.tokens)
        if not request.is_sample and rows < tokens - 1:
            findings.add(
                "end-row" if rows == tokens - 2 else "rows-missing",
                record.name,
                f"request {request.name} ({rows} rows of {tokens} tokens)",
                got="one row too few" if rows == tokens - 2 else "too few rows",
                want="one less than tokens, or positions that say which rows these are",
                do="record a row for every token that was run through the model: all but the last",
            )


def _add(findings: Findings, record: Path, requests: Sequence[Request], table: Table, pattern: Pattern) -> None:
    """One finding of a pattern, with the places that it is seen at."""
    places = []
    rows = pattern.cells.any(1)
    for number in table.request[rows].unique().tolist():
        at = table.position[rows & (table.request == number)].tolist()
        wrong = pattern.cells[table.request == number].any(0).nonzero().flatten().tolist()
        in_layers = "" if len(wrong) == len(table.layers) else f" of layers {few([table.layers[i] for i in wrong])}"
        places.append(f"request {requests[number].name} (rows {_runs(at)}{in_layers})")
    findings.add(
        pattern.kind,
        record.name,
        places,
        got=pattern.got,
        want="each row with the experts that the model's router chose for its token",
        do=pattern.do,
    )


def _runs(numbers: Sequence[int]) -> str:
    """1-3, 5 of 1, 2, 3, 5; the first few."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(words[:6]) + (", ..." if len(words) > 6 else "")
