"""Checks for a model without a record: its experts are alike, and as many as its config says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from moe_conformance.checkpoints.findings import Findings
from moe_conformance.checkpoints.folder import Folder
from moe_conformance.checkpoints.headers import Stored
from moe_conformance.model.families.bounds import DEEPEST, MOST_EXPERTS
from moe_conformance.model.families.families import EXPERTS, NESTED
from moe_conformance.quote import FEW

_EXPERT = re.compile(r"(.*(?<![A-Za-z0-9_])experts\.(?:expert_)?)([0-9]{1,6})\.(.+)", re.DOTALL)


def alike(stems: Mapping[str, Mapping[str, Stored]], folder: Folder, findings: Findings) -> None:
    """Experts of a layer are numbered without holes, have the same tensors, and these the same shapes and dtypes.

    stems: by what precedes the end of a name, the tensors with their ends.
    """
    blocks: dict[tuple[str, str], dict[int, Stored]] = {}
    for stem, held in stems.items():
        match = _EXPERT.fullmatch(stem)
        for end, entry in held.items() if match else ():
            assert match is not None
            blocks.setdefault((match[1], f"{match[3]}.{end}"), {})[int(match[2])] = entry
    in_layer: dict[str, set[int]] = {}
    for (before, _), entries in blocks.items():
        in_layer.setdefault(before, set()).update(entries)
    usual = Counter(max(numbers) + 1 for numbers in in_layer.values()).most_common(1)
    said = next(_said(folder.config), None)
    for (before, rest), entries in blocks.items():
        count = said[1] if said else usual[0][0]
        _holes(before, rest, entries, count, said[0] if said else "", folder, findings)
        _odd(entries, findings)


def _said(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, int]]:
    """The config's key for the number of experts, and the number."""
    for key in EXPERTS:
        value = config.get(key)
        if type(value) is int and 0 < value <= MOST_EXPERTS:
            yield key, value
    for key in NESTED:
        below = config.get(key)
        if isinstance(below, Mapping) and depth < DEEPEST:
            yield from _said(below, depth + 1)


def _holes(
    before: str, rest: str, entries: dict[int, Stored], count: int, key: str, folder: Folder, findings: Findings
) -> None:
    gone = count - sum(number < count for number in entries)
    first = next(iter(entries.values()))
    if gone and folder.whole:
        names = [f"{before}{n}.{rest}" for n in islice((n for n in range(count) if n not in entries), FEW)]
        want = f"{count} experts, as {f'config.json says ({key})' if key else 'other layers have'}"
        do = "download the shard that has it, or mend the export"
        findings.add("missing", first.file, names, got="no such tensor", want=want, do=do, count=gone)
    beyond = [entry.name for number, entry in entries.items() if number >= count]
    if beyond:
        do = "config.json and the tensors are of different models; take both from one place"
        findings.add("contradiction", first.file, beyond, got="more experts", want=f"{count} ({key})", do=do)


def _odd(entries: dict[int, Stored], findings: Findings) -> None:
    kinds = Counter((entry.dtype, entry.shape) for entry in entries.values())
    if len(kinds) < 2:
        return
    dtype, shape = kinds.most_common(1)[0][0]
    for entry in entries.values():
        if (entry.dtype, entry.shape) != (dtype, shape):
            kind = "mistyped" if entry.shape == shape else "misshapen"
            got, want = f"{entry.dtype} {list(entry.shape)}", f"{dtype} {list(shape)}, as its like"
            findings.add(kind, entry.file, entry.name, got=got, want=want, do="mend the export")
