"""Known-failures files: one TOML file per engine, strict.

    engine = "vllm"

    [[known]]
    case = "capture-layer-id-negative"
    check = "layer_ids_out_of_range_are_rejected"
    kind = "not_yet"                  # never, not_yet, not_implemented or broken
    issue = "https://github.com/vllm-project/vllm/issues/..."
    reason = "..."                    # optional
    when = { version = ">=0.19,<0.31", device = "cpu" }   # optional; both parts optional

A listed case that passes is an unexpected pass; an entry that names no case or check is a usage error. An entry whose
check does not have that case fails the run at its end: only the check modules know their cases, and importing them
takes torch.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion

from moe_conformance.catalogue import aliases
from moe_conformance.catalogue.aliases import current
from moe_conformance.catalogue.case import catalogue, check_names
from moe_conformance.engine import EngineInfo
from moe_conformance.errors import UsageError
from moe_conformance.judging.verdict import Result

# As torch names them; "cuda:0" is one, too.
DEVICES = ("cpu", "cuda", "hpu", "mps", "mtia", "musa", "npu", "tpu", "xla", "xpu")
KINDS = ("never", "not_yet", "not_implemented", "broken")
_ENTRY_KEYS = {"case", "check", "kind", "issue", "reason", "when"}


@dataclass(frozen=True)
class KnownFailure:
    case: str
    check: str
    kind: str
    issue: str
    reason: str = ""
    when: Mapping[str, str] = field(default_factory=dict)

    def applies(self, info: EngineInfo) -> bool:
        """Whether the condition holds for the engine that runs. An unparsable version matches no specifier."""
        if "device" in self.when and self.when["device"] != info.device:
            return False
        if "version" in self.when:
            try:
                return SpecifierSet(self.when["version"], prereleases=True).contains(info.version)
            except InvalidVersion:
                return False
        return True


@dataclass(frozen=True)
class KnownFailures:
    engine: str
    entries: Mapping[tuple[str, str], KnownFailure]

    def strays(self, results: Iterable[Result]) -> list[str]:
        """Entries whose case was judged, but has no check of that name."""
        seen: dict[str, set[str]] = {}
        for result in results:
            if result.engine == self.engine:
                seen.setdefault(result.case, set()).add(result.check)
        return [
            f"known failures of {self.engine}: {case} has no check {check!r}, only {', '.join(sorted(seen[case]))}"
            for case, check in self.entries
            if case in seen and check not in seen[case]
        ]

    def find(self, case: str, check: str, info: EngineInfo) -> KnownFailure | None:
        entry = self.entries.get((case, check))
        return entry if entry is not None and entry.applies(info) else None


def read(path: Path) -> KnownFailures:
    """Parse and validate a file. Raises UsageError naming file and entry."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read the known-failures file: {error}") from error
    engine = data.pop("engine", None)
    listed = data.pop("known", [])
    if not isinstance(engine, str) or not isinstance(listed, list) or data:
        raise UsageError(
            f'{path}: want engine = "NAME" and [[known]] tables, got also {sorted(data)}, engine {engine!r}'
        )
    entries: dict[tuple[str, str], KnownFailure] = {}
    for number, raw in enumerate(listed, 1):
        entry = _entry(f"{path}, entry {number}", raw)
        if (entry.case, entry.check) in entries:
            raise UsageError(f"{path}, entry {number}: {entry.case} / {entry.check} is listed twice")
        entries[entry.case, entry.check] = entry
    return KnownFailures(engine, entries)


def read_all(files: Iterable[Path]) -> dict[str, KnownFailures]:
    """By engine; files of one engine add up. Raises UsageError where two list the same case and check."""
    found: dict[str, KnownFailures] = {}
    for file in dict.fromkeys(Path(file).resolve() for file in files):
        more = read(file)
        before = found.get(more.engine, KnownFailures(more.engine, {}))
        for case, check in sorted(before.entries.keys() & more.entries.keys()):
            raise UsageError(f"{file}: {case} / {check} of {more.engine} is listed in another file, too; take one out")
        found[more.engine] = KnownFailures(more.engine, {**before.entries, **more.entries})
    return found


def _entry(where: str, raw: object) -> KnownFailure:
    if not isinstance(raw, dict):
        raise UsageError(f"{where}: got {raw!r}, want a [[known]] table")
    absent = {"case", "check", "kind", "issue"} - raw.keys()
    unknown = raw.keys() - _ENTRY_KEYS
    if absent or unknown:
        raise UsageError(
            f"{where}: missing {sorted(absent)}, unknown {sorted(unknown)}; keys are {sorted(_ENTRY_KEYS)}"
        )
    when = raw.get("when", {})
    text = {key: raw[key] for key in raw.keys() - {"when"}}
    if not all(isinstance(value, str) for value in text.values()) or not isinstance(when, dict):
        raise UsageError(f"{where}: want strings, and a table for `when`")
    entry = KnownFailure(**text, when=when)
    try:
        (case,) = current("case", [entry.case], catalogue(), aliases.CASES)
        (check,) = current("check", [entry.check], check_names(), aliases.CHECKS)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    entry = replace(entry, case=case, check=check)
    current(f"{where}: kind", [entry.kind], KINDS)
    if not entry.issue.strip():
        raise UsageError(f"{where}: issue: got {entry.issue!r}, want where the failure is reported")
    if set(when) - {"version", "device"} or not all(isinstance(value, str) for value in when.values()):
        raise UsageError(f"{where}: when: got {when!r}, want version and device, both strings")
    if "device" in when:
        current(f"{where}: when.device", [when["device"].partition(":")[0]], DEVICES)
    try:
        SpecifierSet(when.get("version", ""))
    except InvalidSpecifier as error:
        raise UsageError(f"{where}: when.version: {error}") from error
    return entry
